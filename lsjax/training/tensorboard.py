"""TensorBoard events of a run. Needs tensorboardX."""

import contextlib
import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter

# Not checked: protobuf makes these classes when it is imported.
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.summary import scalar

from lsjax.files import make_folder
from lsjax.training.log_errors import named_errors


class Events:
    """TensorBoard events. They are written without SummaryWriter's thread, whose errors nobody would see.

    Events after `last_step` of earlier files are hidden.
    """

    def __init__(self, folder: Path, last_step: int):
        self._folder = make_folder(folder, "TensorBoard events in")
        with named_errors(folder):
            self._writer = EventsWriter(str(folder / "events"))
            self._write(step=last_step + 1, file_version="brain.Event:2")
            self._write(step=last_step + 1, session_log=SessionLog(status=SessionLog.START))
            self._writer.flush()

    def append(self, record: dict[str, Any], prefix: str) -> None:
        with named_errors(self._folder):
            for name, value in _scalars(record, prefix):
                self._write(step=record["step"], summary=scalar(name, value))
            self._writer.flush()

    def _write(self, **fields: Any) -> None:
        self._writer.write_event(Event(wall_time=time.time(), **fields))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._writer.close()


def _scalars(record: dict[str, Any], prefix: str) -> list[tuple[str, float]]:
    flat = []
    for name, value in record.items():
        if isinstance(value, dict):
            flat += _scalars(value, f"{prefix}{name}/")
        elif name != "step":
            flat.append((prefix + name, value))
    return flat
