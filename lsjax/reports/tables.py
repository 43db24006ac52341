"""Tables and lines that a person reads on a terminal."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lsjax.evaluation.exits import ExitProfile

_WIDTH_FOR_ALL_COLUMNS = 120
_UNLIMITED_WIDTH = 1000
_REPETITIVE = 0.2  # above this share of repeated 4-grams, a speed says little about ordinary text
_FAR_SLOWER = 0.8  # below this speed-up, a setting gets a hint
_FEW_ACCEPTED = 0.5


def comparison_table(profiles: dict[str, ExitProfile]) -> Table:
    """Returns loss and agreement of several models on the same held-out text, one row per exit layer.

    Each model is compared with its own last layer.
    """
    table = Table(title="Held-out text, exit by exit", title_justify="left")
    table.add_column("exit layer", justify="right")
    for column in ("loss", "agreement"):
        for name in profiles:
            table.add_column(f"{column} {name}", justify="right")
    for layer in next(iter(profiles.values())).exit_layers:
        entries = [profile.at(layer) for profile in profiles.values()]
        table.add_row(str(layer), *(f"{loss:.2f}" for loss, *_ in entries), *(f"{agree:.1%}" for *_, agree in entries))
    return table


def text_table(title: str, prompt: str, texts: dict[str, str], most: int = 400) -> Table:
    """Returns continuations of one prompt side by side, under the end of the prompt. most: characters of it to show."""
    table = Table(title=f"{title}, continuing ...{prompt[-80:].rsplit(chr(10), 1)[-1]!r}", title_justify="left")
    for name in texts:
        table.add_column(name, ratio=1)
    table.add_row(*(Text(text[:most]) for text in texts.values()))
    return table


class _Column(NamedTuple):
    """A column of the decoding table.

    folded: the header on two lines, for tables that must be narrow. width: of the column, in such tables.
    narrow: whether the column is also in the table for terminals of 80 characters.
    """

    header: str
    folded: str
    width: int
    narrow: bool
    cell: Callable[[dict[str, Any]], str]


def _number(key: str, spec: str = "") -> Callable[[dict[str, Any]], str]:
    return lambda run: _text(run.get(key), spec)


_COLUMNS = (
    _Column("strategy", "strategy", 17, True, lambda run: _strategy(run)),
    _Column("exit", "exit", 4, True, _number("exit_layer")),
    _Column("drafts", "drafts", 6, True, lambda run: _drafts(run)),
    _Column("tokens/s", "tokens/s", 8, True, _number("tokens_per_second", ".0f")),
    _Column("ms/token", "ms/token", 8, False, _number("ms_per_token", ".2f")),
    _Column("first token ms", "first\ntoken ms", 8, False, _number("time_to_first_token_ms", ".1f")),
    _Column("accepted", "accepted", 8, True, _number("acceptance_rate", ".0%")),
    _Column("tokens/round", "tokens/\nround", 7, False, _number("tokens_per_round", ".2f")),
    _Column("speed-up", "speed-up", 8, True, _number("speedup", ".2f")),
    _Column("predicted", "predicted", 9, True, _number("predicted_speedup", ".2f")),
    _Column("same tokens", "same\ntokens", 6, True, lambda run: _same_tokens(run)),
    _Column("repeated", "repeated", 8, True, _number("repetition", ".0%")),
)


def decoding_table(report: dict[str, Any], width: int | None = None) -> Table:
    """Returns a decoding report as a table, one row per run.

    width: characters that the table may take; None means no limit. From 120 on it has all columns. Below, it has those
    that fit into 80: timings of the single pass are left out, and the accepted share where speed-ups are predicted.
    """
    predicted = any(run.get("predicted_speedup") is not None for run in report["runs"])
    columns = [column for column in _COLUMNS if predicted or column.header != "predicted"]
    table = _decoding_table(report, columns, folded=False)
    if width is None or _natural_width(table) <= width:
        return table
    if width < _WIDTH_FOR_ALL_COLUMNS:
        columns = [column for column in columns if column.narrow and not (predicted and column.header == "accepted")]
    return _decoding_table(report, columns, folded=True)


def _decoding_table(report: dict[str, Any], columns: Sequence[_Column], folded: bool) -> Table:
    cache = ", KV cache in int8" if report.get("cache") == "int8" else ""
    title = f"Decoding on {report['device']}, batch size {report['runs'][0]['batch_size']}"
    table = Table(
        title=f"{title}, weights in {report['weights']}{cache}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 0, 0, 1),
    )
    for column in columns:
        table.add_column(
            column.folded if folded else column.header,
            justify="left" if column.header == "strategy" else "right",
            width=column.width if folded else None,
        )
    for run in report["runs"]:
        table.add_row(*(column.cell(run) for column in columns))
    return table


def _strategy(run: dict[str, Any]) -> str:
    vocabulary = run.get("draft_vocabulary")
    drafted_from = "" if vocabulary is None else f", drafts of {vocabulary} ids"
    return run["strategy"] + (", int8 drafts" if run["draft_weights"] else "") + drafted_from


def _drafts(run: dict[str, Any]) -> str:
    return _text(run["num_speculations"]) + (f" or {run['lookup']} copied" if run["lookup"] else "")


def _same_tokens(run: dict[str, Any]) -> str:
    """Returns whether the tokens are autoregressive's; if not, the share of them before the first difference."""
    if run["matches_autoregressive"] is None:
        return "-"
    # Rounded down, because 100 % would read as all of them.
    return "yes" if run["matches_autoregressive"] else f"{math.floor(100 * run['matching_share'])}%"


