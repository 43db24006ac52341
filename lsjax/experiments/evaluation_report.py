"""The report of an evaluation and its file, which further tasks and strategies join."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lsjax.errors import UserError
from lsjax.files import read_json, write_atomically

_FORMAT = "lsjax evaluation 2"
_WITHOUT_TURNS = "lsjax evaluation 1"  # its rows were timed one after another
_SECONDS_BETWEEN_WRITES = 10.0


class Report:
    """The report of an evaluation, in memory and in its file.

    content: "format", "settings" that all rows share, "rows", one per task and strategy, and "unfinished": what is
      measured of rows that are not complete, as rows without figures.
    path: of the file; None keeps the report in memory alone.
    """

    def __init__(self, content: dict[str, Any], path: Path | None):
        self.content, self.path = content, path
        self._written = time.monotonic()

    def find(self, task: str, strategy: str) -> dict[str, Any] | None:
        """Returns the complete row of a task and a strategy, both by name, or None."""
        return _find(self.content["rows"], task, strategy)

    def find_unfinished(self, task: str, strategy: str) -> dict[str, Any] | None:
        """Returns what is measured of a row that is not complete, or None."""
        return _find(self.content["unfinished"], task, strategy)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Adds complete rows, in place of the unfinished ones, and writes the file."""
        self.content["rows"] += rows
        self._replace_unfinished(rows, [])
        self._write()

    def keep_unfinished(self, rows: Sequence[dict[str, Any]]) -> None:
        """Keeps rows that are not complete in place of earlier ones, and writes the file every ten seconds."""
        self._replace_unfinished(rows, rows)
        if time.monotonic() - self._written >= _SECONDS_BETWEEN_WRITES:
            self._write()

    def check_same_examples(self, task: str, fingerprint: str) -> None:
        """Raises UserError when the report has rows of a task with examples of another fingerprint."""
        rows = [*self.content["rows"], *self.content["unfinished"]]
        if any(row["task"] == task and row["sha256"] != fingerprint for row in rows):
            raise UserError(
                f"--report {self.path} holds {task} with other examples: its files have changed; give another file"
            )

    def _replace_unfinished(self, old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> None:
        others = [row for row in self.content["unfinished"] if not _find(old, row["task"], row["strategy"])]
        self.content["unfinished"] = [*others, *new]

    def _write(self) -> None:
        if self.path:
            write_atomically(self.path, json.dumps(self.content, indent=1))
            self._written = time.monotonic()


def open_report(path: Path | None, settings: dict[str, Any]) -> Report:
    """Returns the report at `path`, or a new one. Raises UserError for one of other settings or another kind."""
    if path is None or not path.exists():
        return Report({"format": _FORMAT, "settings": settings, "rows": [], "unfinished": []}, path)
    content = read_json(path)
    if content.get("format") == _WITHOUT_TURNS:
        raise UserError(
            f"--report {path} is of an earlier version, which timed the strategies one after another: give another file"
        )
    if content.get("format") != _FORMAT or not _is_whole(content):
        raise UserError(f"--report {path} is no report of lsjax evaluate: give another file")
    for key, value in settings.items():
        old = content["settings"].get(key)
        if old != value:
            raise UserError(
                f"--report {path} holds an evaluation with {key} {old!r}, and this one has {value!r}: use the same "
                "settings, or another file"
            )
    return Report(content, path)


def _find(rows: Sequence[dict[str, Any]], task: str, strategy: str) -> dict[str, Any] | None:
    return next((row for row in rows if (row["task"], row["strategy"]) == (task, strategy)), None)


def _is_whole(content: dict[str, Any]) -> bool:
    rows, unfinished = content.get("rows"), content.get("unfinished")
    if not isinstance(content.get("settings"), dict) or not isinstance(rows, list) or not isinstance(unfinished, list):
        return False
    return all(map(_is_row, [*rows, *unfinished]))


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("task", "strategy", "sha256"))
