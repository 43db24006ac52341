"""Trains every recipe from every seed, one after another, each resumable, and measures what came of it."""

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.ablation.recipes import Recipe
from lsjax.ablation.recipes import recipes as all_recipes
from lsjax.config import Config
from lsjax.data.pipeline import training_batches
from lsjax.decoding.benchmark import benchmark
from lsjax.errors import UserError
from lsjax.files import make_folder, read_json, write_atomically
from lsjax.loading import load
from lsjax.prompts import held_out_prompts
from lsjax.scale.sharding import make_mesh
from lsjax.sweep import Grid, default_exit_layers
from lsjax.training.loop import train
from lsjax.training.metrics import read_complete_lines
from lsjax.training.step import init_state, make_train_step
from lsjax.training.workdir import check_free

_TIMED_ROUNDS = 5
_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 16, 64, 64
_NUM_SPECULATIONS = (2, 4)


def check(config: Config) -> None:
    """Raises UserError before anything is trained on a configuration that could not be measured afterwards."""
    if config.evaluation.exit_stride != 1:
        raise UserError(
            f"config.evaluation.exit_stride is {config.evaluation.exit_stride}; an ablation reads every exit: 1"
        )
    needed = min(_PROMPT_TOKENS, config.training.sequence_length) + _NEW_TOKENS
    if needed > config.model.context_length:
        raise UserError(
            f"an ablation decodes {needed} tokens; config.model.context_length is {config.model.context_length}"
        )


def run_all(
    config: Config, workdir: Path, recipes: Sequence[Recipe], seeds: Sequence[int], note: Callable[[str], None] = print
) -> bool:
    """Leaves WORKDIR/RECIPE/seedN/result.json of each, and WORKDIR/step_times.json. False when interrupted."""
    check(config)
    make_folder(workdir, "workdir")
    if not config.data.directory:  # one for all runs
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, directory=str(workdir / "data")))
    for recipe in recipes:
        for seed in seeds:
            check_free(workdir / recipe.name / f"seed{seed}", recipe.config(config, seed))
    runs = [(recipe, seed) for seed in seeds for recipe in recipes]
    began, done = time.monotonic(), 0
    for index, (recipe, seed) in enumerate(runs, 1):
        folder = workdir / recipe.name / f"seed{seed}"
        left = (
            f", about {(time.monotonic() - began) / done * (len(runs) - index + 1) / 60:.0f} min left" if done else ""
        )
        if is_done(folder):
            note(f"{index}/{len(runs)} {recipe.name}, seed {seed}: done before")
            continue
        note(f"\n{index}/{len(runs)} {recipe.name}, seed {seed}: {recipe.about}{left}")
        if not _run(recipe.config(config, seed), folder, note):
            return False
        done += 1
    measure_step_times(config, workdir, recipes, note)
    return True


def is_done(folder: Path) -> bool:
    return (folder / "result.json").is_file()


def _run(config: Config, folder: Path, note: Callable[[str], None]) -> bool:
    result = train(config, folder)
    if result.profile is None:
        return False
    prompts = held_out_prompts(folder, _PROMPTS, min(_PROMPT_TOKENS, config.training.sequence_length))
    strategies = Grid(default_exit_layers(config.model.num_layers), _NUM_SPECULATIONS).strategies()
    report = benchmark(load(folder), prompts, strategies, max_new_tokens=_NEW_TOKENS, repeats=1, note=note)
    profile = {name: np.asarray(values).tolist() for name, values in result.profile._asdict().items()}
    runs = [run for run in report["runs"] if run["strategy"] == "self_speculative"]
    result = {"profile": profile, "decoding": runs, "evaluations": _evaluations(folder)}
    write_atomically(folder / "result.json", json.dumps(result))
    return True


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in read_complete_lines(folder / "evaluations.jsonl")]


def measure_step_times(
    config: Config, workdir: Path, recipes: Sequence[Recipe], note: Callable[[str], None]
) -> dict[str, float]:
    """Seconds a training step of each recipe, from interleaved rounds spread over the run, each a whole rotation of
    exits. WORKDIR/step_times.json keeps them; when one is missing all are measured again, those it holds too."""
    path = workdir / "step_times.json"
    held = read_json(path) if path.exists() else {}
    if all(recipe.name in held for recipe in recipes):
        return held
    wanted = [r for r in all_recipes(config.model.num_layers).values() if r in recipes or r.name in held]
    mesh, t, d = make_mesh(config.mesh), config.training, config.data
    batch = next(
        training_batches(Path(d.directory), t.batch_size, t.sequence_length, 0, separate_documents=d.separate_documents)
    )
    with jax.set_mesh(mesh):
        runs = {}
        for recipe in wanted:
            note(f"timing the step of {recipe.name}: compiling")
            ours = recipe.config(config, 0)
            runs[recipe.name] = [make_train_step(ours, mesh), init_state(ours)]
            _steps(runs[recipe.name], batch, 1, 0)
        count = math.lcm(*(recipe.config(config, 0).layerskip.exit_rotation for recipe in wanted))
        note(f"timing {len(wanted)} steps, {_TIMED_ROUNDS} rounds of {count}")
        times = [
            {name: _steps(run, batch, count, t.total_steps * index // _TIMED_ROUNDS) for name, run in runs.items()}
            for index in range(_TIMED_ROUNDS)
        ]
    # A mean over the course of training: how many layers are dropped depends on the step.
    means = {name: statistics.mean(one[name] for one in times) / count for name in runs}
    write_atomically(path, json.dumps(means))
    return means


def _steps(run: list, batch, count: int, first_step: int) -> float:
    """Seconds of `count` steps. run: [step function, state], the state replaced by the next."""
    step, state = run
    state = jax.block_until_ready(state._replace(step=jnp.full_like(state.step, first_step)))
    began = time.monotonic()
    for _ in range(count):
        state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    run[1] = state
    return time.monotonic() - began
