"""A training step in PyTorch gives our losses step after step, so gradients and updates are the same."""

import dataclasses

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from lsjax.benchmarks.torch_baseline import TorchTraining, step_inputs
from lsjax.benchmarks.training import JaxTraining, random_batch
from lsjax.config import Config
from lsjax.errors import UserError
from tests.conftest import TINY

RECIPES = {
    "paper": {"exit_scale": 1.0, "exit_curriculum": "all", "dropout_max_rate": 0.3},
    "batch": {"dropout_granularity": "batch", "dropout_max_rate": 0.5, "exit_rotation": 2, "exit_distillation": 2.0},
    "draft": {"draft_exit": 2, "exit_distillation": 8.0, "exit_distillation_schedule": "linear"},
    "successor": {"dropout_depth_schedule": "linear", "dropout_rescale": True, "dropout_max_rate": 0.5},
}


def configured(recipe, **training) -> Config:
    """Returns a configuration with steps and decay so large that a wrong update shows in the next loss."""
    model = dataclasses.replace(TINY, tie_embeddings=recipe != "successor")
    config = Config(model=model)
    sizes = {"batch_size": 8, "sequence_length": 32, "total_steps": 20, "loss_chunk": 64}
    steps = {"learning_rate": 3e-3, "warmup_steps": 0, "weight_decay": 10.0, "gradient_clip": 0.5} | sizes | training
    return dataclasses.replace(
        config,
        layerskip=dataclasses.replace(config.layerskip, exit_weight_floor=0.3, **RECIPES[recipe]),
        training=dataclasses.replace(config.training, **steps),
    )


@pytest.mark.parametrize(
    ("recipe", "dtype", "rtol"), [*((recipe, "float32", 1e-5) for recipe in RECIPES), ("paper", "bfloat16", 1e-3)]
)
def test_losses_are_ours_step_after_step(recipe, dtype, rtol):
    config = configured(recipe, compute_dtype=dtype)
    ours = JaxTraining(config)
    # With fresh weights all exits predict the same, so a wrong share of distillation would not show.
    ours.state = ours.state._replace(params=jax.tree.map(lambda a: 4 * a, ours.state.params))
    theirs = TorchTraining(config, ours.state.params)
    inputs = [step_inputs(step, random_batch(config, 0), config) for step in range(5)]
    losses = np.array([(ours.step(each), theirs.step(each)) for each in inputs])
    np.testing.assert_allclose(losses[0, 1], losses[0, 0], rtol=rtol)
    np.testing.assert_allclose(losses[:, 1], losses[:, 0], rtol=10 * rtol)
    seen = []
    theirs.model.lm_head.register_forward_hook(lambda module, inputs, logits: seen.append(str(logits.dtype)))
    theirs.step(inputs[0])
    assert set(seen) == {f"torch.{dtype}"}
    assert losses[0, 0] - losses[-1, 0] > 0.05


def test_a_setting_without_a_counterpart_is_named():
    for recipe, section, key, value in (("paper", "training", "gradient_accumulation", 2),):
        config = configured(recipe, **{key: value})
        with pytest.raises(UserError, match=f"no config.{section}.{key}: leave it at 1 to compare"):
            TorchTraining(config, None)
