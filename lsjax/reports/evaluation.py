"""The table of `lsjax evaluate`, in the shape of the paper's Table 3."""

from typing import Any

from rich import box
from rich.table import Table

_SHARES = ("exact_match", "contains", "pass@1")


def evaluation_table(report: dict[str, Any]) -> Table:
    """Returns a row per task and strategy: the task's figure, acceptance, speed, speed-up and share of equal texts.

    Brackets hold 95 % confidence intervals over the examples.
    """
    settings = report["settings"]
    title = f"{settings['model']} on {settings['device']}, batch size {settings['batch_size']}, weights in "
    table = Table(
        title=f"{title}{settings['weights']}; [low, high]: 95 % over examples".replace("[", r"\["),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in ("task", "strategy", "n", "metric", "score", "accepted", "tokens/s", "speed-up", "same text"):
        table.add_column(name, justify="left" if name in ("task", "strategy", "metric") else "right")
    previous = None
    for row in sorted(report["rows"], key=lambda row: _first_place(report, row["task"])):
        if previous not in (None, row["task"]):
            table.add_section()
        metric, estimate = next(iter(row["metrics"].items()))
        table.add_row(
            row["task"] if row["task"] != previous else "",
            _strategy(row),
            str(row["examples"]),
            metric,
            _interval(estimate, ".1%" if metric in _SHARES else ".3f"),
            _interval(row["acceptance_rate"], ".0%"),
            _interval(row["tokens_per_second"], ".1f"),
            _interval(row["speedup"], ".2f"),
            _interval(row["same_texts"], ".0%"),
        )
        previous = row["task"]
    return table


def _first_place(report: dict[str, Any], task: str) -> int:
    return next(place for place, row in enumerate(report["rows"]) if row["task"] == task)


def _strategy(row: dict[str, Any]) -> str:
    """Returns a strategy as --strategies names it; for "auto", also what it chose."""
    return f"auto ({chosen_strategy(row)})" if row["strategy"] == "auto" else row["strategy"]


def chosen_strategy(row: dict[str, Any]) -> str:
    """Returns the strategy that decoded a row, as --strategies names it, with numbers in place of "auto"."""
    parts = [row["decoded_by"], row["exit_layer"], row["num_speculations"]]
    parts += [row.get("draft_vocabulary"), row.get("draft_weights")]
    return ":".join(str(part) for part in parts if part is not None)


def _interval(estimate: dict[str, float] | None, spec: str) -> str:
    if estimate is None:
        return "-"
    value, low, high = (format(estimate[key], spec) for key in ("value", "low", "high"))
    return value if low == value == high else rf"{value} \[{low}, {high}]"
