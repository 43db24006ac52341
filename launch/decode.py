"""Runs `lsjax decode` from a checkout; lsjax/cli/decode.py is the command."""

from lsjax.cli.main import launch

if __name__ == "__main__":
    launch("decode")
