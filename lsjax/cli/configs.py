"""Configurations by name: those of configs/, which a wheel carries inside the package."""

import difflib
import os
from pathlib import Path

from lsjax.errors import UserError
from lsjax.files import shipped_folder


def configs_folder() -> Path:
    """Returns the folder of the configurations that ship."""
    return shipped_folder("configs")


def config_names() -> list[str]:
    """Returns the names of the configurations that ship."""
    return sorted(path.stem for path in configs_folder().glob("*.py") if not path.stem.startswith("_"))


def find_config(value: str) -> str:
    """Returns the path of a configuration.

    value: a file, or the name of a configuration that ships; ":TEXT" after either is passed to its get_config.

    Raises UserError that lists the nearest names when there is neither.
    """
    name, colon, text = value.partition(":")
    path = os.path.expanduser(name)
    if not os.path.isfile(path):
        names = config_names()
        if name not in names:
            raise UserError(f"--config: {_not_found(name, names)}")
        path = str(configs_folder() / f"{name}.py")
    return path + colon + text


def _not_found(name: str, names: list[str]) -> str:
    if os.path.isdir(os.path.expanduser(name)):
        return f"{name!r} is a folder; give a file, or one of {', '.join(names)}"
    close = difflib.get_close_matches(Path(name).stem, names, n=3, cutoff=0.5)
    what = f"there is no file {name!r}" if name else "the value is empty"
    if not close:
        return f"{what}, and no configuration of that name; those that ship: {', '.join(names)}"
    return f"{what}; near names of configurations that ship: {', '.join(close)}"
