"""Runs `lsjax explain` from a checkout; lsjax/cli/explain.py is the command."""

from lsjax.cli.main import launch

if __name__ == "__main__":
    launch("explain")
