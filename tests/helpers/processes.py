"""Several processes that train as one run, on CPU with gloo, and the comparison of two such runs."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from tests.conftest import process_environment

DEVICES = 8
TRAIN = Path(__file__).parent.parent.parent / "launch" / "train.py"


def start(
    config: Path, workdir: Path | str, processes: int, *flags, own_flags=None, own_environment=None, script=TRAIN
) -> list[subprocess.Popen]:
    """Starts launch/train.py (or another script) as several processes that share DEVICES devices.

    own_flags, own_environment: those of one process, by its rank.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    together = [f"--coordinator=localhost:{port}", f"--num_processes={processes}"] if processes > 1 else []
    environment = process_environment(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES=str(DEVICES // processes))
    started = []
    for rank in range(processes):
        command = [sys.executable, script, f"--config={config}", f"--workdir={workdir}", *flags]
        command += [*together, *([f"--process_id={rank}"] if together else []), *((own_flags or {}).get(rank, []))]
        own = environment | (own_environment or {}).get(rank, {})
        started.append(subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return started


def finish(processes: list[subprocess.Popen], timeout=300) -> list[tuple[int, str, str]]:
    """Returns (exit status, standard output, standard error) of each process; leaves none running."""
    deadline = time.monotonic() + timeout
    try:
        results = []
        for process in processes:
            out, err = process.communicate(timeout=max(1, deadline - time.monotonic()))
            results.append((process.returncode, out, err))
        return results
    finally:
        for process in processes:
            process.kill()


def assert_same_run(ours: list[dict], theirs: list[dict], relative=1e-4) -> None:
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a["exit_losses"].keys() == b["exit_losses"].keys()
        np.testing.assert_allclose(list(a["exit_losses"].values()), list(b["exit_losses"].values()), rtol=relative)
        np.testing.assert_allclose((a["loss"], a["gradient_norm"]), (b["loss"], b["gradient_norm"]), rtol=10 * relative)
