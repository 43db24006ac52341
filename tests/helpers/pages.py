"""The pages of the documentation."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def text_of(page: Path) -> str:
    """Returns the text of a page."""
    return page.read_text(encoding="utf-8")


def keys_of(tree: dict, prefix: str = "") -> set[str]:
    """Returns the dotted names of all leaves of a tree of sections."""
    found = set()
    for key, value in tree.items():
        found |= keys_of(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key}
    return found
