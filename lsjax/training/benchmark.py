"""How long a training step takes, beside the same step of others: same weights, batches, schedules and chance."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lsjax.config import Config, MeshConfig
from lsjax.data.batch import Batch
from lsjax.scale.sharding import batch_sharding, make_mesh
from lsjax.training.rivals import Turn, turn_at
from lsjax.training.step import init_state, make_train_step, state_shardings

Step = Callable[[Turn], float]  # one update; the loss before it


def random_batch(config: Config, seed: int) -> Batch:
    """Random words; rows of three documents, unless config.data.separate_documents is off. A step on them takes as
    long as one on text."""
    t, rng = config.training, np.random.default_rng(seed)
    rows, length = t.batch_size, t.sequence_length
    words = rng.integers(0, config.model.vocab_size, (rows, length + 1), np.int32)
    cuts = np.sort(rng.integers(0, length, (rows, 2)), axis=1)
    place = np.arange(length)
    ids = (place[None, :, None] >= cuts[:, None]).sum(-1)
    starts = np.take_along_axis(np.pad(cuts, ((0, 0), (1, 0))), ids, axis=1)
    documents = ((place - starts).astype(np.int32), ids.astype(np.int32)) if config.data.separate_documents else ()
    return Batch(words[:, :-1], words[:, 1:], np.ones((rows, length), np.float32), *documents)


class OurTraining:
    """The step of launch/train.py on one device."""

    def __init__(self, config: Config):
        self.mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
        with jax.set_mesh(self.mesh):
            self.state = jax.jit(lambda: init_state(config), out_shardings=state_shardings(config, self.mesh))()
        self.run = make_train_step(config, self.mesh)

    def step(self, turn: Turn) -> float:
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.run(self.state, jax.device_put(turn.batch, batch_sharding(self.mesh)))
        return float(jax.block_until_ready((self.state, metrics))[1].loss)


def benchmark_training(config: Config, steps: int, warmup: int, rivals: Callable[[Any], dict[str, Step]]) -> dict:
    """{"runs": [{"name", "seconds", "ms_per_step", "tokens_per_second", "times_ours", "losses"}, ...], ...}.

    `rivals` is given our first parameters. All take step 0, then step 1, and so on, in turns; the first `warmup`
    steps, compilation among them, are not timed. Seconds are a step's median; `times_ours` is the median over the
    steps of their time over ours for that very step.
    """
    ours = OurTraining(config)
    contestants = {"lsjax": ours.step} | rivals(jax.device_get(ours.state.params))
    seconds = {name: [] for name in contestants}
    losses = {name: [] for name in contestants}
    for number in range(warmup + steps):
        turn = turn_at(number, random_batch(config, number), config)
        for name in _in_turns(list(contestants), number):
            began = time.perf_counter()
            losses[name].append(contestants[name](turn))
            seconds[name].append(time.perf_counter() - began)
    tokens = config.training.batch_size * config.training.sequence_length
    timed = {name: taken[warmup:] for name, taken in seconds.items()}
    runs = [_run(name, taken, timed["lsjax"], losses[name], tokens) for name, taken in timed.items()]
    return {"device": jax.devices()[0].device_kind, "steps": steps, "warmup": warmup, "runs": runs}


def _in_turns(names: list[str], number: int) -> list[str]:
    """Each goes first in its turn."""
    first = number % len(names)
    return names[first:] + names[:first]


def _run(name: str, taken: Sequence[float], ours: Sequence[float], losses: list[float], tokens: int) -> dict[str, Any]:
    typical = statistics.median(taken)
    return {
        "name": name,
        "seconds": taken,
        "ms_per_step": 1e3 * typical,
        "tokens_per_second": tokens / typical,
        "times_ours": statistics.median(a / b for a, b in zip(taken, ours, strict=True)),
        "losses": losses,
    }