def decoding_notes(report: dict[str, Any]) -> list[str]:
    """Returns the lines under a decoding table: how not to read its speeds, and a setting that does not pay."""
    notes = []
    repetitive = max(report["runs"], key=lambda run: run.get("repetition") or 0.0)
    if (repetitive.get("repetition") or 0.0) > _REPETITIVE:
        notes.append(
            f"text repeats itself: up to {repetitive['repetition']:.0%} of the 4-grams of a new text occurred before "
            f"in it ({repetitive['strategy']}); do not take this speed for ordinary text"
        )
    drafting = [run for run in report["runs"] if run["strategy"] == "self_speculative" and run["speedup"]]
    slowest = min(drafting, key=lambda run: run["speedup"], default=None)
    if slowest and slowest["speedup"] < _FAR_SLOWER:
        notes.append(_slow_hint(slowest))
    return notes


def _slow_hint(run: dict[str, Any]) -> str:
    """Returns one line that says why a setting is slower than autoregressive decoding, and what to try."""
    accepted = run["acceptance_rate"]
    if accepted is not None and accepted < _FEW_ACCEPTED:
        reason = f"only {accepted:.0%} of its drafts are accepted, so try fewer drafts or a later exit layer"
    else:
        reason = "drafting costs more than it saves, so try an earlier exit layer or fewer drafts"
    return (
        f"self_speculative with exit layer {run['exit_layer']} and {_drafts(run)} drafts runs at {run['speedup']:.2f} "
        f"times the speed of autoregressive: {reason} (auto for both finds the fastest)"
    )


def print_decoding_report(report: dict[str, Any]) -> None:
    """Prints the decoding table, in a form that fits the terminal, and the notes under it."""
    console = Console()
    print_table(decoding_table(report, console.width if console.is_terminal else None))
    for note in decoding_notes(report):
        print(note)
    if "baseline" in report:
        print(f"compared with {report['baseline']}")


def bandwidth_line(report: dict[str, Any]) -> str:
    """Returns a line on what bounds autoregressive decoding: how near it comes to a plain read of the weights."""
    b = report["bandwidth"]
    if b["autoregressive_share"] is None:
        return "every text ended with its first token, so there is no speed to compare"
    return (
        f"an autoregressive pass reads {b['autoregressive_bytes_per_pass'] / 1e6:.0f} MB at "
        f"{b['autoregressive_gigabytes_per_second']:.1f} GB/s, {b['autoregressive_share']:.0%} of what adding up all "
        f"weights reaches ({b['plain_read_gigabytes_per_second']:.1f} GB/s)"
    )


def kernel_table(report: dict[str, Any]) -> Table:
    """Returns a kernel report as a table, one row per implementation; times only where they were measured."""
    title = (
        f"KV cache on {report['device']}" if report["measured"] else f"KV cache, bytes and bounds of {report['chip']}"
    )
    table = Table(title=title, title_justify="left")
    measured = ("µs", "GB/s", "of peak", "difference") if report["measured"] else ()
    for name in ("", "by", "batch", "tokens", "length", "MB", "µs at peak", *measured):
        table.add_column(name, justify="left" if name in ("", "by") else "right")
    for run in report["runs"]:
        times = (
            _text(run["microseconds"], ".1f"),
            _text(run["gigabytes_per_second"], ".0f"),
            _text(run["share_of_peak"], ".0%"),
            _text(run["largest_difference"], ".1e"),
        )
        table.add_row(
            *(str(run[key]) for key in ("operation", "by", "batch_size", "tokens", "length")),
            f"{run['bytes'] / 1e6:.3f}",
            _text(run["roofline_microseconds"], ".2f"),
            *(times if report["measured"] else ()),
        )
    return table


def training_table(report: dict[str, Any]) -> Table:
    """Returns a training report as a table, one row per run."""
    last_step = report["warmup"] + report["steps"]
    table = Table(title=f"A training step on {report['device']}", title_justify="left")
    for name in ("", "ms/step", "tokens/s", "time over ours", "memory", "loss of step 1", f"of step {last_step}"):
        table.add_column(name, justify="right" if name else "left")
    for run in report["runs"]:
        figures = f"{run['ms_per_step']:.1f}", f"{run['tokens_per_second']:.0f}", f"{run['times_ours']:.2f}"
        memory = "" if run["memory"] is None else f"{run['memory'] / 1e9:.2f} GB"
        table.add_row(run["name"], *figures, memory, f"{run['losses'][0]:.5f}", f"{run['losses'][-1]:.5f}")
    return table


def print_table(table: Table) -> None:
    """Prints a table: on a terminal fitted to its width, in a file as wide as its content, so that rows stay whole."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_natural_width(table))
    console.print(table)


def _natural_width(table: Table) -> int:
    """Returns the width at which no cell of the table is wrapped."""
    return Console(width=_UNLIMITED_WIDTH).measure(table).maximum


def _text(value: Any, spec: str = "") -> str:
    return "-" if value is None else format(value, spec)
