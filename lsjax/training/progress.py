"""Progress shown to a person during training: a live bar on a terminal or in a notebook, plain lines elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lsjax.notebook import NotebookCell

_EXITS_SHOWN = 3


class ProgressDisplay:
    """A display of one run. Call `observe` after each step, `update` after a logged one, `note` for any other line."""

    def __init__(self, first_step: int, total_steps: int, enabled: bool = True):
        self._console = Console(quiet=not enabled, highlight=False, soft_wrap=True)
        self._first, self._total, self._start = first_step, total_steps, time.monotonic()
        self._exit_losses: dict[int, float] = {}
        self._bar = None
        self._cell = NotebookCell() if enabled and self._console.is_jupyter else None
        if self._console.is_terminal and enabled:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=self._console)
            self._task = self._bar.add_task("", total=total_steps, completed=first_step)
            self._bar.start()

    def observe(self, exit_losses: dict[int, float]) -> None:
        """Remembers the latest loss of every exit, because a rotating curriculum trains only some at each step."""
        self._exit_losses |= exit_losses

    def update(self, record: dict[str, Any]) -> None:
        """Shows one logged step. record: as metrics.jsonl holds it."""
        step = record["step"]
        text = f"loss {record['final_loss']:.3f}{self._exit_text()}"
        text += f"  {record['tokens_per_second']:,.0f} tokens/s"
        if "mfu" in record:
            text += f"  MFU {record['mfu']:.1%}"
        if self._bar:
            self._bar.update(self._task, completed=step, description=text)
            return
        elapsed = time.monotonic() - self._start
        remaining = elapsed / max(step - self._first, 1) * (self._total - step)
        line = f"step {step}/{self._total}  {text}  ETA {format_duration(remaining)}"
        if self._cell:
            self._cell.show(step / self._total, line)
        else:
            self._console.print(line)

    def note(self, text: str) -> None:
        """Prints one line."""
        self._console.print(text, markup=False)

    def close(self) -> None:
        """Stops the live bar."""
        if self._bar:
            self._bar.stop()

    def _exit_text(self) -> str:
        early = sorted(self._exit_losses)[:-1]
        shown = early[:: -(-len(early) // _EXITS_SHOWN)] if early else []
        return "".join(f"  exit {layer}: {self._exit_losses[layer]:.2f}" for layer in shown)


def format_duration(seconds: float) -> str:
    """Returns H:MM:SS, or M:SS below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
