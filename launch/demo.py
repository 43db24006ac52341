"""Runs `lsjax demo` from a checkout; lsjax/cli/demo.py is the command."""

from lsjax.cli.main import launch

if __name__ == "__main__":
    launch("demo")
