"""Shows what each layer of a model predicts, token by token.

The prompt is continued greedily, then one pass reads the whole text with every exit (the paper's Figure 2):

  lsjax explain --model=runs/demo --prompt="def main():"
  lsjax explain --model=SmolLM2-135M-Instruct.Q4_1.gguf \\
    --prompt="import os" --max_new_tokens=24 --output=layers.png

A column is a position of the text, a row is a layer, and a cell is the token that this layer would put next. Green
cells predict what the last layer predicts, orange cells something else; the stronger the colour, the likelier the
token. The last row is the layer from which the prediction no longer changes. A space is shown as a dot, a line break
as an arrow. In a model with an adapter of an exit, that exit predicts through it, as its drafts do.

The line under the table averages that layer over all positions, over the tokens of the prompt, and over those of the
continuation.
"""

import json
from pathlib import Path

from lsjax.cli import decoding_flags as shared
from lsjax.cli.flags import Arguments, CommandFlags
from lsjax.errors import UserError


def define_flags(flags: CommandFlags) -> None:
    """Defines the flags of this command."""
    flags.group("What to explain")
    shared.define_model(flags)
    flags.text("prompt", None, "The text to read.", required=True)
    flags.integer("max_new_tokens", 16, "Most tokens to continue it by; 0 reads the prompt alone.", at_least=0)
    flags.group("Output")
    flags.path("output", None, "Also draw the table into this .png file.")
    flags.path("report", None, "Write tokens, probabilities and layers to this JSON file.")


def main(arguments: Arguments) -> None:
    """Runs the command."""
    from rich.console import Console

    from lsjax.files import check_report, path_of, write_atomically

    if arguments.output:
        _check_output(arguments.output)
    check_report(arguments.report, "predicted_texts")
    from lsjax.decoding.model import load
    from lsjax.explain import layer_predictions

    model = load(arguments.model, for_decoding=True, adapter=arguments.adapter)
    predictions = layer_predictions(model, arguments.prompt, arguments.max_new_tokens)
    Console(highlight=False).print(predictions)
    print(predictions.summary(), flush=True)
    if arguments.output:
        predictions.save_png(arguments.output)
        print(f"picture: {arguments.output}")
    if arguments.report:
        report = {
            "model": arguments.model,
            "adapter": arguments.adapter,
            "prompt": arguments.prompt,
        } | predictions.report()
        write_atomically(path_of(arguments.report), json.dumps(report))
        print(f"report: {arguments.report}")


def _check_output(path: str) -> None:
    """Raises UserError when no picture can be drawn into the file, before the model is loaded."""
    from lsjax.files import check_replaceable, disk_path

    if Path(path).suffix.lower() != ".png":
        raise UserError(f"--output {path} is a picture in PNG: give a name that ends in .png")
    check_replaceable(disk_path(path, "--output"), "--output", lambda content: content.startswith(b"\x89PNG"))
    import lsjax.reports.layer_figure  # noqa: F401 (says which extra to install where matplotlib is missing)
