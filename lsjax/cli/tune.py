"""Finds the fastest setting for some temperatures and batch sizes, and keeps them beside the model.

Each temperature is measured with each batch size, on prompts like those that the model will get, and the table is
written beside the model as tuned_settings.json:

  lsjax tune --model=runs/demo
  lsjax tune --model=SmolLM2-135M-Instruct.Q4_1.gguf \\
    --prompts=prompts.jsonl --temperatures=0,0.6,1 \\
    --batch_sizes=1,4,16

From then on, --exit_layer=auto --num_speculations=auto of generate takes the nearest setting of the table and measures
nothing. Where no drafts are predicted to pay, that is autoregressive decoding. A table of other weights, another device
or another version is not used. Run nothing else meanwhile, because rounds are timed.
"""

from lsjax.cli import decoding_flags as shared
from lsjax.cli.flags import Arguments, CommandFlags
from lsjax.errors import UserError


def define_flags(flags: CommandFlags) -> None:
    """Defines the flags of this command."""
    flags.group("What to measure")
    shared.define_model_and_prompts(flags)
    shared.define_held_out_prompts(flags)
    flags.comma_list("temperatures", "0,0.8", "0 is greedy; above 0, tokens are drawn.")
    flags.comma_list("batch_sizes", "1,8", "Prompts decoded side by side; prompts are repeated to fill a batch.")
    flags.integer("max_new_tokens", 64, "Tokens to generate per prompt.")
    flags.integer("seed", 0, "Other seeds draw other texts.", at_least=0)
    flags.group("Hardware")
    shared.define_hardware(flags)


def main(arguments: Arguments) -> None:
    """Runs the command."""
    from lsjax.files import check_writable
    from lsjax.tuning.tune import tune_table
    from lsjax.tuning.tuned_settings import settings_path

    path = settings_path(arguments.model)
    check_writable(path, "the tuned settings")
    shared.check_held_out_prompts(arguments)
    temperatures, batch_sizes = _numbers(arguments), arguments.integers("batch_sizes")
    lines = shared.given_prompts(arguments)
    model = shared.load_model(arguments)
    texts = [shared.without_settings(line, "tune") for line in lines]
    prompts = shared.make_prompts(arguments, model, texts) if texts else shared.held_out_prompts(arguments)
    table = tune_table(
        model,
        prompts,
        arguments.max_new_tokens,
        temperatures=temperatures,
        batch_sizes=batch_sizes,
        seed=arguments.seed,
        note=print,
    )
    print(table)
    print(f"table: {path}")


def _numbers(arguments: Arguments) -> tuple[float, ...]:
    try:
        return tuple(float(text) for text in arguments.temperatures)
    except ValueError:
        given = ",".join(arguments.temperatures)
        raise UserError(f"--temperatures must be numbers separated by commas, got {given!r}") from None
