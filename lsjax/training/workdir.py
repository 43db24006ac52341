"""The folder of a run: one configuration each, loadable on its own."""

import json
from pathlib import Path

from lsjax.config import Config
from lsjax.data.tokenizer import Tokenizer, load_tokenizer
from lsjax.errors import UserError
from lsjax.files import make_folder, write_atomically

CONFIG, TOKENIZER, DATA = "config.json", "tokenizer.json", "data"

# What may change when a run resumes: the mesh, and how often to save and evaluate.
_FREE_SECTIONS = ("mesh", "checkpoint", "evaluation")


def check_free(workdir: Path, config: Config) -> None:
    """Raises UserError when `workdir` cannot be written, or names the first key in which it is another run's."""
    make_folder(workdir, "workdir")
    if (Path(workdir) / CONFIG).exists():
        difference = _first_difference(read_config(workdir).to_dict(), config.to_dict())
        if difference:
            raise UserError(f"{workdir} holds another run: {difference}; use another --workdir or the same config")


def claim(workdir: Path, config: Config, tokenizer: Tokenizer) -> None:
    """Makes `workdir` this run's, once everything it needs has been found good.

    Raises UserError when an earlier part of the run used another tokenizer (its data was removed and packed anew
    from other text).
    """
    path = Path(workdir) / TOKENIZER
    if path.exists() and load_tokenizer(path).backend.to_str() != tokenizer.backend.to_str():
        raise UserError(f"{path} is not the tokenizer of the packed data: the corpus has changed since the run began")
    tokenizer.save(path)
    write_atomically(Path(workdir) / CONFIG, json.dumps(config.to_dict(), indent=2))


def read_config(workdir: Path) -> Config:
    path = Path(workdir) / CONFIG
    try:
        return Config.from_dict(json.loads(path.read_text()))
    except OSError:
        raise UserError(f"{workdir} is not a training workdir: it has no {CONFIG}") from None
    except ValueError as error:  # not UTF-8, or not JSON
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
