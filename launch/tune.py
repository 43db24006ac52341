"""Runs `lsjax tune` from a checkout; lsjax/cli/tune.py is the command."""

from lsjax.cli.main import launch

if __name__ == "__main__":
    launch("tune")
