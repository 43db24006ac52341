"""The fastest training step that fits: a walk over batch size and rematerialisation, by compiling each."""

import dataclasses
from collections.abc import Callable
from typing import Any

from lsjax.config import Config
from lsjax.model.rematerialize import KEPT
from lsjax.scale.ahead import compile_ahead, train_mesh, train_program
from lsjax.scale.hardware import GIB, Topology
from lsjax.scale.report import describe, largest


def search(config: Config, topology: Topology, note: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """The report of the best setting; its keys under `setting`, every trial under `trials`, and under `why_not_more`
    what stopped the batch from growing. The batch doubles, from one sequence a device (and accumulation step), until it
    does not fit or gains less than 1 %. Best is most tokens a second with nothing overlapped: "all at once" would call
    many settings equal. When nothing fits, the report is that of the smallest try.
    """
    rounds = [_grow(config, topology, recomputed, note) for recomputed in KEPT]
    trials = [_line(report) for round_ in rounds for report in round_]
    fitting = [(report, round_) for round_ in rounds for report in round_ if report["fits"]]
    if not fitting:
        smallest = min((round_[0] for round_ in rounds), key=lambda report: report["memory"]["total"])
        return smallest | {"trials": trials, "why_not_more": "nothing fits"}
    best, its_round = max(fitting, key=lambda pair: _speed(pair[0]))
    last = its_round[-1]
    why = "a larger batch gains less than 1 %" if last["fits"] else _line(last)
    return best | {"trials": trials, "why_not_more": why}


def _grow(config: Config, topology: Topology, recomputed: str, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """Reports of growing batches; only the last may not fit."""
    mesh, reports = train_mesh(config, topology), []
    size = mesh.shape["data"] * mesh.shape["fsdp"] * config.training.gradient_accumulation
    if config.layerskip.dropout_granularity == "subset":
        size *= config.layerskip.dropout_groups
    while not reports or reports[-1]["fits"]:
        reports.append(_try(config, topology, recomputed, size))
        note(_line(reports[-1]))
        if reports[-1]["fits"] and len(reports) > 1 and _speed(reports[-1]) < 1.01 * _speed(reports[-2]):
            break
        size *= 2
    return reports


def _try(config: Config, topology: Topology, recomputed: str, size: int) -> dict[str, Any]:
    training = dataclasses.replace(config.training, rematerialize=recomputed, batch_size=size)
    tried = dataclasses.replace(config, training=training)
    program = train_program(tried, topology)
    setting = {"config.training.rematerialize": recomputed, "config.training.batch_size": size}
    return describe(tried, topology, program, compile_ahead(program)) | {"setting": setting}


def _speed(report: dict[str, Any]) -> float:
    return report["roofline"]["mfu_bound_causal_without_overlap"]


def _line(report: dict[str, Any]) -> str:
    """One trial, for the log."""
    m, setting = report["memory"], " ".join(f"--{key}={value}" for key, value in report["setting"].items())
    if not report["fits"]:
        return f"{setting}: does not fit, {m['total'] / GIB:.1f} of {m['available'] / GIB:.1f} GiB ({largest(m)})"
    r = report["roofline"]
    return (
        f"{setting}: fits, {m['total'] / GIB:.1f} of {m['available'] / GIB:.1f} GiB; MFU bound "
        f"{r['mfu_bound_causal']:.1%}, with nothing overlapped {r['mfu_bound_causal_without_overlap']:.1%}"
    )
