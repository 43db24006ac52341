"""A cache of compiled programs."""

import collections
import threading
from collections.abc import Callable
from typing import Any


class ProgramCache:
    """Keeps the compiled programs that were used last, so that equal shapes never compile twice.

    size: how many programs to keep; it may be set at any time. misses: how many were compiled.
    """

    def __init__(self, size: int = 256):
        self.size, self.misses = size, 0
        self._programs: collections.OrderedDict[Any, Any] = collections.OrderedDict()
        self._lock = threading.RLock()

    def get(self, key: Any, build: Callable[[], Any]) -> Any:
        """Returns the program stored under a hashable key; builds and stores it at the first use."""
        with self._lock:
            if key not in self._programs:
                self.misses += 1
                self._programs[key] = build()
            self._programs.move_to_end(key)
            program = self._programs[key]
            while len(self._programs) > self.size:
                self._programs.popitem(last=False)
            return program

    def clear(self) -> None:
        """Forgets every program, which frees their memory."""
        with self._lock:
            self._programs.clear()

    def __len__(self) -> int:
        return len(self._programs)


PROGRAM_CACHE = ProgramCache()
