"""What a run writes as it goes: metrics.jsonl and evaluations.jsonl (exact), TensorBoard events."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from lsjax.errors import UserError
from lsjax.evaluation.exits import ExitProfile
from lsjax.files import write_atomically
from lsjax.training.step import StepMetrics


def describe_step(step: int, metrics: StepMetrics, tokens_per_second: float) -> dict[str, Any]:
    """The JSON object of one finished step; `step` counts from 1. Losses are nats a token."""
    losses = active_exit_losses(metrics)
    return {
        "step": step,
        "loss": float(metrics.loss),
        "final_loss": losses[max(losses)],
        "exit_losses": {str(exit_layer): loss for exit_layer, loss in losses.items()},
        "gradient_norm": float(metrics.gradient_norm),
        "learning_rate": float(metrics.learning_rate),
        "layer_dropout_rate": float(metrics.layer_dropout_rate),
        "tokens_per_second": round(tokens_per_second, 1),
    }


def active_exit_losses(metrics: StepMetrics) -> dict[int, float]:
    """{exit_layer: loss} of the exits trained at this step; the last layer always is."""
    return {int(layer) + 1: float(metrics.exit_losses[layer]) for layer in np.flatnonzero(metrics.exit_active)}


def describe_evaluation(step: int, profile: ExitProfile) -> dict[str, Any]:
    """{step, loss: {exit_layer: nats a token}, accuracy: {...}, agreement: {...}} on held-out text."""
    by_exit = {
        name: {str(layer): float(value) for layer, value in zip(profile.exit_layers, values, strict=True)}
        for name, values in profile._asdict().items()
        if name != "exit_layers"
    }
    return {"step": step} | by_exit


class RunLog:
    """The log files of a workdir, first cut back to `last_step`, the step of the checkpoint the run resumes from."""

    def __init__(self, workdir: Path, last_step: int):
        self._metrics = _JsonLines(Path(workdir) / "metrics.jsonl", last_step)
        self._evaluations = _JsonLines(Path(workdir) / "evaluations.jsonl", last_step)
        self._events = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=last_step + 1, flush_secs=10)

    def write_step(self, record: dict[str, Any]) -> None:
        self._metrics.append(record)
        self._add_events(record, "training/")

    def write_evaluation(self, record: dict[str, Any]) -> None:
        self._evaluations.append(record)
        self._add_events(record, "held_out/")

    def _add_events(self, record: dict[str, Any], prefix: str) -> None:
        for name, value in _scalars(record, prefix):
            self._events.add_scalar(name, value, record["step"])

    def close(self) -> None:
        for part in (self._metrics, self._evaluations, self._events):
            part.close()


class NoLog:
    """Of every host but the leader."""

    def write_step(self, record: dict[str, Any]) -> None: ...

    def write_evaluation(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class _JsonLines:
    def __init__(self, path: Path, last_step: int):
        try:
            kept = [line for line in read_complete_lines(path) if json.loads(line)["step"] <= last_step]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} holds a line that is no record of a step; move the file away to resume") from None
        write_atomically(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def append(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_complete_lines(path: Path) -> list[str]:
    """A process killed while writing leaves half a line at the end: that one is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].splitlines()


def _scalars(record: dict[str, Any], prefix: str) -> list[tuple[str, float]]:
    flat = []
    for name, value in record.items():
        if isinstance(value, dict):
            flat += _scalars(value, f"{prefix}{name}/")
        elif name != "step":
            flat.append((prefix + name, value))
    return flat
