"""Tables a person reads on a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

from lsjax.evaluation.exits import ExitProfile


def exit_table(profile: ExitProfile) -> Table:
    """Held-out loss, accuracy and agreement with the last layer, a row an exit layer."""
    table = Table(title="Held-out text, exit by exit", title_justify="left")
    for name in ("exit layer", "loss (nats/token)", "next token right", "agrees with last layer"):
        table.add_column(name, justify="right")
    for layer, loss, accuracy, agreement in zip(*profile, strict=True):
        table.add_row(str(layer), f"{loss:.3f}", f"{accuracy:.1%}", f"{agreement:.1%}")
    return table


def comparison_table(profiles: dict[str, ExitProfile]) -> Table:
    """Several models on the same held-out text, exit by exit: loss, and agreement with each one's own last layer."""
    table = Table(title="Held-out text, exit by exit", title_justify="left")
    table.add_column("exit layer", justify="right")
    for column in ("loss", "agreement"):
        for name in profiles:
            table.add_column(f"{column} {name}", justify="right")
    for layer in next(iter(profiles.values())).exit_layers:
        entries = [profile.at(layer) for profile in profiles.values()]
        table.add_row(str(layer), *(f"{loss:.2f}" for loss, *_ in entries), *(f"{agree:.1%}" for *_, agree in entries))
    return table


def decoding_table(report: dict[str, Any]) -> Table:
    """A row a run of a decoding report. Where a speed-up was predicted, it stands beside the one that came out."""
    predicted = any(run.get("predicted_speedup") is not None for run in report["runs"])
    held = f"weights in {report['weights']}" + (", KV cache in int8" if report.get("cache") == "int8" else "")
    table = Table(title=f"Decoding on {report['device']}, {held}", title_justify="left")
    for name in ("strategy", "exit", "drafts", "batch", "tokens/s", "ms/token", "first token ms", "accepted"):
        table.add_column(name, justify="left" if name == "strategy" else "right")
    for name in ("tokens/round", "speed-up", *(["predicted"] if predicted else []), "same tokens"):
        table.add_column(name, justify="right")
    for run in report["runs"]:
        table.add_row(
            run["strategy"] + (", int8 drafts" if run["draft_weights"] else ""),
            _text(run["exit_layer"]),
            _drafts(run),
            _text(run["batch_size"]),
            _text(run["tokens_per_second"], ".0f"),
            _text(run["ms_per_token"], ".2f"),
            _text(run["time_to_first_token_ms"], ".1f"),
            _text(run["acceptance_rate"], ".0%"),
            _text(run["tokens_per_round"], ".2f"),
            _text(run["speedup"], ".2f"),
            *([_text(run["predicted_speedup"], ".2f")] if predicted else []),
            {True: "yes", False: "no", None: "-"}[run["matches_autoregressive"]],
        )
    return table


def _drafts(run: dict[str, Any]) -> str:
    return _text(run["num_speculations"]) + (f" or {run['lookup']} copied" if run["lookup"] else "")


def bandwidth_line(report: dict[str, Any]) -> str:
    """What bounds autoregressive decoding: reading the weights, and how near to a plain read of them it comes."""
    b = report["bandwidth"]
    if b["autoregressive_share"] is None:
        return "every text ended with its first token: there is no speed to compare"
    return (
        f"an autoregressive pass reads {b['autoregressive_bytes_per_pass'] / 1e6:.0f} MB at "
        f"{b['autoregressive_gigabytes_per_second']:.1f} GB/s, {b['autoregressive_share']:.0%} of what adding up all "
        f"weights reaches ({b['plain_read_gigabytes_per_second']:.1f} GB/s)"
    )


def kernel_table(report: dict[str, Any]) -> Table:
    """A row a way to write to the KV cache or to attend to it; times only where they were measured."""
    title = (
        f"KV cache on {report['device']}" if report["measured"] else f"KV cache, bytes and bounds of {report['chip']}"
    )
    table = Table(title=title, title_justify="left")
    measured = ("µs", "GB/s", "of peak", "difference") if report["measured"] else ()
    for name in ("", "by", "rows", "tokens", "length", "MB", "µs at peak", *measured):
        table.add_column(name, justify="left" if name in ("", "by") else "right")
    for run in report["runs"]:
        times = (
            _text(run["microseconds"], ".1f"),
            _text(run["gigabytes_per_second"], ".0f"),
            _text(run["share_of_peak"], ".0%"),
            _text(run["largest_difference"], ".1e"),
        )
        table.add_row(
            *(str(run[key]) for key in ("operation", "by", "rows", "tokens", "length")),
            f"{run['bytes'] / 1e6:.3f}",
            _text(run["roofline_microseconds"], ".2f"),
            *(times if report["measured"] else ()),
        )
    return table


def training_table(report: dict[str, Any]) -> Table:
    """A row a run of a training benchmark."""
    table = Table(title=f"A training step on {report['device']}", title_justify="left")
    for name in ("", "ms/step", "tokens/s", "time over ours", "loss of step 1", f"of step {_steps(report)}"):
        table.add_column(name, justify="right" if name else "left")
    for run in report["runs"]:
        figures = f"{run['ms_per_step']:.1f}", f"{run['tokens_per_second']:.0f}", f"{run['times_ours']:.2f}"
        table.add_row(run["name"], *figures, f"{run['losses'][0]:.5f}", f"{run['losses'][-1]:.5f}")
    return table


def _steps(report: dict[str, Any]) -> int:
    return report["warmup"] + report["steps"]


def print_table(table: Table) -> None:
    """On a terminal, fitted to it; in a file, as wide as its content, so that rows stay whole."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=1000)
        console = Console(highlight=False, width=console.measure(table).maximum)
    console.print(table)


def _text(value: Any, spec: str = "") -> str:
    return "-" if value is None else format(value, spec)
