"""Runs `lsjax prepare` from a checkout; lsjax/cli/prepare.py is the command."""

from lsjax.cli.main import launch

if __name__ == "__main__":
    launch("prepare")
