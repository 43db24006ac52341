"""Trains a grid of LayerSkip recipes from the same seeds, and shows what each costs and gives.

  lsjax ablate --config=ablate --workdir=runs/ablate
  lsjax ablate --config=ablate --workdir=runs/ablate \\
    --recipes=paper,focused --seeds=0,1,2

Every run is a training workdir of its own, WORKDIR/RECIPE/seedN, and resumes. A finished run is not run again, and more
recipes or seeds may be added later. Prints one table (the last layer against no LayerSkip at equal steps and at equal
time, early exits, acceptance, tokens per round, speed-up) and leaves ablation.png. The recipes, with their sources, are
in lsjax/experiments/ablation/recipes.py.
"""

from lsjax.cli.flags import Arguments, CommandFlags


def define_flags(flags: CommandFlags) -> None:
    """Defines the flags of this command."""
    flags.group("What to train")
    flags.config()
    flags.path("workdir", None, "Folder of all runs; created, or resumed from.", required=True)
    flags.comma_list("recipes", "", "Names of recipes beside the baseline, none (default: all recipes).")
    flags.comma_list("seeds", "0", "Seeds of parameters, text order and masks, the same for every recipe.")


def main(arguments: Arguments) -> int:
    """Runs the command. Returns 128 plus the number of the signal that interrupted training, as shells do."""
    from lsjax.experiments.ablation.ablate import ablate

    seeds = arguments.integers("seeds")
    interrupted = ablate(arguments.read_config(), arguments.workdir, arguments.recipes, seeds)
    return 128 + interrupted if interrupted else 0
