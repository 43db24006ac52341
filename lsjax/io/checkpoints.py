"""Reads parameters out of Orbax checkpoints, and writes a model that belongs to no run.

A run saves and restores its whole state through `lsjax.training.checkpoints`. This module needs no run: it finds the
latest finished checkpoint of a folder and reads all, or some, of its parameters.
"""

import contextlib
import gc
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src.serialization import tensorstore_utils

from lsjax.errors import UserError
from lsjax.files import in_bucket, path_of
from lsjax.model.transformer import Params

FOLDER = "checkpoints"
EXIT_ADAPTER = "exit_adapter"  # the part of a checkpoint that holds an exit's adapter


def _add_checksums() -> None:
    """Makes Orbax store a CRC-32C beside every chunk of every array. TensorStore then checks it at each read.

    Orbax has no setting for this, so the function that describes its Zarr 3 arrays is wrapped. Checkpoints without
    checksums stay readable, and other readers of Zarr 3 read those with them.
    """
    name = "_build_zarr3_metadata"
    if not hasattr(tensorstore_utils, name):  # Orbax 0.12.4, in which one function describes Zarr 2 as well
        name = "build_zarr_shard_and_chunk_metadata"
    describe = getattr(tensorstore_utils, name)

    def describe_with_checksums(*args: Any, **kwargs: Any) -> dict[str, Any]:
        metadata = describe(*args, **kwargs)
        if "codecs" in metadata:
            metadata["codecs"][0]["configuration"]["codecs"].append({"name": "crc32c"})
        return metadata

    setattr(tensorstore_utils, name, describe_with_checksums)


_add_checksums()


def _add_s3() -> None:
    """Makes Orbax store arrays in S3, which TensorStore can do, but which Orbax has no words for.

    The function that describes where an array lies knows files and Google Cloud Storage. It is wrapped, and what it
    says about a bucket of the one is said about the same bucket of the other.
    """
    describe = tensorstore_utils.build_kvstore_tspec

    def describe_s3(directory: str, *args: Any, **kwargs: Any) -> Any:
        if not str(directory).startswith("s3://"):
            return describe(directory, *args, **kwargs)
        return _in_s3(describe(f"gs://{str(directory).removeprefix('s3://')}", *args, **kwargs))

    tensorstore_utils.build_kvstore_tspec = describe_s3


def _in_s3(spec: Any) -> Any:
    """Returns a TensorStore spec with the driver s3 in place of gcs, at the endpoint that the AWS libraries use."""
    if isinstance(spec, dict) and spec.get("driver") in ("gcs", "gcs_grpc"):
        place = {"driver": "s3", "bucket": spec["bucket"], "path": spec["path"]}
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if endpoint:
            place |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
        if os.environ.get("AWS_ACCESS_KEY_ID"):  # TensorStore looks for files in ~/.aws first, and complains
            place["aws_credentials"] = {"type": "environment"}
        return place
    return {key: _in_s3(value) for key, value in spec.items()} if isinstance(spec, dict) else spec


_add_s3()


