"""Runs `lsjax generate` from a checkout; lsjax/cli/generate.py is the command."""

from lsjax.cli.main import launch

if __name__ == "__main__":
    launch("generate")
