"""Many hosts as one run: joining, agreeing, and stopping together. On a single host everything here is free."""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lsjax.config import first_difference
from lsjax.errors import UserError

T = TypeVar("T")
_HEARTBEAT = 30  # seconds of silence after which a process counts as gone; JAX then ends the others


def join(coordinator: str = "", num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins this process with the others of the run; to be called before anything else touches JAX.

    Without arguments SLURM, Kubernetes, Cloud TPU and MPI are recognised by JAX itself. Raises UserError when nothing
    says which processes there are, or they do not come together.
    """
    host, _, port = coordinator.rpartition(":")
    if coordinator and not (host and port.isdigit()):
        raise UserError(f"--coordinator is {coordinator!r}; it must be HOST:PORT")
    # Its handler would swallow SIGTERM, which is ours to act on (StopVote).
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator or None, num_processes, process_id, heartbeat_timeout_seconds=_HEARTBEAT)
    except Exception as error:  # each of the detected clusters raises its own kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot join the other processes: {reason} (outside SLURM, Kubernetes and Cloud TPU give --coordinator, "
            "--num_processes and --process_id)"
        ) from None


@contextlib.contextmanager
def lost_hosts_named() -> Iterator[None]:
    """Turns the failure of a computation over several hosts into a UserError that says so."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        reason = (str(error).strip().splitlines() or ["no reason given"])[0][:200]
        raise UserError(
            f"another host is gone, or failed ({reason}); start the same command again, on as many hosts as there are: "
            "it resumes from the latest checkpoint"
        ) from error


def is_leader() -> bool:
    """Whether this process writes what is written once: logs, the packed corpus, the configuration."""
    return jax.process_index() == 0


def leader_first(work: Callable[[], T]) -> T:
    """Runs `work` on the leader, then on the other hosts. An error on any host is a UserError on all of them."""
    result, problem = None, ""
    for my_turn in (is_leader(), not is_leader()):
        if my_turn:
            try:
                result = work()
            except Exception as error:
                problem = str(error) or type(error).__name__
                if jax.process_count() == 1:
                    raise
        raise_together(problem)
    return result


def raise_together(problem: str) -> None:
    """Raises UserError on every host when `problem` is not empty on one of them."""
    for host, message in enumerate(gather_texts(problem)):
        if message:
            raise UserError(message if jax.process_count() == 1 else f"host {host}: {message}")


def check_same(tree: dict[str, Any], name: str) -> None:
    """Raises UserError, on every host, that names the first host and key in which `tree` is not the leader's."""
    first, *others = (json.loads(text) for text in gather_texts(json.dumps(tree)))
    for host, other in enumerate(others, 1):
        difference = first_difference(first, other, name)
        if difference:
            raise UserError(
                f"hosts disagree: {difference[0]} is {difference[1]!r} on host 0, {difference[2]!r} on {host}"
            )


def gather_texts(text: str) -> list[str]:
    """Every host's text, in the order of the hosts."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(data.size))
    padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [rows[host, : sizes[host]].tobytes().decode() for host in range(len(sizes))]


def batch_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Which rows of every global batch this host's devices hold, in ascending order. They need not lie together (a
    mesh follows the wires, not the hosts), and hosts may hold the same (a tensor axis over several hosts)."""
    rows = np.arange(batch_size)
    mine = sharding.addressable_devices_indices_map(rows.shape).values()
    return np.unique(np.concatenate([rows[index[0]] for index in mine]))


class StopVote:
    """Whether any host was asked to stop, found out without waiting: cast with step n, read when step n is done."""

    def __init__(self, mesh: Mesh):
        self._alone = jax.process_count() == 1
        self._sharding = NamedSharding(mesh, P(mesh.axis_names))
        self._any = jax.jit(lambda votes: votes.any(), out_shardings=NamedSharding(mesh, P()))

    def cast(self, requested: bool) -> Any:
        if self._alone:
            return requested
        mine = np.full(jax.local_device_count(), requested)
        return self._any(jax.make_array_from_process_local_data(self._sharding, mine))
