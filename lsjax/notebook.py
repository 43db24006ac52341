"""Tables and a progress bar for notebooks, in HTML."""

import html
from collections.abc import Sequence
from typing import Any


def html_table(header: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> str:
    """Returns an HTML table. Cells are escaped; floats have four significant digits."""

    def cells(tag: str, values: Sequence[Any]) -> str:
        return "".join(f"<{tag} style='text-align:left'>{html.escape(_text(value))}</{tag}>" for value in values)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{cells('th', header)}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class NotebookCell:
    """A progress bar and one line in the output of a notebook cell."""

    def __init__(self) -> None:
        from IPython.display import display  # present wherever a notebook runs

        self._handle: Any = display({"text/plain": ""}, raw=True, display_id=True)

    def show(self, share: float, line: str) -> None:
        """Shows a bar filled to `share` (0 to 1) beside a line of text."""
        bar = f'<progress value="{share:.4f}" max="1"></progress> <code>{html.escape(line)}</code>'
        self._handle.update({"text/html": bar, "text/plain": line}, raw=True)
