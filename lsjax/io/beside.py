"""Files that lie beside a model: in its folder, or next to its GGUF file and named after it."""

from pathlib import Path

from lsjax.errors import UserError
from lsjax.files import path_of
from lsjax.io.hub import parse_hub_name
from lsjax.io.shipped import shipped_model


def path_beside(model_path: str | Path, file_name: str, instead: str = "a copy of the model") -> Path:
    """Returns where a file of the model at a path lies. instead: the paths that would do, for the message.

    Raises UserError for a name on the Hub, since the folder of its files is not this program's to write.
    """
    if parse_hub_name(model_path):
        raise UserError(f"{model_path} is a name on the Hub: give the path of {instead}")
    path = shipped_model(model_path) or path_of(model_path)
    return path / file_name if path.is_dir() else path.with_name(f"{path.name}.{file_name}")


def is_beside(model_path: str | Path, file_name: str) -> bool:
    """Returns whether a file lies beside the model at a path; False for a model that has no path of its own."""
    return bool(model_path) and not parse_hub_name(model_path) and path_beside(model_path, file_name).is_file()