def open_checkpointer(folder: Path, partial: bool = False, **options: Any) -> ocp.training.Checkpointer:
    """Returns Orbax's checkpointer of a folder on a disk or in a bucket.

    partial: whether it may load a part of the parameters. options: Orbax's own.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    if in_bucket(folder):
        # A bucket renames no folders. The object commit_success.txt makes a checkpoint complete.
        context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
    return ocp.training.Checkpointer(str(folder), context=context, **options)


def load_params(workdir: Path, abstract: Params) -> tuple[int, Params]:
    """Returns the step and the parameters of the latest checkpoint in a workdir, without the optimizer state.

    abstract: the shape, dtype and sharding wanted for each parameter.
    """
    return _read_latest(workdir, lambda reader, step: _read_params(reader, step, abstract))


def _read_params(reader: ocp.training.Checkpointer, step: int, abstract: Any) -> Any:
    return reader.load_checkpointables(step, {"params": abstract})["params"]


def load_part(workdir: Path, step: int, abstract: Any) -> Any:
    """Returns only those parameters of checkpoint `step` that the tree `abstract` names.

    A leaf of `abstract` that is a numpy array is read as a numpy array. Raises UserError when a parameter has another
    shape than its leaf.
    """
    folder = path_of(workdir).absolute() / FOLDER
    part = _read(folder, step, lambda reader, step: _read_params(reader, step, abstract), partial=True)
    # Orbax ignores the shape asked for when the leaf is a numpy array.
    for (path, wanted), found in zip(jax.tree_util.tree_leaves_with_path(abstract), jax.tree.leaves(part), strict=True):
        if found.shape != wanted.shape:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(
                f"checkpoint {folder}/{step} holds {name} of shape {found.shape}; config.json asks for {wanted.shape}"
            )
    return part


def load_kernel(workdir: Path, step: int, width: int) -> np.ndarray:
    """Returns the kernel [D,D] of the exit adapter in checkpoint `step`; it has the shape that it was stored in."""
    wanted = {EXIT_ADAPTER: {"kernel": np.zeros((width, width), np.float32)}}
    folder = path_of(workdir).absolute() / FOLDER
    return _read(folder, step, lambda reader, step: reader.load_checkpointables(step, wanted))[EXIT_ADAPTER]["kernel"]


def stored_dtypes(workdir: Path) -> Params:
    """Returns the dtype of each parameter in the latest checkpoint, as a tree of parameters."""
    metadata = _read_latest(workdir, lambda reader, step: reader.checkpointables_metadata(step))[1]
    return jax.tree.map(lambda array: np.dtype(array.dtype), metadata.metadata["params"])


def load_stored(workdir: Path) -> tuple[int, Params]:
    """Returns the step and all parameters of the latest checkpoint, as numpy arrays of the shapes that it holds."""
    step, metadata = _read_latest(workdir, lambda reader, step: reader.checkpointables_metadata(step))
    abstract = jax.tree.map(
        lambda array: np.broadcast_to(np.zeros((), array.dtype), array.shape), metadata.metadata["params"]
    )
    return step, load_part(workdir, step, abstract)


def latest_step(workdir: Path) -> int:
    """Returns the step of the latest checkpoint. Raises UserError when there is none."""
    return _find_latest(workdir)[1]


def save_model(folder: Path, params: Params) -> None:
    """Saves parameters alone, as the checkpoint of step 0 in a folder that holds no run."""
    target = path_of(folder).absolute() / FOLDER
    try:
        with orbax_silenced(), open_checkpointer(target) as checkpointer:
            checkpointer.save_checkpointables(0, {"params": params})
    except Exception:  # threads that still write fail, and log it, when the folder has been removed
        logging.getLogger("absl").addFilter(_is_not_of_orbax)
        raise


def _read_latest(workdir: Path, read: Callable[[ocp.training.Checkpointer, int], Any]) -> tuple[int, Any]:
    folder, step = _find_latest(workdir)
    return step, _read(folder, step, read)


def _read(folder: Path, step: int, read: Callable[[ocp.training.Checkpointer, int], Any], partial: bool = False) -> Any:
    with orbax_silenced(), open_checkpointer(folder, partial) as checkpointer:
        return read_or_refuse(folder, step, lambda: read(checkpointer, step))


def read_or_refuse(folder: Path, step: int, read: Callable[[], Any]) -> Any:
    """Returns what `read` returns. Raises UserError in place of the many types that Orbax and TensorStore raise."""
    try:
        return read()
    except Exception as error:
        refusal = _unreadable(folder, step, error)
    # A failed read leaves coroutines that nobody will wait for. They are released here, where nothing warns of them.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        gc.collect()
    raise refusal


@contextlib.contextmanager
def orbax_silenced() -> Iterator[None]:
    """Keeps Orbax from logging what it also raises: tracebacks of its threads, a thousand lines for a full disk."""
    absl, asyncio = logging.getLogger("absl"), logging.getLogger("asyncio")
    asyncio.addFilter(_is_not_of_orbax)  # for good: a failed task is logged when its memory is released, much later
    absl.addFilter(_is_not_of_orbax)
    try:
        yield
    finally:
        absl.removeFilter(_is_not_of_orbax)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    """Returns whether a log record may be shown: it is neither Orbax's own nor about one of its tasks."""
    orbax = f"{os.sep}orbax{os.sep}"
    return orbax not in record.pathname and not (record.name == "asyncio" and orbax in record.getMessage())


def _find_latest(workdir: Path) -> tuple[Path, int]:
    """Finds the latest checkpoint by folder name: Orbax's own search waits for every host of a distributed run."""
    folder = path_of(workdir).absolute() / FOLDER
    if not folder.is_dir():
        raise UserError(f"{workdir} has no checkpoint yet: {folder} does not exist")
    if not finished_steps(folder):
        raise UserError(f"{workdir} has no checkpoint yet: {folder} is empty")
    return folder, finished_steps(folder)[-1]


def finished_steps(folder: Path) -> list[int]:
    """Returns the steps of the finished checkpoints, in order.

    An unfinished one has a name that is no number; in a bucket, it lacks the object that comes last.
    """
    done = "commit_success.txt" if in_bucket(folder) else ""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and (path / done).exists())


def _unreadable(folder: Path, step: int, error: Exception) -> UserError:
    """Returns the error to raise for a damaged checkpoint, with the first line of its cause and the remedy."""
    first_line = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
    return UserError(
        f"checkpoint {folder}/{step} cannot be read; remove that folder to fall back to the one before ({first_line})"
    )
