"""Checkpoints with Orbax: parameters and optimizer apart, so that loading a model never reads the optimizer.

Everything else a run needs to go on follows from the step number: schedules, masks and data order are functions
of it. A checkpoint appears whole or not at all, so a killed process leaves the one before.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from lsjax.config import CheckpointConfig
from lsjax.errors import UserError
from lsjax.files import make_folder
from lsjax.model.transformer import Params
from lsjax.training.step import TrainState

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of one workdir, written in the background."""

    def __init__(self, workdir: Path, config: CheckpointConfig):
        self._folder = make_folder(Path(workdir).absolute() / FOLDER, "checkpoint folder")
        self._checkpointer = ocp.training.Checkpointer(
            self._folder,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(config.keep),
            cleanup_tmp_directories=True,
        )

    def latest_step(self) -> int | None:
        return max(_steps(self._folder), default=None)

    def save(self, state: TrainState) -> None:
        """Copies the state off the device and returns; writing goes on behind. The step must be a new one."""
        rest = {"optimizer": state.optimizer, "step": state.step}
        with _writing(self._folder):
            self._checkpointer.save_checkpointables_async(int(state.step), {"params": state.params, "training": rest})

    def restore(self, abstract: TrainState) -> TrainState:
        """The latest checkpoint, each array laid out as `abstract` says (any mesh, whichever it was saved from)."""
        rest = {"optimizer": abstract.optimizer, "step": abstract.step}
        step = self.latest_step()
        try:
            loaded = self._checkpointer.load_checkpointables(step, {"params": abstract.params, "training": rest})
        except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
            raise unreadable(self._folder, step, error) from error
        return TrainState(loaded["training"]["step"], loaded["params"], loaded["training"]["optimizer"])

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        """Waits until everything is on disk; not after an error among several hosts, where one may be gone."""
        if kind is None or jax.process_count() == 1:
            with _writing(self._folder):
                self._checkpointer.close()


def load_params(workdir: Path, abstract: Params) -> tuple[int, Params]:
    """(step, parameters) of the latest checkpoint in a workdir, without its optimizer."""
    return _read_latest(workdir, lambda reader, step: _params(reader, step, abstract))


def _params(reader: ocp.training.Checkpointer, step: int, abstract: Any) -> Any:
    return reader.load_checkpointables(step, {"params": abstract})["params"]


def load_part(workdir: Path, step: int, abstract: Any) -> Any:
    """Of that checkpoint the parameters that `abstract` names, as numpy arrays where it has these. Raises UserError
    when one has another shape."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    folder = Path(workdir).absolute() / FOLDER
    with context:
        part = _read(folder, step, lambda reader, step: _params(reader, step, abstract))
    # Of a numpy array Orbax does not look at the shape that was asked for.
    for (path, wanted), found in zip(jax.tree_util.tree_leaves_with_path(abstract), jax.tree.leaves(part), strict=True):
        if found.shape != wanted.shape:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(
                f"checkpoint {folder}/{step} holds {name} of shape {found.shape}; config.json asks for {wanted.shape}"
            )
    return part


def stored_dtypes(workdir: Path) -> Params:
    """The dtype of each parameter of the latest checkpoint, as a tree of parameters."""
    metadata = _read_latest(workdir, lambda reader, step: reader.checkpointables_metadata(step))[1]
    return jax.tree.map(lambda array: np.dtype(array.dtype), metadata.metadata["params"])


def latest_step(workdir: Path) -> int:
    """Raises UserError when there is no checkpoint."""
    return _latest(workdir)[1]


def save_model(folder: Path, params: Params) -> None:
    """Parameters alone, as step 0 of a folder that is no run."""
    with ocp.training.Checkpointer(Path(folder).absolute() / FOLDER) as checkpointer:
        checkpointer.save_checkpointables(0, {"params": params})


def _read_latest(workdir: Path, read: Callable[[ocp.training.Checkpointer, int], Any]) -> tuple[int, Any]:
    folder, step = _latest(workdir)
    return step, _read(folder, step, read)


def _read(folder: Path, step: int, read: Callable[[ocp.training.Checkpointer, int], Any]) -> Any:
    with ocp.training.Checkpointer(folder) as checkpointer:
        try:
            return read(checkpointer, step)
        except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
            raise unreadable(folder, step, error) from error


def _latest(workdir: Path) -> tuple[Path, int]:
    """Found by name: Orbax, to look, would wait for all hosts."""
    folder = Path(workdir).absolute() / FOLDER
    if not folder.is_dir():
        raise UserError(f"{workdir} has no checkpoint yet: {folder} does not exist")
    if not _steps(folder):
        raise UserError(f"{workdir} has no checkpoint yet: {folder} is empty")
    return folder, _steps(folder)[-1]


def _steps(folder: Path) -> list[int]:
    """Of the finished checkpoints: one that is being written has another name."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """A full disk comes as any of several errors, at the next save or at the end."""
    try:
        yield
    except jax.errors.JaxRuntimeError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise UserError(f"cannot write a checkpoint in {folder}: {reason}") from error


def unreadable(folder: Path, step: int, error: Exception) -> UserError:
    first_line = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
    return UserError(
        f"checkpoint {folder}/{step} cannot be read; remove that folder to fall back to the one before ({first_line})"
    )


def abstract_arrays(tree, shardings) -> jax.Array:
    """Shapes with layouts, for restoring straight into place: initial and restored state never coexist."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings)
