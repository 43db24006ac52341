"""SIGINT and SIGTERM during a run: the first saves and ends it, the second ends it at once."""

import signal
from types import FrameType


class Interrupts:
    """A context that handles SIGINT and SIGTERM.

    Before `defer` is called, while a run starts, a signal ends the process at once. Afterwards the first one is kept in
    `requested`, so that the run can end between two steps. A second signal ends the process at once. "At once" is
    KeyboardInterrupt for SIGINT, and SystemExit with status 143 for SIGTERM.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._deferring = False
        self._previous = {}

    def defer(self) -> None:
        """Lets the first signal wait until the run looks at `requested`."""
        self._deferring = True

    def __enter__(self) -> "Interrupts":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:  # only the main thread can handle signals: leave them alone
                break
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._deferring and self.requested is None:
            self.requested = signal.Signals(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)
