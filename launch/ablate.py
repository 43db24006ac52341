"""Runs `lsjax ablate` from a checkout; lsjax/cli/ablate.py is the command."""

from lsjax.cli.main import launch

if __name__ == "__main__":
    launch("ablate")
