"""Shows cause and effect in minutes, on any machine: a plain model learns to exit early, and then decodes faster.

  lsjax demo --config=demo --workdir=runs/demo

Measures a small model that ships, trained without LayerSkip, on code that it has not seen: the held-out loss of every
exit, and the speed of self-speculation, greedy and sampled. Then it continues the model with LayerSkip for some
minutes, and measures the same again. Leaves demo.png and report.json in the workdir. Run again, it goes on where it
was.
"""

from lsjax.cli.flags import Arguments, CommandFlags


def define_flags(flags: CommandFlags) -> None:
    """Defines the flags of this command."""
    flags.group("What to train")
    flags.config(default="demo")
    flags.path("workdir", "runs/demo", "Folder of the run; created, or resumed from.")
    flags.group("What to benchmark")
    flags.comma_list("exit_layers", "", "Exit layers to draft with; empty means the one of the configuration.")
    flags.comma_list("num_speculations", "1,2,3", "Drafted tokens per round.")


def main(arguments: Arguments) -> int:
    """Runs the command. Returns 128 plus the number of the signal that interrupted training, as shells do."""
    from lsjax.experiments.demo import DemoSettings, run_demo

    settings = DemoSettings(arguments.integers("exit_layers"), arguments.integers("num_speculations"))
    result = run_demo(arguments.read_config(), arguments.workdir, settings)
    return 128 + result if isinstance(result, int) else 0
