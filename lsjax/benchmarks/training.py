"""Times a training step beside the same step of others: same weights, batches, schedules and random numbers."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lsjax.benchmarks.torch_baseline import StepInputs, step_inputs
from lsjax.config import Config, MeshConfig
from lsjax.data.batch import Batch
from lsjax.parallel.sharding import batch_sharding, make_mesh
from lsjax.training.step import init_state, make_train_step, state_shardings

Step = Callable[[StepInputs], float]  # makes one update, and returns the loss before it
MakeBaselines = Callable[[Any], dict[str, Step]]  # from our first parameters to the baselines' steps by name

_SECONDS_BETWEEN_NOTES = 10.0


def random_batch(config: Config, seed: int) -> Batch:
    """Returns a batch of random tokens; a step on them takes as long as one on text.

    Each sequence holds three documents, unless config.data.separate_documents is off.
    """
    t, rng = config.training, np.random.default_rng(seed)
    batch_size, length = t.batch_size, t.sequence_length
    tokens = rng.integers(0, config.model.vocab_size, (batch_size, length + 1), np.int32)
    cuts = np.sort(rng.integers(0, length, (batch_size, 2)), axis=1)
    place = np.arange(length)
    ids = (place[None, :, None] >= cuts[:, None]).sum(-1)
    starts = np.take_along_axis(np.pad(cuts, ((0, 0), (1, 0))), ids, axis=1)
    separate = config.data.separate_documents
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=np.ones((batch_size, length), np.float32),
        positions=(place - starts).astype(np.int32) if separate else None,
        segment_ids=ids.astype(np.int32) if separate else None,
    )


class JaxTraining:
    """A training run with the step of the train command, on one device."""

    def __init__(self, config: Config):
        self.mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
        with jax.set_mesh(self.mesh):
            self.state = jax.jit(lambda: init_state(config), out_shardings=state_shardings(config, self.mesh))()
        self.jitted = make_train_step(config, self.mesh)
        self.compiled: Any = None  # from the first step on

    def step(self, inputs: StepInputs) -> float:
        """Makes one update, and returns the loss before it."""
        with jax.set_mesh(self.mesh):
            batch = jax.device_put(inputs.batch, batch_sharding(self.mesh))
            self.compiled = self.compiled or self.jitted.lower(self.state, batch).compile()
            self.state, metrics = self.compiled(self.state, batch)
        return float(jax.block_until_ready((self.state, metrics))[1].loss)

    def memory(self) -> int:
        """Returns the bytes that the compiled step needs: state, batch, gradients and activations."""
        sizes = self.compiled.memory_analysis()
        return (
            sizes.argument_size_in_bytes
            + sizes.temp_size_in_bytes
            + sizes.output_size_in_bytes
            - sizes.alias_size_in_bytes
        )


def benchmark_training(
    config: Config,
    steps: int,
    warmup: int,
    baselines: MakeBaselines | None = None,
    variants: Mapping[str, Config] | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Times `steps` training steps of ours, of each variant and of each baseline, which take turns at every step.

    All begin at step 0. The first `warmup` steps, which include compilation, are not timed.
    baselines: is given our first parameters, and returns the baselines' steps by name.
    variants: other configurations of our own step, by name.
    note: receives lines of progress.

    Returns {"runs": [{"name", "seconds", "ms_per_step", "tokens_per_second", "times_ours", "memory", "losses"}, ...],
    ...}. `ms_per_step` is the median over the steps. `times_ours` is the median over the steps of the other's time
    divided by our time for the same step. `memory` is in bytes, and null for baselines.
    """
    own = {name: JaxTraining(settings) for name, settings in ({"lsjax": config} | dict(variants or {})).items()}
    step_of: dict[str, Step] = {name: training.step for name, training in own.items()}
    step_of |= baselines(jax.device_get(own["lsjax"].state.params)) if baselines else {}
    seconds: dict[str, list[float]] = {name: [] for name in step_of}
    losses: dict[str, list[float]] = {name: [] for name in step_of}
    progress = _Progress(warmup, steps, note)
    for number in range(warmup + steps):
        inputs = step_inputs(number, random_batch(config, number), config)
        for name in _rotate(list(step_of), number):
            progress.before(number, name)
            began = time.perf_counter()
            losses[name].append(step_of[name](inputs))
            seconds[name].append(time.perf_counter() - began)
        progress.after(number, seconds)
    tokens = config.training.batch_size * config.training.sequence_length
    timed = {name: taken[warmup:] for name, taken in seconds.items()}
    runs = [_run(name, taken, timed["lsjax"], losses[name], tokens) for name, taken in timed.items()]
    for run in runs:
        run["memory"] = own[run["name"]].memory() if run["name"] in own else None
    return {"device": jax.devices()[0].device_kind, "steps": steps, "warmup": warmup, "runs": runs}


class _Progress:
    """Lines of progress: one before the first step of each, which compiles, then one per few seconds."""

    def __init__(self, warmup: int, steps: int, note: Callable[[str], None]):
        self.warmup, self.steps, self.note = warmup, steps, note
        self.said_at = time.monotonic()

    def before(self, number: int, name: str) -> None:
        """Announces a first step, since compilation may take minutes."""
        if number == 0:
            self.note(f"compiling and running the first step of {name}")

    def after(self, number: int, seconds: dict[str, list[float]]) -> None:
        """Reports the seconds per step so far: after the first and the last step, and in between now and then."""
        total, now = self.warmup + self.steps, time.monotonic()
        if 0 < number < total - 1 and now - self.said_at < _SECONDS_BETWEEN_NOTES:
            return
        self.said_at = now
        kind = "warm-up " if number < self.warmup else ""
        last = ", ".join(f"{name} {taken[-1]:.3g} s" for name, taken in seconds.items())
        self.note(f"{kind}step {number + 1}/{total}: {last}")


def _rotate(names: list[str], number: int) -> list[str]:
    """Rotates the order, so that each goes first equally often."""
    first = number % len(names)
    return names[first:] + names[:first]


def _run(name: str, taken: Sequence[float], ours: Sequence[float], losses: list[float], tokens: int) -> dict[str, Any]:
    median = statistics.median(taken)
    return {
        "name": name,
        "seconds": taken,
        "ms_per_step": 1e3 * median,
        "tokens_per_second": tokens / median,
        "times_ours": statistics.median(a / b for a, b in zip(taken, ours, strict=True)),
        "losses": losses,
    }
