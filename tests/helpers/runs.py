"""Configurations and batches for tests that train a small model."""

import dataclasses

import numpy as np

from lsjax.data.batch import Batch
from lsjax.io.open import read_model_config


def replace(config, **sections):
    """Returns the configuration with other keys in the sections named."""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **keys) for name, keys in sections.items()}
    )


def make_batch(config, seed=0):
    """Returns random tokens of the shape that a configuration trains on; a tenth of them has weight 0."""
    t = config.training
    rng = np.random.default_rng(seed)
    shape = (t.batch_size, t.sequence_length)
    tokens = rng.integers(0, config.model.vocab_size, shape).astype(np.int32)
    return Batch(
        tokens=tokens,
        targets=np.roll(tokens, -1, axis=1),
        weights=(rng.random(shape) < 0.9).astype(np.float32),
        positions=np.broadcast_to(np.arange(t.sequence_length, dtype=np.int32), shape),
        segment_ids=np.zeros(shape, np.int32),
    )


def continuing(tiny_run, path):
    """Returns tiny_run from the model at `path` and without dropout, so that the first loss is the model's own."""
    return dataclasses.replace(
        tiny_run,
        model=read_model_config(path),
        initial_model=str(path),
        layerskip=dataclasses.replace(tiny_run.layerskip, dropout_max_rate=0.0),
        training=dataclasses.replace(tiny_run.training, total_steps=4),
    )
