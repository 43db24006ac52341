"""SIGINT, SIGTERM and SIGHUP during a run: the first saves and ends it, the second ends it at once."""

import signal
from types import FrameType

_SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


class Interrupts:
    """A context that handles SIGINT, SIGTERM and SIGHUP (the end of a terminal or of a connection).

    Before `defer` is called, while a run starts, a signal ends the process at once. Afterwards the first one is kept in
    `requested`, so that the run can end between two steps. A second signal ends the process at once. "At once" is
    KeyboardInterrupt for SIGINT, and SystemExit with status 128 plus its number for the others. A signal that is
    ignored, as SIGHUP is under nohup, stays ignored.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._deferring = False
        self._previous = {}

    def defer(self) -> None:
        """Lets the first signal wait until the run looks at `requested`."""
        self._deferring = True

    def __enter__(self) -> "Interrupts":
        for number in _SIGNALS:
            if signal.getsignal(number) == signal.SIG_IGN:
                continue
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
