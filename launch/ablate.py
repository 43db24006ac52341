"""Trains a grid of LayerSkip recipes from the same seeds, and shows what each costs and gives.

  python launch/ablate.py --config=configs/ablate.py --workdir=runs/ablate
  python launch/ablate.py --config=configs/ablate.py --workdir=runs/ablate --recipes=paper,focused --seeds=0,1,2

Every run is a training workdir of its own, WORKDIR/RECIPE/seedN, and resumes; what is finished is not run again, and
more recipes or seeds may be added later. Prints one table (the last layer against no LayerSkip at equal steps and at
equal time, early exits, acceptance, tokens a round, speed-up) and leaves ablation.png. The recipes, with their
sources, are in lsjax/ablation/recipes.py.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from lsjax import commands

CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/ablate.py", "Configuration file; each recipe sets config.layerskip itself.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", "runs/ablate", "Folder of all runs; created, or gone on with.")
RECIPES = flags.DEFINE_list("recipes", [], "Names of recipes beside the baseline, none (default: all of them).")
SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds of parameters, text order and masks, the same for every recipe.")


def main() -> None:
    from lsjax.ablation.ablate import ablate

    config = commands.read_config(CONFIG)
    ablate(config, Path(WORKDIR.value), RECIPES.value, commands.integers(SEEDS))


if __name__ == "__main__":
    commands.run(main)
