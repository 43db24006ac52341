"""Runs `python -m lsjax`, which is the program `lsjax`."""

import sys

from lsjax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
