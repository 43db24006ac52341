"""Reads, claims and checks the files of a training workdir: config.json and the tokenizer of one run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from lsjax.checks import differences
from lsjax.config import Config, ModelConfig
from lsjax.data.tokenizer import TOKENIZER, Tokenizer
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.errors import UserError
from lsjax.files import as_path, check_folder, path_of, read_json, write_atomically
from lsjax.io.base_model import BaseModel, write_base
from lsjax.io.checkpoints import FOLDER as CHECKPOINTS
from lsjax.io.checkpoints import finished_steps

CONFIG, DATA = "config.json", "data"

# Keys and sections that may change when a run resumes, because a step computes the same with any value of them.
_FREE = (
    "config.mesh",
    "config.checkpoint",
    "config.evaluation",
    "config.training.log_every_steps",
    "config.training.rematerialize",
    "config.training.attention",
    "config.training.loss_chunk",
    "config.training.scan_unroll",
)
_TOTAL_STEPS, _INITIAL_MODEL = "config.training.total_steps", "config.initial_model"

Change = tuple[str, Any, Any]  # key, old value, new value


def check_free(workdir: Path, config: Config) -> list[Change]:
    """Returns the keys that `config` changes in the run that `workdir` holds; none when it holds no run.

    Raises UserError when a run of `config` cannot write, start or resume in `workdir`.
    """
    check_folder(workdir, "workdir")
    path = path_of(workdir) / CONFIG
    if not path.exists():
        return []
    if not is_run(workdir):
        raise UserError(f"{workdir} holds a model, not a run: start from it with config.initial_model={workdir}")
    changes = differences(read_config(workdir).to_dict(), config.to_dict(), "config")
    for name, old, new in changes:
        if name == _TOTAL_STEPS:
            _check_total_steps(workdir, old, new)
        elif name == _INITIAL_MODEL and config.training.lora_rank:
            continue  # the base may have moved; training.start.find_base refuses another model
        elif not any(name == free or name.startswith(f"{free}.") for free in _FREE):
            raise UserError(
                f"{workdir} holds another run: {name} was {old!r} there and is {new!r} now; use the same config, or "
                f"another --workdir (with config.initial_model={workdir} it starts from this run's parameters)"
            )
    return changes


def _check_total_steps(workdir: Path, old: int, new: int) -> None:
    """Raises UserError when the schedules of a run are over, or would end before its latest checkpoint."""
    folder = path_of(workdir) / CHECKPOINTS
    step = max(finished_steps(folder), default=0) if folder.is_dir() else 0
    if step >= min(old, new):
        state = "is finished" if step >= old else f"is at step {step} already"
        raise UserError(
            f"{workdir} holds a run that {state}: {_TOTAL_STEPS} was {old} there and cannot become {new}; to train on "
            f"from its parameters, set config.initial_model={workdir} and another --workdir"
        )


def claim(workdir: Path, config: Config, tokenizer: Tokenizer, base: BaseModel | None = None) -> None:
    """Writes the tokenizer, config and base model of a run into `workdir`, when everything else has been checked.

    Raises UserError when an earlier part of the run used another tokenizer: then its packed data was removed and
    made again from other text.
    """
    path = path_of(workdir) / TOKENIZER
    if path.exists() and load_tokenizer(path).backend.to_str() != tokenizer.backend.to_str():
        raise UserError(f"{path} is not the tokenizer of the packed data: the corpus has changed since the run began")
    tokenizer.save(workdir)
    if base is not None:
        write_base(workdir, base)
    write_atomically(path_of(workdir) / CONFIG, json.dumps(config.to_dict(), indent=2))


def is_run(folder: Path) -> bool:
    """Returns whether a folder is a training workdir, not a Hugging Face folder or a converted model."""
    path = path_of(folder) / CONFIG
    return path.is_file() and "training" in read_json(path)


def holds_adapter(folder: Path) -> bool:
    """Returns whether the checkpoints of a workdir hold a LoRA adapter in place of a model."""
    training = read_json(path_of(folder) / CONFIG).get("training")
    return isinstance(training, dict) and bool(training.get("lora_rank"))


def read_config(workdir: Path) -> Config:
    """Reads the whole config of a run."""
    path = path_of(workdir) / CONFIG
    if not path.is_file():
        raise UserError(f"{workdir} is not a training workdir: it has no {CONFIG}")
    return _parse(path, read_json(path))


def adapted_exit(workdir: Path) -> int:
    """Returns the exit layer whose adapter a run trains; 0 for a run that trains none."""
    section = read_json(path_of(workdir) / CONFIG).get("layerskip")
    if not isinstance(section, dict) or section.get("exit_adapter", "none") == "none":
        return 0
    return read_config(workdir).layerskip.draft_exit


def read_model_config(folder: Path) -> ModelConfig:
    """Reads the model section of config.json in a workdir or in a converted model, which has only that section."""
    path = path_of(folder) / CONFIG
    model = read_json(path).get("model")
    if model is None:
        raise UserError(f"{path} has neither a model section (lsjax) nor a model_type (Hugging Face)")
    sequence = {"sequence_length": model.get("context_length", 1)} if isinstance(model, dict) else {}
    return _parse(path, {"model": model, "training": sequence}).model


def write_model_config(folder: Path, config: ModelConfig) -> None:
    """Writes the config.json of a converted model."""
    write_atomically(path_of(folder) / CONFIG, json.dumps({"model": dataclasses.asdict(config)}, indent=2))


def _parse(path: Path, tree: dict) -> Config:
    try:
        return Config.from_dict(tree)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def data_directory(workdir: Path, config: Config) -> Path:
    """Returns the folder of a run's packed data: config.data.directory, or else one inside the workdir."""
    given = config.data.directory
    return as_path(given, "config.data.directory") if given else path_of(workdir) / DATA
