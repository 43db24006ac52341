"""Trains a small LayerSkip Llama on real text and benchmarks its decoding, on any machine.

  python launch/demo.py --config=configs/demo.py --workdir=runs/demo

Prints the held-out loss of every exit and the speed of every setting; leaves demo.png and report.json in the
workdir. Run again, it reuses the trained model.
"""

from absl import flags
from ml_collections import config_flags

from lsjax import commands

CONFIG = config_flags.DEFINE_config_file("config", "configs/demo.py", "Configuration file.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Folder of the run; created, or resumed from.")
EXIT_LAYERS = flags.DEFINE_list("exit_layers", "1,2,3", "Exit layers to benchmark.")
NUM_SPECULATIONS = flags.DEFINE_list("num_speculations", "1,2,3,4,6", "Drafted tokens a round to benchmark.")


def main() -> None:
    from lsjax.demo import Grid, run_demo

    config = commands.read_config(CONFIG)
    run_demo(config, WORKDIR.value, Grid(commands.integers(EXIT_LAYERS), commands.integers(NUM_SPECULATIONS)))


if __name__ == "__main__":
    commands.run(main)
