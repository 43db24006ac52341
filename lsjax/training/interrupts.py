"""SIGINT, SIGTERM and SIGHUP during a run: the first saves and ends it, the second ends it at once; none is lost."""

import _thread
import signal
import sys
import threading
from types import FrameType

_SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
_MOMENT = 0.01  # seconds for a callback, whose exceptions Python drops, to be over


class Interrupts:
    """A context that handles SIGINT, SIGTERM and SIGHUP (the end of a terminal or of a connection).

    Before `defer` is called, while a run starts, a signal ends the run at once. Afterwards the first one is kept in
    `requested`, so that the run can end between two steps. A second signal ends the run at once. "At once" is
    KeyboardInterrupt for SIGINT, and SystemExit with status 128 plus its number for the others. A signal that is
    ignored, as SIGHUP is under nohup, stays ignored.

    Exceptions of signal handlers may get lost: Python drops them in callbacks of the garbage collector and in
    finalizers, and libraries catch everything or raise an error of their own instead. Where Python reports that it
    dropped one, it is raised again a moment later. Otherwise `defer`, or the end of the context, raises it.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._deferring = False
        self._raised: signal.Signals | None = None  # the signal whose exception is on its way
        self._previous = {}

    def defer(self) -> None:
        """Lets the first signal wait until the run looks at `requested`."""
        self._deferring = True
        self._raise_lost()

    def __enter__(self) -> "Interrupts":
        for number in _SIGNALS:
            if signal.getsignal(number) == signal.SIG_IGN:
                continue
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:  # only the main thread can handle signals: leave them alone
                break
        self._previous_hook, sys.unraisablehook = sys.unraisablehook, self._notice_dropped
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        sys.unraisablehook = self._previous_hook
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if kind is None or not issubclass(kind, KeyboardInterrupt | SystemExit):
            self._raise_lost()
        self._raised = None

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._deferring and self.requested is None:
            self.requested = signal.Signals(number)
        else:
            self._raised = signal.Signals(number)
            self._raise_lost()

    def _raise_lost(self) -> None:
        """Raises the exception of the signal that ends the run, if there was one."""
        if self._raised is not None:
            raise KeyboardInterrupt if self._raised == signal.SIGINT else SystemExit(128 + self._raised)

    def _notice_dropped(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """Stands in for sys.unraisablehook, which Python calls with every exception that it drops."""
        if self._raised is None or not issubclass(unraisable.exc_type, KeyboardInterrupt | SystemExit):
            self._previous_hook(unraisable)
            return
        timer = threading.Timer(_MOMENT, self._signal_again)
        timer.daemon = True
        timer.start()

    def _signal_again(self) -> None:
        main = threading.main_thread().ident
        if self._raised is None or main is None:
            return
        if hasattr(signal, "pthread_kill"):
            signal.pthread_kill(main, self._raised)
        else:  # Windows; does not end a call that waits
            _thread.interrupt_main(self._raised)
