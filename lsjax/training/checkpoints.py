"""Checkpoints with Orbax. Parameters and optimizer are stored apart, so loading a model never reads the optimizer.

A run with LoRA stores the adapter as its parameters, without the base (lsjax/io/base_model.py finds that again).

Everything else that a resumed run needs is a function of the step number: schedules, masks and data order. A
checkpoint appears whole or not at all, so a killed process leaves the previous one.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from lsjax.config import CheckpointConfig
from lsjax.errors import UserError
from lsjax.files import make_folder, path_of
from lsjax.io.checkpoints import EXIT_ADAPTER, FOLDER, finished_steps, open_checkpointer, orbax_silenced, read_or_refuse
from lsjax.training.step import TrainState


class Checkpoints:
    """The checkpoints of one workdir, written in the background."""

    def __init__(self, workdir: Path, config: CheckpointConfig):
        self._folder = make_folder(path_of(workdir).absolute() / FOLDER, "checkpoint folder")
        self._silence = orbax_silenced()
        self._checkpointer = open_checkpointer(
            self._folder,
            # Not checked: Orbax declares its policies for a narrower type than its Checkpointer passes to them.
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # pyright: ignore[reportArgumentType]
            preservation_policy=ocp.training.preservation_policies.LatestN(config.keep),  # pyright: ignore[reportArgumentType]
            cleanup_tmp_directories=True,
        )

    def latest_step(self) -> int | None:
        """Returns the step of the latest finished checkpoint, or None."""
        return max(finished_steps(self._folder), default=None)

    def save(self, state: TrainState) -> None:
        """Copies the state off the device and returns, while a thread writes it. The step must not be saved yet."""
        with _writing(self._folder):
            self._checkpointer.save_checkpointables_async(int(state.step), _checkpointables(state))

    def restore(self, abstract: TrainState) -> TrainState:
        """Returns the latest checkpoint, each array laid out as in `abstract`, on any mesh; a base is left away.

        Raises UserError when it cannot be read.
        """
        step, wanted = self.latest_step(), _checkpointables(abstract)
        assert step is not None
        loaded = read_or_refuse(self._folder, step, lambda: self._checkpointer.load_checkpointables(step, wanted))
        rest = loaded["training"]
        return TrainState(rest["step"], loaded["params"], rest["optimizer"], exit_adapter=loaded.get(EXIT_ADAPTER))

    def __enter__(self) -> "Checkpoints":
        self._silence.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        """Waits until everything is on disk, except when the run must end at once or another host may be gone."""
        try:
            if kind is None or (issubclass(kind, Exception) and jax.process_count() == 1):
                with _writing(self._folder):
                    self._checkpointer.close()
        finally:
            self._silence.__exit__(None, None, None)


def _checkpointables(state: TrainState) -> dict[str, Any]:
    """Returns the parts of a state that are stored apart, by their names; a base is left away."""
    parts = {"params": state.params, "training": {"optimizer": state.optimizer, "step": state.step}}
    return parts if state.exit_adapter is None else parts | {EXIT_ADAPTER: state.exit_adapter}


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns the errors of a full disk into a UserError; they appear at the next save or at the end."""
    try:
        yield
    except jax.errors.JaxRuntimeError:
        raise
    except Exception as error:
        full = os.strerror(errno.ENOSPC)
        reason = full if full in str(error) else (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise UserError(f"cannot write a checkpoint in {folder}: {reason}") from error
