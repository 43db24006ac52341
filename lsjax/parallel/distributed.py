"""Many hosts as one run: they join, agree and stop together. On a single host nothing here costs time."""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lsjax.checks import first_difference
from lsjax.errors import UserError

T = TypeVar("T")
_HEARTBEAT = 30  # seconds without a sign of life after which a process counts as lost; JAX then ends the others


def join(coordinator: str = "", num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins this process with the others of the run. Call it before anything else touches JAX.

    coordinator: HOST:PORT of the first process. Without arguments, JAX recognises SLURM, Kubernetes, Cloud TPU and MPI.

    Raises UserError when nothing says which processes there are, or when they do not come together.
    """
    host, _, port = coordinator.rpartition(":")
    if coordinator and not (host and port.isdigit()):
        raise UserError(f"--coordinator is {coordinator!r}; it must be HOST:PORT, such as localhost:8476")
    # JAX's preemption service would catch SIGTERM, which the training loop handles itself (StopVote).
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator or None, num_processes, process_id, heartbeat_timeout_seconds=_HEARTBEAT)
    except Exception as error:  # every kind of cluster raises exceptions of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot join the other processes: {reason} (outside SLURM, Kubernetes and Cloud TPU give --coordinator, "
            "--num_processes and --process_id)"
        ) from None


@contextlib.contextmanager
def lost_hosts_named() -> Iterator[None]:
    """Turns the failure of a computation over several hosts into a UserError that says how to go on."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        reason = (str(error).strip().splitlines() or ["no reason given"])[0][:200]
        raise UserError(
            f"another host is gone or failed ({reason}); start the same command again on the hosts that are left: "
            "it resumes from the latest checkpoint"
        ) from error


def is_leader() -> bool:
    """Returns whether this process writes what only one process may write: logs, packed corpus, configuration."""
    return jax.process_index() == 0


def leader_first(work: Callable[[], T]) -> T:
    """Runs `work` on the leader, then on the other hosts. An error on one host raises UserError on every host."""
    results: list[T] = []
    problem = ""
    for my_turn in (is_leader(), not is_leader()):
        if my_turn:
            try:
                results.append(work())
            except Exception as error:
                problem = str(error) or type(error).__name__
                if jax.process_count() == 1:
                    raise
        raise_together(problem)
    return results[0]


def all_together(work: Callable[[], T]) -> T:
    """Runs `work` on all hosts at once. An error on one host raises UserError on every host."""
    if jax.process_count() == 1:
        return work()
    result, problem = None, ""
    try:
        result = work()
    except Exception as error:
        problem = str(error) or type(error).__name__
    raise_together(problem)
    return result  # pyright: ignore[reportReturnType]


def raise_together(problem: str) -> None:
    """Raises UserError on every host if `problem` is not empty on one of them."""
    for host, message in enumerate(gather_texts(problem)):
        if message:
            raise UserError(message if jax.process_count() == 1 else f"host {host}: {message}")


def check_same(tree: dict[str, Any], name: str) -> None:
    """Checks that every host has the same `tree` as the leader.

    name: the path of the tree, for the message. Raises UserError on every host, naming the first host and key that
    differ.
    """
    first, *others = (json.loads(text) for text in gather_texts(json.dumps(tree)))
    for host, other in enumerate(others, 1):
        difference = first_difference(first, other, name)
        if difference:
            raise UserError(
                f"hosts disagree: {difference[0]} is {difference[1]!r} on host 0, {difference[2]!r} on {host}; "
                "start every host with the same command"
            )


def gather_texts(text: str) -> list[str]:
    """Returns every host's text, in the order of the hosts."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(data.size))
    padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [rows[host, : sizes[host]].tobytes().decode() for host in range(len(sizes))]


def batch_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Returns which rows (sequences) of every global batch the devices of this host hold, in ascending order.

    The rows need not be contiguous, since a mesh follows the wiring of the chips and not the hosts. Several hosts may
    hold the same rows, when the tensor axis spans them.
    """
    rows = np.arange(batch_size)
    indices = sharding.devices_indices_map(rows.shape)
    return np.unique(np.concatenate([rows[indices[device][0]] for device in sharding.addressable_devices]))


class StopVote:
    """A vote on whether any host was asked to stop, without waiting: cast with step n, read when step n is done."""

    def __init__(self, mesh: Mesh):
        self._alone = jax.process_count() == 1
        self._sharding = NamedSharding(mesh, P(mesh.axis_names))
        self._any = jax.jit(lambda votes: votes.any(), out_shardings=NamedSharding(mesh, P()))

    def cast(self, requested: bool) -> Any:
        """Starts the vote. Returns whether any host requested a stop, as a bool or a scalar array still in flight."""
        if self._alone:
            return requested
        mine = np.full(jax.local_device_count(), requested)
        return self._any(jax.make_array_from_process_local_data(self._sharding, mine))
