"""Trains every recipe from every seed, one after another, and measures the results; every run can be resumed."""

import dataclasses
import json
import math
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.benchmarks.decoding import benchmark
from lsjax.benchmarks.prompts import held_out_prompts
from lsjax.config import Config
from lsjax.data.batch import Batch
from lsjax.data.pipeline import training_batches
from lsjax.decoding.model import load
from lsjax.errors import UserError
from lsjax.experiments.ablation.recipes import Recipe
from lsjax.experiments.ablation.recipes import recipes as all_recipes
from lsjax.experiments.sweep import Grid, default_exit_layers
from lsjax.files import make_folder, own_results, read_json, write_atomically
from lsjax.io.workdir import check_free
from lsjax.parallel.sharding import make_mesh
from lsjax.training.loop import train
from lsjax.training.metrics import read_complete_lines
from lsjax.training.step import StepMetrics, TrainState, init_state, make_train_step

_TIMED_ROUNDS = 5
_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 16, 64, 64
_NUM_SPECULATIONS = (2, 4)


def check(config: Config) -> None:
    """Raises UserError for a configuration that could not be measured after training."""
    if config.evaluation.exit_stride != 1:
        raise UserError(
            f"config.evaluation.exit_stride is {config.evaluation.exit_stride}: set it to 1, since an ablation "
            "compares every exit"
        )
    needed = min(_PROMPT_TOKENS, config.training.sequence_length) + _NEW_TOKENS
    if needed > config.model.context_length:
        raise UserError(
            f"an ablation decodes {needed} tokens: raise config.model.context_length, {config.model.context_length}"
        )


def run_all(
    config: Config, workdir: Path, recipes: Sequence[Recipe], seeds: Sequence[int], note: Callable[[str], None] = print
) -> signal.Signals | None:
    """Trains and measures everything; writes WORKDIR/RECIPE/seedN/result.json and WORKDIR/step_times.json.

    Returns the signal that interrupted it, if one did.
    """
    check(config)
    if not config.data.directory:  # shared by all runs
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, directory=str(workdir / "data")))
    for recipe in recipes:
        for seed in seeds:
            check_free(workdir / recipe.name / f"seed{seed}", recipe.config(config, seed))
    read_step_times(workdir)  # a damaged file is refused before hours of training
    make_folder(workdir, "workdir")
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
        if interrupted := _run(recipe.config(config, seed), folder, note):
            return interrupted
        done += 1
    measure_step_times(config, workdir, recipes, note)
    return None


def is_done(folder: Path) -> bool:
    """Returns whether the run in a folder was trained and measured."""
    return (folder / "result.json").is_file()


def _run(config: Config, folder: Path, note: Callable[[str], None]) -> signal.Signals | None:
    result = train(config, folder)
    if result.profile is None:
        return result.interrupted
    prompts = held_out_prompts(folder, _PROMPTS, min(_PROMPT_TOKENS, config.training.sequence_length))
    strategies = Grid(default_exit_layers(config.model.num_layers), _NUM_SPECULATIONS).strategies()
    report = benchmark(load(folder), prompts, strategies, max_new_tokens=_NEW_TOKENS, repeats=1, note=note)
    profile = {name: np.asarray(values).tolist() for name, values in result.profile._asdict().items()}
    runs = [run for run in report["runs"] if run["strategy"] == "self_speculative"]
    result = {"profile": profile, "decoding": runs, "evaluations": _evaluations(folder)}
    write_atomically(folder / "result.json", json.dumps(result))
    return None


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in read_complete_lines(folder / "evaluations.jsonl")]


def read_step_times(workdir: Path) -> dict[str, float]:
    """Returns the seconds per training step of each recipe that were measured before.

    Raises UserError when the file is damaged.
    """
    path = workdir / "step_times.json"
    times = read_json(path) if path.exists() else {}
    with own_results(path):
        if wrong := [seconds for seconds in times.values() if type(seconds) is not float or not 0 < seconds < math.inf]:
            raise ValueError(f"{wrong[0]!r} is not a number of seconds")
    return times


def measure_step_times(
    config: Config, workdir: Path, recipes: Sequence[Recipe], note: Callable[[str], None]
) -> dict[str, float]:
    """Returns the seconds per training step of each recipe, and keeps them in WORKDIR/step_times.json.

    Recipes take turns in rounds that are spread over the course of training, each a whole rotation of exits. When the
    file lacks a recipe, all are measured again, including those that it holds, so that they stay comparable.
    """
    known = read_step_times(workdir)
    if all(recipe.name in known for recipe in recipes):
        return known
    wanted = [r for r in all_recipes(config.model.num_layers).values() if r in recipes or r.name in known]
    mesh, t, d = make_mesh(config.mesh), config.training, config.data
    options = {"mixture": d.mixture, "separate_documents": d.separate_documents}
    batch = next(training_batches(Path(d.directory), t.batch_size, t.sequence_length, 0, **options))
    with jax.set_mesh(mesh):
        runs = {}
        for recipe in wanted:
            note(f"timing the step of {recipe.name}: compiling")
            own_config = recipe.config(config, 0)
            runs[recipe.name] = _TimedRun(make_train_step(own_config, mesh), init_state(own_config))
            runs[recipe.name].time_steps(batch, count=1, first_step=0)
        count = math.lcm(*(recipe.config(config, 0).layerskip.exit_rotation for recipe in wanted))
        note(f"timing {len(wanted)} steps, {_TIMED_ROUNDS} rounds of {count}")
        times = [
            {name: run.time_steps(batch, count, t.total_steps * index // _TIMED_ROUNDS) for name, run in runs.items()}
            for index in range(_TIMED_ROUNDS)
        ]
    # The mean over the course of training, because the number of dropped layers depends on the step.
    means = {name: statistics.mean(one[name] for one in times) / count for name in runs}
    write_atomically(workdir / "step_times.json", json.dumps(means))
    return means


@dataclasses.dataclass
class _TimedRun:
    """A training run whose steps are timed. state: replaced by the next one, since a step donates it."""

    step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
    state: TrainState

    def time_steps(self, batch: Batch, count: int, first_step: int) -> float:
        """Returns the seconds that `count` steps take, as if training were at `first_step`."""
        state = jax.block_until_ready(self.state._replace(step=jnp.full_like(self.state.step, first_step)))
        began = time.monotonic()
        for _ in range(count):
            state, metrics = self.step(state, batch)
        jax.block_until_ready((state, metrics))
        self.state = state
        return time.monotonic() - began
