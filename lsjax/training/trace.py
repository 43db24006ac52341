"""A profiler trace of a few training steps."""

from pathlib import Path
from typing import Any

import jax

from lsjax.training.mirror import Mirror

_WARM_UP = 2  # untraced first steps: one compiles, the next fills the queue


class StepTrace:
    """Traces `steps` steps of this process, after its first two, into `folder`.

    With 0 steps it does nothing. The trace opens in TensorBoard's profile plugin, and its .trace.json.gz in
    ui.perfetto.dev.
    """

    def __init__(self, folder: Path, first_step: int, steps: int):
        self.folder, self._steps = folder, steps
        self._mirror: Mirror | None = None
        self._begin = first_step + _WARM_UP + 1

    def begin_step(self, step: int) -> jax.profiler.StepTraceAnnotation:
        """Starts the trace when it is due. Returns a context to run the step in."""
        if self._steps and step == self._begin:
            self._mirror = Mirror(self.folder)
            jax.profiler.start_trace(self._mirror.path)
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def end_step(self, step: int, results: Any) -> bool:
        """Ends the trace when it is due, and returns whether it did.

        results: arrays of the step. The trace ends only when they are computed, so it includes their work.
        """
        if self._mirror is None or step < self._begin + self._steps - 1:
            return False
        jax.block_until_ready(results)
        self.close()
        return True

    def close(self) -> None:
        """Writes the trace if one is running."""
        if self._mirror is not None:
            mirror, self._mirror = self._mirror, None
            jax.profiler.stop_trace()
            mirror.close()
