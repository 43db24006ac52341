"""Compares every exit of a pretrained model before and after continual training with LayerSkip."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np

from lsjax.config import Config
from lsjax.data.packed import held_out_splits, read_manifest
from lsjax.data.pipeline import held_out_batches
from lsjax.data.prepare import prepare
from lsjax.decoding.model import Model, load
from lsjax.evaluation.exits import ExitProfile, evaluated_exits, exit_profile
from lsjax.files import disk_path, own_results, read_json, write_atomically
from lsjax.generation import generate
from lsjax.io.workdir import check_free, data_directory
from lsjax.reports.figures import draw_comparison
from lsjax.reports.tables import comparison_table, print_table
from lsjax.training.loop import train

QUESTION = "What is the capital of France?"


def run_continual_demo(config: Config, workdir: str | Path) -> signal.Signals | None:
    """Asks the initial model a question, measures its exits, trains (or resumes), and measures them again.

    Prints both measurements side by side, and writes before.json, after.json and exits.png to `workdir`. Returns the
    signal that interrupted training, if one did.
    """
    workdir = disk_path(workdir, "workdir")
    model = load(config.initial_model)
    print(f"\n{config.initial_model}: {model.config.num_layers} layers of width {model.config.width}")
    print(f"question: {QUESTION}\nanswer: {answer(model, QUESTION)}\n")

    check_free(workdir, config)
    before = _profile_once(workdir / "before.json", model, config, workdir)
    del model
    print_table(comparison_table({"before": before}))
    result = train(config, workdir)
    if result.profile is None:  # the same command resumes
        return result.interrupted
    _write_profile(workdir / "after.json", result.profile, config.evaluation.max_batches)
    print_table(comparison_table({"before": before, "after": result.profile}))
    change = result.profile.loss[-1] / before.loss[-1] - 1
    print(f"last layer's held-out loss: {change:+.1%}")
    draw_comparison(workdir / "exits.png", {"before": before, "after": result.profile})
    print(f"picture: {workdir / 'exits.png'}")
    print(f"the question again: {answer(load(workdir), QUESTION)}")
    return None


def answer(model: Model, question: str, max_new_tokens: int = 48) -> str:
    """Returns the model's greedy answer, asked through its own chat template."""
    prompt = model.tokenizer.encode_chat([{"role": "user", "content": question}])
    return generate(model, [prompt], max_new_tokens).text[0].strip()


def _profile_once(path: Path, model: Model, config: Config, workdir: Path) -> ExitProfile:
    """Measures the initial model's exits on the run's held-out text. A resumed run reads the file, to save minutes."""
    exits = list(evaluated_exits(config.model.num_layers, config.evaluation.exit_stride, model.exit_adapter))
    tree = read_json(path) if path.exists() else {}
    if tree.get("exit_layers") == exits and tree.get("max_batches") == config.evaluation.max_batches:
        with own_results(path):
            return profile_from(tree)
    directory = data_directory(workdir, config)
    prepare(config, directory, given=model.tokenizer)
    profile = measure_exits(model, config, directory)
    _write_profile(path, profile, config.evaluation.max_batches)
    return profile


def measure_exits(model: Model, config: Config, directory: Path) -> ExitProfile:
    """Measures a model's exits on prepared held-out text, as training with `config` does."""
    print(f"measuring exits of {model.path} on held-out text ...", flush=True)
    manifest = read_manifest(directory)
    assert manifest is not None, "the data are prepared"
    t, e = config.training, config.evaluation
    batches = held_out_batches(
        directory,
        t.batch_size,
        t.sequence_length,
        e.max_batches,
        None,
        config.data.separate_documents,
        held_out_splits(manifest)[0],
    )
    return exit_profile(model.stack_params(), batches, model.config, e.exit_stride, exit_adapter=model.exit_adapter)


def profile_tree(profile: ExitProfile) -> dict[str, Any]:
    """Returns a profile as lists, for a JSON file."""
    return {name: np.asarray(values).tolist() for name, values in profile._asdict().items()}


def profile_from(tree: dict[str, Any]) -> ExitProfile:
    """Returns the profile that `profile_tree` made."""
    columns = [np.array(tree[name]) for name in ExitProfile._fields]
    if any(column.shape != columns[0].shape or column.dtype.kind not in "iuf" for column in columns):
        raise ValueError("its columns are not numbers, one per exit")
    return ExitProfile(*columns)


def _write_profile(path: Path, profile: ExitProfile, max_batches: int) -> None:
    write_atomically(path, json.dumps(profile_tree(profile) | {"max_batches": max_batches}))
