"""Runs `lsjax demo_pretrained` from a checkout; lsjax/cli/demo_pretrained.py is the command."""

from lsjax.cli.main import launch

if __name__ == "__main__":
    launch("demo_pretrained")
