"""Prompts for benchmarks: from a JSONL file, or from the text that a training run held out."""

from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from lsjax.data.jsonl import read_jsonl
from lsjax.data.packed import NO_DOCUMENT, held_out_splits, read_manifest
from lsjax.data.pipeline import read_records
from lsjax.data.tokenizer import check_text
from lsjax.errors import UserError
from lsjax.files import path_of
from lsjax.io import workdir as workdirs


class PromptLine(NamedTuple):
    """A line of a file of prompts. place: FILE:LINE. row: its other keys."""

    prompt: str
    place: str
    row: dict[str, Any]


def read_prompts(path: Path) -> list[str]:
    """Reads the prompts of a JSONL file, as `read_prompt_lines` does."""
    return [line.prompt for line in read_prompt_lines(path)]


def read_prompt_lines(path: Path) -> list[PromptLine]:
    """Reads a JSONL file with one prompt per line, {"prompt": TEXT}, and maybe other keys.

    Raises UserError, with file and line, for anything else.
    """
    lines = []
    for number, row in read_jsonl(path_of(path)):
        if not row.get("prompt"):
            raise UserError(f'{path}:{number}: "prompt" must be a non-empty text')
        prompt = check_text(row.pop("prompt"), f'{path}:{number}: "prompt"')
        lines.append(PromptLine(prompt, f"{path}:{number}", row))
    if not lines:
        raise UserError(f'{path} holds no prompts: put one {{"prompt": TEXT}} per line')
    return lines


def held_out_prompts(workdir: Path, count: int, tokens: int) -> list[list[int]]:
    """Returns the first `tokens` tokens of `count` sequences, spread evenly over the held-out text of a run.

    Raises UserError when `workdir` is no training workdir, or its data is gone.
    """
    if not workdirs.is_run(workdir):
        raise UserError(f"{workdir} is not a training workdir, so it has no held-out text: give --prompt or --prompts")
    directory = workdirs.data_directory(workdir, workdirs.read_config(workdir))
    if read_manifest(directory) is None:
        raise UserError(f"{workdir} has no held-out data ({directory} is missing): give --prompt or --prompts")
    return prompts_of_data(directory, count, tokens)


def prompts_of_data(directory: Path, count: int, tokens: int) -> list[list[int]]:
    """Returns prompts as `held_out_prompts` does, from a folder of prepared data."""
    manifest = read_manifest(directory)
    assert manifest is not None, "the data are prepared"
    length = manifest["request"]["sequence_length"]
    stored = read_records(directory, held_out_splits(manifest)[0])
    records = [cast(bytes, stored[index * len(stored) // count]) for index in range(count)]
    windows = (np.frombuffer(record, np.int32).reshape(-1, length + 1)[:2, : min(tokens, length)] for record in records)
    return [ids[owners != NO_DOCUMENT].tolist() for ids, owners in windows]
