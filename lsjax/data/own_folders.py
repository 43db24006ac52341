"""Finds the folders inside a corpus that lsjax itself wrote: workdirs of runs and ablations, and packed data."""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from lsjax.errors import UserError
from lsjax.files import in_bucket, read_json

RUN, DATA, UNFINISHED = "a training workdir", "packed data", "an unfinished preparation"
ABLATION = "an ablation"

# The file that marks each kind of folder, and a section of it in which every version has the key "sequence_length".
_MARKS = {RUN: ("config.json", "training"), DATA: ("manifest.json", "request"), UNFINISHED: ("request.json", "request")}
_STEP_TIMES = "step_times.json"  # marks an ablation: its keys are recipes, which have a folder each


def kind_of_folder(folder: Path) -> str:
    """Returns RUN, DATA, UNFINISHED or ABLATION for a folder that lsjax wrote, and "" for another one."""
    for kind, (name, key) in _MARKS.items():
        path = folder / name
        with contextlib.suppress(UserError, OSError):  # a file of that name that somebody else wrote
            section = read_json(path).get(key) if path.is_file() else None
            if isinstance(section, dict) and "sequence_length" in section:
                return kind
    path = folder / _STEP_TIMES
    with contextlib.suppress(UserError, OSError):
        recipes = read_json(path) if path.is_file() else {}
        if recipes and all((folder / recipe).is_dir() for recipe in recipes):
            return ABLATION
    return ""


def own_folder_finder(root: Path) -> Callable[[PurePosixPath], tuple[str, str] | None]:
    """Returns a function that gives, for the name of a file in a corpus, the folder of lsjax that holds it.

    The function returns the folder's path inside `root` and its kind, or None. It looks at each folder once.
    """
    names = {_STEP_TIMES} | {name for name, _ in _MARKS.values()}
    # In a bucket, asking for each folder would take a request each. One listing tells where to look.
    found = map(PurePosixPath, root.objects("**/*.json") if in_bucket(root) else ())
    marked = {path.parent for path in found if path.name in names}

    @functools.cache
    def kind(folder: PurePosixPath) -> str:
        return kind_of_folder(root / str(folder)) if folder in marked or not in_bucket(root) else ""

    def find(name: PurePosixPath) -> tuple[str, str] | None:
        outermost_first = reversed(name.parents[:-1])  # without the root itself
        return next(((str(folder), kind(folder)) for folder in outermost_first if kind(folder)), None)

    return find
