"""Runs `lsjax train` from a checkout; lsjax/cli/train.py is the command."""

from lsjax.cli.main import launch

if __name__ == "__main__":
    launch("train")
