"""A profiler trace of a few training steps."""

from pathlib import Path
from typing import Any

import jax

_WARM_UP = 2  # untraced first steps: one compiles, the next fills the queue


class StepTrace:
    """Traces `steps` steps of this process, after its first two, into `folder`.

    With 0 steps it does nothing. The trace opens in TensorBoard's profile plugin, and its .trace.json.gz in
    ui.perfetto.dev.
    """

    def __init__(self, folder: Path, first_step: int, steps: int):
        self.folder, self._steps = folder, steps
        self._begin = first_step + _WARM_UP + 1
        self._tracing = False

    def begin_step(self, step: int) -> jax.profiler.StepTraceAnnotation:
        """Starts the trace when it is due. Returns a context to run the step in."""
        if self._steps and step == self._begin:
            jax.profiler.start_trace(self.folder)
            self._tracing = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def end_step(self, step: int, results: Any) -> bool:
        """Ends the trace when it is due, and returns whether it did.

        results: arrays of the step. The trace ends only when they are computed, so it includes their work.
        """
        if not self._tracing or step < self._begin + self._steps - 1:
            return False
        jax.block_until_ready(results)
        self.close()
        return True

    def close(self) -> None:
        """Writes the trace if one is running."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
