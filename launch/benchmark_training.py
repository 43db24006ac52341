"""Runs `lsjax benchmark_training` from a checkout; lsjax/cli/benchmark_training.py is the command."""

from lsjax.cli.main import launch

if __name__ == "__main__":
    launch("benchmark_training")
