"""Keeps a workdir in a bucket to one process. A bucket has no locks, so the process renews a claim, and may lose it.

A claim is an object in WORKDIR/.lock. Who starts writes its own and then lists all: of two that start at once, the
later one sees the other, because both stores list what was written before. A claim that was not renewed for `LAPSE`
seconds by the store's clock is dead, and so is one of a process of this machine that has ended. Whoever starts next
removes it. A process that could not renew its claim in that time looks, before it writes, whether it is still alone.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lsjax.errors import UserError

if TYPE_CHECKING:
    from lsjax.buckets import BucketPath

LAPSE = 60.0  # seconds after which a claim that was not renewed is dead
_RENEWAL, _LOOK = 10.0, 2.0  # seconds between two renewals, and between two looks at the claim of another process
_FOLDER = ".lock"


class Lease:
    """The claim of this process on a workdir. `check` says whether it still holds."""

    def __init__(self, workdir: "BucketPath"):
        self._workdir, self._token = workdir, secrets.token_hex(8)
        self._claim = workdir / _FOLDER / self._token
        self._renewed, self._problem = 0.0, ""
        self._ended, self._writing = threading.Event(), threading.Lock()

    def acquire(self) -> None:
        """Takes the workdir, if need be when another claim has died. Raises UserError when another process lives."""
        self._wait_for_others()
        self._renew()
        found = self._others()
        alive = [claim for claim in found if not self._is_dead(claim)]
        if alive:
            self._claim.unlink(missing_ok=True)
            raise self._in_use(alive[0])
        for claim in found:
            claim.unlink(missing_ok=True)
        threading.Thread(target=self._renew_until_end, daemon=True, name="lease").start()

    def release(self) -> None:
        """Removes the claim."""
        self._ended.set()
        with self._writing, contextlib.suppress(OSError):  # unreachable: the claim will lapse
            self._claim.unlink(missing_ok=True)

    def check(self) -> None:
        """Raises UserError when another process may have taken the workdir over."""
        if not self._problem and _now() - self._renewed > LAPSE:
            self._look_again()
        if self._problem:
            raise UserError(self._problem)

    def _look_again(self) -> None:
        """Renews a claim that had lapsed, if nobody has come since."""
        try:
            self._renew()
            if not self._others():
                return
            self.release()
            self._problem = (
                f"{self._workdir} was taken over by another process while this one could not reach the bucket"
            )
        except OSError as error:
            self._problem = f"{self._workdir} cannot be kept: no renewal for {LAPSE:.0f} seconds ({error.strerror})"

    def _renew_until_end(self) -> None:
        while not self._ended.wait(_RENEWAL):
            # A lapsed claim may be another's by now: `check` decides.
            if _now() - self._renewed <= LAPSE:
                with contextlib.suppress(OSError):  # tried again, and `check` ends the run when that does not help
                    self._renew()

    def _renew(self) -> None:
        began = _now()
        with self._writing:
            if not self._ended.is_set():
                self._claim.write_bytes(json.dumps(_this_process() | {"time": time.time()}).encode())
        self._renewed = began

    def _wait_for_others(self) -> None:
        waiting: dict[BucketPath, str] = {}
        while alive := [claim for claim in self._others() if not self._is_dead(claim)]:
            claim = alive[0]
            with contextlib.suppress(FileNotFoundError):
                content = claim.read_text()
                if not waiting:
                    print(f"{self._workdir} has a claim: looking whether its process is alive", file=sys.stderr)
                if waiting.setdefault(claim, content) != content:
                    raise self._in_use(claim)
            time.sleep(_LOOK)

    def _others(self) -> list["BucketPath"]:
        return [claim for claim in self._claim.parent.iterdir() if claim != self._claim]

    def _is_dead(self, claim: "BucketPath") -> bool:
        try:
            owner = json.loads(claim.read_text())
            if owner["machine"] == _this_process()["machine"] and not _is_running(owner["process"]):
                return True
            return self._store_time() - claim.stat().st_mtime > LAPSE
        except FileNotFoundError:  # it has just ended
            return True
        except (ValueError, LookupError, TypeError):
            raise UserError(f"{claim} is no claim of lsjax: remove it") from None

    def _store_time(self) -> float:
        """Returns the time by the store's clock, in seconds; clocks of machines differ."""
        probe = self._workdir / f".probe.{self._token}"
        probe.write_bytes(b"")
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _in_use(self, claim: "BucketPath") -> UserError:
        try:
            owner = json.loads(claim.read_text())
            name = f"process {owner['process']} on {owner['host']}"
        except (OSError, ValueError, LookupError):
            name = "another process"
        return UserError(f"{self._workdir} is in use by {name}: wait for its end, or use another --workdir")


@contextlib.contextmanager
def leased(workdir: "BucketPath") -> Iterator[Lease]:
    """Holds a workdir in a bucket. Raises UserError when another process does, or when the bucket does not answer."""
    lease = Lease(workdir)
    try:
        lease.acquire()
    except OSError as error:
        raise UserError(f"cannot write workdir {workdir}: {error.strerror}") from None
    try:
        yield lease
    finally:
        lease.release()


def _now() -> float:
    # Unlike the monotonic clock of Python, this one goes on while a machine sleeps.
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.time()


def _this_process() -> dict[str, str | int]:
    """Describes this process. machine: equal for processes whose numbers can be compared."""
    machine = ""
    with contextlib.suppress(OSError):  # not Linux
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return {"process": os.getpid(), "host": socket.gethostname(), "machine": machine}


def _is_running(process: int) -> bool:
    if not _this_process()["machine"]:
        return True  # unknown
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
