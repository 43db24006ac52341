"""A pretrained model before and after a continual LayerSkip run: what every exit predicts, side by side."""

import json
from pathlib import Path

import numpy as np

from lsjax.config import Config
from lsjax.data.packing import prepare
from lsjax.data.pipeline import held_out_batches
from lsjax.decoding.generate import generate
from lsjax.evaluation.exits import ExitProfile, evaluated_exits, exit_profile
from lsjax.evaluation.figures import draw_comparison
from lsjax.evaluation.tables import comparison_table, print_table
from lsjax.files import read_json, write_atomically
from lsjax.loading import Model, load
from lsjax.training.loop import train
from lsjax.training.workdir import check_free, data_directory

QUESTION = "What is the capital of France?"


def run_continual_demo(config: Config, workdir: str | Path) -> None:
    """Asks the initial model a question, measures its exits, trains (or resumes), and measures them again.

    Prints both tables side by side; leaves before.json, after.json and exits.png in `workdir`.
    """
    workdir = Path(workdir)
    model = load(config.initial_model)
    print(f"\n{config.initial_model}: {model.config.num_layers} layers of width {model.config.width}")
    print(f"question: {QUESTION}\nanswer: {answer(model, QUESTION)}\n")

    check_free(workdir, config)
    before = _profile_once(workdir / "before.json", model, config, workdir)
    del model
    print_table(comparison_table({"before": before}))
    result = train(config, workdir)
    if result.profile is None:  # interrupted: the same command goes on
        return
    _write_profile(workdir / "after.json", result.profile, config.evaluation.max_batches)
    print_table(comparison_table({"before": before, "after": result.profile}))
    change = result.profile.loss[-1] / before.loss[-1] - 1
    print(f"last layer's held-out loss: {change:+.1%}")
    draw_comparison(workdir / "exits.png", {"before": before, "after": result.profile})
    print(f"picture: {workdir / 'exits.png'}")
    print(f"the question again: {answer(load(workdir), QUESTION)}")


def answer(model: Model, question: str, max_new_tokens: int = 48) -> str:
    """Greedy, through the model's own chat template."""
    prompt = model.tokenizer.encode_chat([{"role": "user", "content": question}])
    return generate(model, [prompt], max_new_tokens).text[0].strip()


def _profile_once(path: Path, model: Model, config: Config, workdir: Path) -> ExitProfile:
    """Of the initial model on the run's held-out text; it takes minutes, so a resumed run reads it back."""
    exits = list(evaluated_exits(config.model.num_layers, config.evaluation.exit_stride))
    tree = read_json(path) if path.exists() else {}
    if tree.get("exit_layers") == exits and tree.get("max_batches") == config.evaluation.max_batches:
        return ExitProfile(*(np.array(tree[name]) for name in ExitProfile._fields))
    directory = data_directory(workdir, config)
    prepare(config, directory, given=model.tokenizer)
    t, e = config.training, config.evaluation
    print(f"measuring exits of {config.initial_model} on held-out text ...", flush=True)
    batches = held_out_batches(
        directory, t.batch_size, t.sequence_length, e.max_batches, None, config.data.separate_documents
    )
    profile = exit_profile(model.params, batches, model.config, e.exit_stride)
    _write_profile(path, profile, e.max_batches)
    return profile


def _write_profile(path: Path, profile: ExitProfile, max_batches: int) -> None:
    tree = {name: np.asarray(values).tolist() for name, values in profile._asdict().items()}
    write_atomically(path, json.dumps(tree | {"max_batches": max_batches}))
