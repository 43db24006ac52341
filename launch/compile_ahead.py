"""Runs `lsjax compile_ahead` from a checkout; lsjax/cli/compile_ahead.py is the command."""

from lsjax.cli.main import launch

if __name__ == "__main__":
    launch("compile_ahead")
