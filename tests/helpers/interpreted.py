"""Runs kernels on the CPU.

For a TPU, memories, DMAs and semaphores are simulated, and accesses are watched for races. The programs of a GPU run
one after the other on arrays that hold NaN before anything is stored.
"""

import contextlib
import functools
from unittest import mock

import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator

# A DMA that nobody waits for never happens ("on_wait"), and memory holds NaN before it is written.
WATCHED = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan")


# For whole programs, whose kernels have tests of their own.
UNWATCHED = pltpu.InterpretParams(dma_execution_mode="eager", uninitialized_memory="nan")


@contextlib.contextmanager
def simulated_tpu(watched: pltpu.InterpretParams = WATCHED):
    """Runs what is traced inside on a simulated TPU, which reports races."""
    simulator.reset_tpu_interpret_mode_state()
    try:
        with pltpu.force_tpu_interpret_mode(watched):
            yield
        assert not (watched.detect_races and simulator.races.races_found)
    finally:  # a kernel that failed leaves no trace for the next one
        simulator.reset_tpu_interpret_mode_state()


@contextlib.contextmanager
def simulated_gpu():
    """Runs what is traced inside in Pallas' interpreter."""
    with mock.patch.object(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True)):
        yield


# The simulators by platform, for whole programs.
SIMULATED = {"tpu": lambda: simulated_tpu(UNWATCHED), "gpu": simulated_gpu}
