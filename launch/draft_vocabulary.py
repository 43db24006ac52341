"""Runs `lsjax draft_vocabulary` from a checkout; lsjax/cli/draft_vocabulary.py is the command."""

from lsjax.cli.main import launch

if __name__ == "__main__":
    launch("draft_vocabulary")
