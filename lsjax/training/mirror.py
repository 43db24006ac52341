"""Files of a workdir that grow, or that a library writes: in their place, or uploaded if that is in a bucket."""

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lsjax.files import in_bucket
from lsjax.training.log_errors import named_errors

_SECONDS = 10.0  # at least, between two uploads that nothing waits for
_SHARE = 0.02  # at most, of the time of a run that such uploads take


class Mirror:
    """A folder on disk for the files of a folder, which is that folder itself unless it is in a bucket.

    Nothing can be appended to an object. For a bucket, `path` is a temporary folder, and `upload` replaces those
    objects whose files have changed.

    fetched: names of the files to begin with, where the bucket has them.
    check: called before each upload; what it raises prevents that.
    """

    def __init__(self, folder: Path, fetched: Sequence[str] = (), check: Callable[[], None] = lambda: None):
        self._check = check
        self._bucket = folder if in_bucket(folder) else None
        self.path = folder if self._bucket is None else Path(tempfile.mkdtemp(prefix="lsjax-log-"))
        self._uploaded: dict[Path, tuple[int, int]] = {}  # size and time of change, by path
        self._due = time.monotonic() + _SECONDS
        if self._bucket is not None:
            with named_errors(folder):
                for name in fetched:
                    if (self._bucket / name).exists():
                        (self._bucket / name).download(self.path / name)

    def upload_when_due(self) -> None:
        """Uploads what has changed, unless that has just been done."""
        if self._bucket is not None and time.monotonic() >= self._due:
            self.upload()

    def upload(self) -> None:
        """Uploads what has changed. Raises UserError when the bucket does not take it."""
        if self._bucket is None:
            return
        self._check()
        began = time.monotonic()
        with named_errors(self._bucket):
            for path in sorted(path for path in self.path.rglob("*") if path.is_file()):
                state = path.stat().st_size, path.stat().st_mtime_ns
                if self._uploaded.get(path) != state:
                    self._bucket.joinpath(*path.relative_to(self.path).parts).upload(path)
                    self._uploaded[path] = state
        ended = time.monotonic()
        self._due = ended + max(_SECONDS, (ended - began) / _SHARE)

    def close(self) -> None:
        """Uploads what has changed, and removes the temporary folder."""
        try:
            self.upload()
        finally:
            if self._bucket is not None:
                shutil.rmtree(self.path, ignore_errors=True)
