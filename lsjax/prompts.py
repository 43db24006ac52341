"""Prompts for benchmarks: from a JSONL file, or from the text a run held out."""

import json
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from lsjax.data.packing import read_manifest, record_path
from lsjax.errors import UserError
from lsjax.training import workdir as workdirs


def read_prompts(path: Path) -> list[str]:
    """One prompt a line: {"prompt": TEXT}."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read prompts {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"prompts {path} is not UTF-8 text") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompt = json.loads(line)["prompt"] if line.strip() else ...
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(f'{path}:{number}: want {{"prompt": TEXT}}') from None
        if prompt is ...:  # an empty line
            continue
        if not isinstance(prompt, str) or not prompt:
            raise UserError(f'{path}:{number}: "prompt" must be a non-empty text')
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{path} has no prompts")
    return prompts


def held_out_prompts(workdir: Path, count: int, tokens: int) -> list[list[int]]:
    """The first `tokens` of `count` sequences spread evenly over the text that the run in `workdir` held out."""
    if not workdirs.is_run(workdir):
        raise UserError(f"{workdir} is no training workdir, so it has no held-out text: give --prompt or --prompts")
    directory = workdirs.data_directory(workdir, workdirs.read_config(workdir))
    manifest = read_manifest(directory)
    if manifest is None:
        raise UserError(f"{workdir} has no held-out data ({directory} is missing): give --prompt or --prompts")
    length = manifest["request"]["sequence_length"]
    reader = ArrayRecordReader(str(record_path(directory, "held_out")))
    try:
        total = reader.num_records()
        records = reader.read([index * total // count for index in range(count)])
    finally:
        reader.close()
    windows = (np.frombuffer(record, np.int32).reshape(2, length + 1) for record in records)
    return [window[0, : min(tokens, length)].tolist() for window in windows]
