"""The folder of a run: one configuration each, loadable on its own."""

import json
from pathlib import Path

from lsjax.config import Config
from lsjax.errors import UserError
from lsjax.files import make_folder, write_atomically

CONFIG, TOKENIZER, DATA = "config.json", "tokenizer.json", "data"

# What may change when a run resumes: where and how often, never what is learned.
_FREE_SECTIONS = ("mesh", "checkpoint", "evaluation")


def claim(workdir: Path, config: Config) -> None:
    """Makes `workdir` this run's, or raises UserError naming the first key in which it is another's."""
    make_folder(workdir, "workdir")
    path = Path(workdir) / CONFIG
    if path.exists():
        difference = _first_difference(read_config(workdir).to_dict(), config.to_dict())
        if difference:
            raise UserError(f"{workdir} holds another run: {difference}; use another --workdir or the same config")
    write_atomically(path, json.dumps(config.to_dict(), indent=2))


def read_config(workdir: Path) -> Config:
    path = Path(workdir) / CONFIG
    try:
        return Config.from_dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"{workdir} is not a training workdir: it has no {CONFIG}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def data_directory(workdir: Path, config: Config) -> Path:
    return Path(config.data.directory) if config.data.directory else Path(workdir) / DATA


def _first_difference(old: dict, new: dict, path: str = "config") -> str | None:
    for key in new:
        name = f"{path}.{key}"
        if path == "config" and key in _FREE_SECTIONS:
            continue
        if isinstance(new[key], dict):
            difference = _first_difference(old.get(key, {}), new[key], name)
            if difference:
                return difference
        elif old.get(key) != new[key]:
            return f"{name} was {old.get(key)!r} there and is {new[key]!r} now"
    return None
