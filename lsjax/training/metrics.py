"""Log files of a run: metrics.jsonl, evaluations.jsonl, changes.jsonl and TensorBoard events."""

import contextlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lsjax.data.corpus import HELD_OUT
from lsjax.errors import UserError
from lsjax.evaluation.exits import ExitProfile
from lsjax.files import check_not_pointer, path_of, write_atomically
from lsjax.training.log_errors import named_errors
from lsjax.training.mirror import Mirror
from lsjax.training.step import StepMetrics

_METRICS, _EVALUATIONS, _CHANGES = "metrics.jsonl", "evaluations.jsonl", "changes.jsonl"


def describe_step(step: int, metrics: StepMetrics, tokens_per_second: float) -> dict[str, Any]:
    """Returns the JSON object of one finished step. `step` counts from 1; losses are nats per token."""
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
    """Returns {exit_layer: loss} for the exits trained at this step, which always include the last layer."""
    return {int(layer) + 1: float(metrics.exit_losses[layer]) for layer in np.flatnonzero(metrics.exit_active)}


def describe_evaluation(step: int, profile: ExitProfile, name: str = HELD_OUT) -> dict[str, Any]:
    """Returns the JSON object of one evaluation on held-out text.

    name: the set of config.data.validation.

    Its keys are step, loss {exit_layer: nats per token}, accuracy {...} and agreement {...}, and set, the name, unless
    it is "held_out".
    """
    by_exit = {
        name: {str(layer): float(value) for layer, value in zip(profile.exit_layers, values, strict=True)}
        for name, values in profile._asdict().items()
        if name != "exit_layers"
    }
    return {"step": step} | ({} if name == HELD_OUT else {"set": name}) | by_exit


def _is_ours() -> None: ...


class RunLog:
    """The log files of a workdir. Opening them removes the records after `last_step`, which the run will write again.

    In a bucket, records appear from time to time, and all of them at `flush`.

    last_step: step of the checkpoint that the run resumes from.
    check_ours: raises UserError when another process has taken the workdir over. Then nothing more is uploaded.

    Raises UserError when a file is damaged.
    """

    def __init__(self, workdir: Path, last_step: int, check_ours: Callable[[], None] = _is_ours):
        self._mirror = Mirror(path_of(workdir), (_METRICS, _EVALUATIONS, _CHANGES), check_ours)
        folder = self._mirror.path
        self._metrics = _JsonLines(folder / _METRICS, last_step)
        self._evaluations = _JsonLines(folder / _EVALUATIONS, last_step)
        self._changes_path, self._last_step = folder / _CHANGES, last_step
        self._events = _open_events(folder / "tensorboard", last_step)

    def write_step(self, record: dict[str, Any]) -> None:
        """Appends one record of `describe_step`."""
        self._metrics.append(record)
        self._events.append(record, "training/")
        self._mirror.upload_when_due()

    def write_evaluation(self, record: dict[str, Any]) -> None:
        """Appends one record of `describe_evaluation`."""
        self._evaluations.append(record)
        prefix = f"{HELD_OUT}_{record['set']}/" if "set" in record else f"{HELD_OUT}/"
        self._events.append({key: value for key, value in record.items() if key != "set"}, prefix)

    def write_changes(self, record: dict[str, Any]) -> None:
        """Appends the keys that a resumed run changes: {step, changes {key: [old, new]}}."""
        changes = _JsonLines(self._changes_path, self._last_step)
        changes.append(record)
        changes.close()

    def flush(self) -> None:
        """Makes all records so far visible to others."""
        self._mirror.upload()

    def close(self) -> None:
        """Flushes and closes every file."""
        for part in (self._metrics, self._evaluations, self._events):
            part.close()
        self._mirror.close()


def _open_events(folder: Path, last_step: int) -> Any:
    """Opens the TensorBoard events; without tensorboardX, says in one line that none are written."""
    if importlib.util.find_spec("tensorboardX") is None:
        print("no TensorBoard events are written: pip install 'tensorboardX>=2.6.5' for them", file=sys.stderr)
        return NoEvents()
    from lsjax.training.tensorboard import Events

    return Events(folder, last_step)


class NoEvents:
    """TensorBoard events of a run without tensorboardX: it writes nothing."""

    def append(self, record: dict[str, Any], prefix: str) -> None: ...

    def close(self) -> None: ...


class NoLog:
    """The log of every host except the leader: it writes nothing."""

    def write_step(self, record: dict[str, Any]) -> None: ...

    def write_evaluation(self, record: dict[str, Any]) -> None: ...

    def write_changes(self, record: dict[str, Any]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class _JsonLines:
    """A file of one JSON object per line."""

    def __init__(self, path: Path, last_step: int):
        self._path = path
        with named_errors(path):
            try:
                kept = [line for line in read_complete_lines(path) if json.loads(line)["step"] <= last_step]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(f"{path} holds a line that is no record of a step; move it away to resume") from None
            write_atomically(path, "".join(f"{line}\n" for line in kept))
            self._file = path.open("a", encoding="utf-8")

    def append(self, record: dict[str, Any]) -> None:
        with named_errors(self._path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what a full disk did not take has been reported by append
            self._file.close()


def read_complete_lines(path: Path) -> list[str]:
    """Returns the complete lines of a file; none when it does not exist.

    A process killed while it writes leaves half a line at the end, which is left out.
    """
    if not path.exists():
        return []
    check_not_pointer(path)
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].splitlines()
