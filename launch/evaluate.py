"""Runs `lsjax evaluate` from a checkout; lsjax/cli/evaluate.py is the command."""

from lsjax.cli.main import launch

if __name__ == "__main__":
    launch("evaluate")
