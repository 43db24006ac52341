"""A profiler's trace of a few steps of a run."""

from pathlib import Path
from typing import Any

import jax

_WARM_UP = 2  # steps left out: the first compiles, the second fills the queue


class StepTrace:
    """Traces `steps` steps after the first two of this process into `folder` (0: none, and costs nothing). The trace
    opens in TensorBoard's profile plugin and, its .trace.json.gz, in ui.perfetto.dev."""

    def __init__(self, folder: Path, first_step: int, steps: int):
        self.folder, self._steps = folder, steps
        self._begin = first_step + _WARM_UP + 1
        self._tracing = False

    def begin_step(self, step: int) -> jax.profiler.StepTraceAnnotation:
        """To be entered around the step."""
        if self._steps and step == self._begin:
            jax.profiler.start_trace(self.folder)
            self._tracing = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def end_step(self, step: int, results: Any) -> bool:
        """Returns whether the trace ended with this step; it then waits for `results`, so that it holds their work."""
        if not self._tracing or step < self._begin + self._steps - 1:
            return False
        jax.block_until_ready(results)
        self.close()
        return True

    def close(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
