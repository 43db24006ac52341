"""Says how far the preparation of a corpus is: bytes, speed and time left."""

import time
from collections.abc import Callable

_SECONDS = 10.0  # between two lines; a corpus that is prepared sooner gets none


class PrepareProgress:
    """Counts bytes that are done and passes a line on now and then.

    total: bytes on disk. note: receives each line.
    """

    def __init__(self, total: int, note: Callable[[str], None], clock: Callable[[], float] = time.monotonic):
        self._total, self._note, self._clock = total, note, clock
        self._began = self._said = clock()
        self._skipped = self._done = self._text = 0

    def skip(self, size: int) -> None:
        """Counts bytes on disk that an earlier process has done."""
        self._skipped += size
        if size:
            part = f"{_megabytes(size)} of {_megabytes(self._total)} MB"
            self._note(f"going on where an earlier preparation was: {part} are done")

    def add(self, size: int, text: int) -> None:
        """Counts a block of `size` bytes on disk and `text` bytes of text."""
        self._done, self._text = self._done + size, self._text + text
        if self._clock() - self._said >= _SECONDS:
            self._said = self._clock()
            seconds = self._said - self._began
            left = (self._total - self._skipped - self._done) * seconds / max(self._done, 1)
            self._note(
                f"prepared {_megabytes(self._skipped + self._done)} of {_megabytes(self._total)} MB, "
                f"{self._text / seconds / 1e6:.1f} MB/s of text, {_duration(left)} left"
            )

    def close(self) -> None:
        """Passes on the last line, unless everything was quick."""
        seconds = self._clock() - self._began
        if seconds >= _SECONDS:
            self._note(
                f"prepared {_megabytes(self._text)} MB of text in {_duration(seconds)}, "
                f"{self._text / seconds / 1e6:.1f} MB/s"
            )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
