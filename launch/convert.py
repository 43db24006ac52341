"""Runs `lsjax convert` from a checkout; lsjax/cli/convert.py is the command."""

from lsjax.cli.main import launch

if __name__ == "__main__":
    launch("convert")
