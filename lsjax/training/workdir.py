"""The folder of a run: one configuration each, loadable on its own."""

import dataclasses
import json
from pathlib import Path

from lsjax.config import Config, ModelConfig, first_difference
from lsjax.data.tokenizer import TOKENIZER, Tokenizer, load_tokenizer
from lsjax.errors import UserError
from lsjax.files import make_folder, read_json, write_atomically

CONFIG, DATA = "config.json", "data"

# What may change when a run resumes: the mesh, and how often to save and evaluate.
_FREE_SECTIONS = ("mesh", "checkpoint", "evaluation")


def check_free(workdir: Path, config: Config) -> None:
    """Raises UserError when `workdir` cannot be written, or names the first key in which it is another run's."""
    make_folder(workdir, "workdir")
    path = Path(workdir) / CONFIG
    if path.exists():
        if not is_run(workdir):
            raise UserError(f"{workdir} holds a model, not a run: start from it with config.initial_model={workdir}")
        fixed = lambda c: {key: value for key, value in c.to_dict().items() if key not in _FREE_SECTIONS}  # noqa: E731
        if difference := first_difference(fixed(read_config(workdir)), fixed(config), "config"):
            name, old, new = difference
            raise UserError(
                f"{workdir} holds another run: {name} was {old!r} there and is {new!r} now; use another --workdir or "
                "the same config"
            )


def claim(workdir: Path, config: Config, tokenizer: Tokenizer) -> None:
    """Makes `workdir` this run's, once everything it needs has been found good.

    Raises UserError when an earlier part of the run used another tokenizer (its data was removed and packed anew
    from other text).
    """
    path = Path(workdir) / TOKENIZER
    if path.exists() and load_tokenizer(path).backend.to_str() != tokenizer.backend.to_str():
        raise UserError(f"{path} is not the tokenizer of the packed data: the corpus has changed since the run began")
    tokenizer.save(workdir)
    write_atomically(Path(workdir) / CONFIG, json.dumps(config.to_dict(), indent=2))


def is_run(folder: Path) -> bool:
    """Whether it is a workdir, and not a Hugging Face folder or a converted model."""
    path = Path(folder) / CONFIG
    return path.is_file() and "training" in read_json(path)


def read_config(workdir: Path) -> Config:
    path = Path(workdir) / CONFIG
    if not path.is_file():
        raise UserError(f"{workdir} is not a training workdir: it has no {CONFIG}")
    return _parse(path, read_json(path))


def read_model_config(folder: Path) -> ModelConfig:
    """Of a workdir, or of a folder with a converted model, whose config.json has only the `model` section."""
    path = Path(folder) / CONFIG
    model = read_json(path).get("model")
    if model is None:
        raise UserError(f"{path} has neither a model section (lsjax) nor a model_type (Hugging Face)")
    sequence = {"sequence_length": model.get("context_length", 1)} if isinstance(model, dict) else {}
    return _parse(path, {"model": model, "training": sequence}).model


def write_model_config(folder: Path, config: ModelConfig) -> None:
    write_atomically(Path(folder) / CONFIG, json.dumps({"model": dataclasses.asdict(config)}, indent=2))


def _parse(path: Path, tree: dict) -> Config:
    try:
        return Config.from_dict(tree)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def data_directory(workdir: Path, config: Config) -> Path:
    return Path(config.data.directory) if config.data.directory else Path(workdir) / DATA
