"""Searches for the fastest training step that fits: compiles one step per batch size and rematerialisation."""

import dataclasses
from collections.abc import Callable
from typing import Any

from lsjax.aot.programs import compile_ahead, train_mesh, train_program
from lsjax.aot.report import describe, largest
from lsjax.config import Config
from lsjax.costs.hardware import GIB, Topology
from lsjax.model.rematerialize import KEPT


def search(config: Config, topology: Topology, note: Callable[[str], None]) -> dict[str, Any]:
    """Returns the report of the fastest setting that fits, or of the smallest trial when nothing fits.

    For each way of rematerialising, the batch starts at one sequence per device and accumulation step, and doubles
    until it does not fit or gains less than 1 %. The fastest setting has the most tokens per second with nothing
    overlapped: with everything overlapped many settings would be equal.

    note: called with one line per trial. The report gains the keys `setting` (the configuration keys), `trials` (a
    line per trial) and `why_not_more` (what stopped the batch from growing).
    """
    series = [_grow(config, topology, recomputed, note) for recomputed in KEPT]
    trials = [_line(report) for reports in series for report in reports]
    fitting = [(report, reports[-1]) for reports in series for report in reports if report["fits"]]
    if not fitting:
        smallest = min((reports[0] for reports in series), key=lambda report: report["memory"]["total"])
        return smallest | {"trials": trials, "why_not_more": "nothing fits"}
    best, largest_batch = max(fitting, key=lambda pair: _speed(pair[0]))
    why = "a larger batch gains less than 1 %" if largest_batch["fits"] else _line(largest_batch)
    return best | {"trials": trials, "why_not_more": why}


def _grow(config: Config, topology: Topology, recomputed: str, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """Returns the reports of growing batches for one way of rematerialising; only the last one may not fit."""
    mesh = train_mesh(config, topology)
    reports: list[dict[str, Any]] = []
    size = mesh.shape["data"] * mesh.shape["fsdp"] * config.training.gradient_accumulation
    if config.layerskip.dropout_granularity == "subset":
        size *= config.layerskip.dropout_groups
    while not reports or reports[-1]["fits"]:
        reports.append(_try_batch(config, topology, recomputed, size))
        note(_line(reports[-1]))
        if reports[-1]["fits"] and len(reports) > 1 and _speed(reports[-1]) < 1.01 * _speed(reports[-2]):
            break
        size *= 2
    return reports


def _try_batch(config: Config, topology: Topology, recomputed: str, batch_size: int) -> dict[str, Any]:
    training = dataclasses.replace(config.training, rematerialize=recomputed, batch_size=batch_size)
    tried = dataclasses.replace(config, training=training)
    program = train_program(tried, topology)
    setting = {"config.training.rematerialize": recomputed, "config.training.batch_size": batch_size}
    return describe(tried, topology, program, compile_ahead(program)) | {"setting": setting}


def _speed(report: dict[str, Any]) -> float:
    return report["roofline"]["mfu_bound_causal_without_overlap"]


def _line(report: dict[str, Any]) -> str:
    """Returns one line for the log about a trial."""
    m, setting = report["memory"], " ".join(f"--{key}={value}" for key, value in report["setting"].items())
    if not report["fits"]:
        return f"{setting}: does not fit, {m['total'] / GIB:.1f} of {m['available'] / GIB:.1f} GiB ({largest(m)})"
    r = report["roofline"]
    return (
        f"{setting}: fits, {m['total'] / GIB:.1f} of {m['available'] / GIB:.1f} GiB; MFU bound "
        f"{r['mfu_bound_causal']:.1%}, with nothing overlapped {r['mfu_bound_causal_without_overlap']:.1%}"
    )
