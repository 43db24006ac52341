"""Held-out text: how many bits a model needs per byte, at its last layer or at an exit."""

import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from lsjax.config import ModelConfig
from lsjax.data.batch import Batch
from lsjax.data.examples import all_learned
from lsjax.data.jsonl import LONGEST_LINE, is_jsonl, read_jsonl, text_of
from lsjax.data.packed import held_out_splits, read_manifest
from lsjax.data.packers import Packer
from lsjax.data.pipeline import held_out_batches, unpack
from lsjax.data.tokenizer import Tokenizer
from lsjax.errors import UserError
from lsjax.evaluation.exits import evaluate_batch
from lsjax.io import workdir as workdirs
from lsjax.model.transformer import Params

_LONGEST_WINDOW = 512


class Window(NamedTuple):
    """One window of held-out text: its tokens as a batch of one row, and the bytes of its targets."""

    name: str
    batch: Batch
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class HeldOutText:
    """Windows of held-out text.

    path: a text file, or a JSONL file with a "text" per line. None takes what the model's training run held out.
    """

    path: Path | None = None

    def windows(self, model: Path, tokenizer: Tokenizer, config: ModelConfig) -> list[Window]:
        """Returns all windows. model: the path of the model, a training workdir if `path` is None.

        A character that the end of a window cuts counts as the three bytes of a replacement sign.
        """
        batches = _read_run(model) if self.path is None else _read_file(self.path, tokenizer, config)
        windows = [
            Window(f"window {number}", batch, num_bytes)
            for number, batch in enumerate(batches, 1)
            if (num_bytes := _num_bytes(batch, tokenizer))
        ]
        if not windows:
            raise UserError(f"{self.path or model} holds no text to evaluate")
        return windows


def window_bits(params: Params, window: Window, config: ModelConfig, exit_layer: int) -> float:
    """Returns the bits that a window's targets cost at an exit (exit_layer L: the last layer)."""
    exits = tuple(sorted({exit_layer, config.num_layers}))
    loss, *_ = evaluate_batch(params, window.batch, config, exits)
    return float(loss[exits.index(exit_layer)]) / math.log(2)


def _num_bytes(batch: Batch, tokenizer: Tokenizer) -> int:
    """Returns the bytes of the text of the targets that count; special tokens have none."""
    targets = np.asarray(batch.targets)[np.asarray(batch.weights) > 0]
    return len(tokenizer.decode(targets.tolist(), np.asarray(batch.tokens)[0, :1].tolist()).encode())


def _read_run(workdir: Path) -> list[Batch]:
    if not workdirs.is_run(workdir):
        raise UserError(f"{workdir} is not a training workdir, so it has no held-out text: give held_out_text:FILE")
    config = workdirs.read_config(workdir)
    directory = workdirs.data_directory(workdir, config)
    manifest = read_manifest(directory)
    if manifest is None:
        raise UserError(f"{workdir} has no held-out text ({directory} is missing): give held_out_text:FILE")
    length, split = config.training.sequence_length, held_out_splits(manifest)[0]
    return held_out_batches(directory, batch_size=1, sequence_length=length, max_batches=0, split=split)


def _read_file(path: Path, tokenizer: Tokenizer, config: ModelConfig) -> list[Batch]:
    length = min(_LONGEST_WINDOW, config.context_length)
    packer = Packer(length)
    windows = [
        window for tokens in tokenizer.encode_documents(_texts(path)) for window in packer.add(all_learned(tokens))
    ]
    rows = [unpack(window.tobytes(), length) for window in [*windows, *packer.finish()]]
    return [jax.tree.map(lambda column: column[None], row) for row in rows]


def _texts(path: Path) -> list[str]:
    if is_jsonl(path.name):
        return [text_of(row, "text", f"{path}:{number}") for number, row in read_jsonl(path)]
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(LONGEST_LINE)
        if len(text) == LONGEST_LINE:  # a pipe or a device may be without end
            raise UserError(f"{path} holds {LONGEST_LINE:,} characters or more: give a part of it")
        return [text]
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
