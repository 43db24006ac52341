"""Turns the names of --tasks into tasks."""

from lsjax.errors import UserError
from lsjax.evaluation.scores import METRICS
from lsjax.evaluation.tasks.docstrings import Docstrings
from lsjax.evaluation.tasks.files import Custom, Gsm8k, TopV2, cnn_dm, xsum
from lsjax.evaluation.tasks.held_out_text import HeldOutText
from lsjax.evaluation.tasks.human_eval import HumanEval
from lsjax.evaluation.tasks.task import Task
from lsjax.files import as_path

NAMES = ("human_eval", "docstrings", "held_out_text", "cnn_dm", "xsum", "topv2", "gsm8k", "custom")
FEW_SHOT = ("cnn_dm", "xsum", "topv2", "gsm8k")


def parse_task(text: str, num_shots: int | None = None, allow_code_execution: bool = False) -> Task | HeldOutText:
    """Returns the task of a text such as "docstrings", "cnn_dm:FOLDER" or "custom:FILE.jsonl:rougeL".

    num_shots: for the tasks in FEW_SHOT; None leaves each its own number.
    allow_code_execution: whether human_eval may run what the model writes.
    Raises UserError for an unknown name, and for a path that is missing or has no place.
    """
    name, _, rest = text.partition(":")
    path = as_path(rest, "the path in --tasks") if rest else None
    if name not in NAMES:
        raise UserError(f"--tasks: {name!r} is not one of {', '.join(NAMES)}")
    if name == "docstrings":
        return Docstrings(path)
    if name == "human_eval":
        return HumanEval(path, execute=allow_code_execution)
    if name == "held_out_text":
        return HeldOutText(path)
    if path is None:
        place = "PATH" if name in FEW_SHOT else "FILE.jsonl"
        raise UserError(f"--tasks: {name} reads your files: write {name}:{place}")
    if name == "custom":
        return _custom(rest)
    if name == "cnn_dm":
        return cnn_dm(path, num_shots)
    if name == "xsum":
        return xsum(path, num_shots)
    kind = TopV2 if name == "topv2" else Gsm8k
    return kind(path) if num_shots is None else kind(path, num_shots)


def _custom(rest: str) -> Custom:
    """Returns the task of "FILE.jsonl" or "FILE.jsonl:METRIC"."""
    file, colon, metric = rest.rpartition(":")
    if not colon or "." in metric or "/" in metric:
        return Custom(as_path(rest, "the path in --tasks"))
    if metric not in METRICS:
        raise UserError(f"--tasks: custom:{rest} names the metric {metric!r}; it must be one of {', '.join(METRICS)}")
    return Custom(as_path(file, "the path in --tasks"), metric)
