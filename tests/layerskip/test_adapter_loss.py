"""The exit adapter's loss and gradient against float64 numpy, which shares no code with lsjax."""

import functools

import jax
import numpy as np
import pytest

from lsjax.config import Config, LayerSkipConfig, TrainingConfig
from lsjax.costs.flops import step_flops
from lsjax.layerskip.adapter_loss import adapter_loss
from lsjax.model.exit_adapter import ExitAdapter
from lsjax.training.step import init_state, mean_gradients, recipe_at
from tests.conftest import weight_products
from tests.helpers import numpy_llama
from tests.helpers.batches import weighted_batch
from tests.helpers.counted import count_flops

EXIT = 2


@pytest.fixture(scope="module")
def batch():
    return weighted_batch()


@pytest.fixture(scope="module")
def kernel(tiny):
    return np.random.default_rng(3).normal(0, 0.1, (tiny.width, tiny.width)).astype(np.float32)


@pytest.fixture(scope="module")
def states(tiny, tiny_params, batch):
    return [numpy_llama.hidden_states(tiny_params, row, tiny) for row in batch.tokens]


def expected(kernel, states, batch, params, config, positions):
    """Returns (KL(last || adapted exit), CE of the adapted exit, CE of the last layer), summed over some positions."""
    sums = np.zeros(3)
    for row, of_layers in enumerate(states):
        h = of_layers[EXIT - 1]
        drafted = numpy_llama.logits(params, h + h @ np.asarray(kernel, np.float64), config)
        last = numpy_llama.logits(params, of_layers[-1], config)
        for s in positions:
            log_p, log_q = (z - np.log(np.exp(z).sum()) for z in (last[s], drafted[s]))
            target = batch.targets[row, s]
            found = np.exp(log_p) @ (log_p - log_q), -log_q[target], -log_p[target]
            sums += batch.weights[row, s] * np.array(found)
    return sums


@pytest.mark.parametrize(("stride", "offset"), [(1, 0), (4, 3)])
def test_loss_and_gradient_are_those_of_the_formula(tiny, tiny_params, batch, kernel, states, stride, offset):
    """Compares with float64 numpy: values to rounding, entries of the gradient with its central differences."""
    positions = range(offset, 8, stride)

    def loss(kernel):
        adapter = ExitAdapter(EXIT, kernel)
        return adapter_loss(adapter, tiny_params, batch, tiny, token_stride=stride, token_offset=offset, loss_chunk=8)

    (total, losses), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(kernel)
    formula = functools.partial(
        expected, states=states, batch=batch, params=tiny_params, config=tiny, positions=positions
    )
    kl, exit_ce, last_ce = stride * formula(kernel)
    assert kl > 1
    np.testing.assert_allclose(total, kl, rtol=1e-4)
    np.testing.assert_allclose(losses, [0, exit_ce, 0, last_ce], rtol=1e-4)
    for at in [(0, 0), (5, 17), (31, 2), (12, 30)]:
        step = np.zeros(kernel.shape)
        step[at] = 1e-5
        slope = stride * (formula(kernel + step)[0] - formula(kernel - step)[0]) / 2e-5
        np.testing.assert_allclose(gradient[at], slope, rtol=2e-3, atol=2e-3)


def test_nothing_but_the_adapter_has_a_gradient(tiny, tiny_params, batch, kernel):
    gradient = jax.grad(lambda p: adapter_loss(ExitAdapter(EXIT, kernel), p, batch, tiny)[0])(tiny_params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("parts", [1, 2])
def test_the_layers_are_only_run_forward(tiny, parts):
    """The gradient's program multiplies with each weight of a layer once, and has the FLOPs of `step_flops`."""
    config = adapter_config(tiny, batch_size=2, sequence_length=8, loss_chunk=8, gradient_accumulation=parts)
    state, batch = jax.eval_shape(lambda: init_state(config)), weighted_batch()

    def gradients(state):
        return mean_gradients(state, batch, recipe_at(0, config), config)

    shapes = [sorted(v.aval.shape for v in e.invars)[::-1] for e in weight_products(jax.make_jaxpr(gradients)(state))]
    for weight in jax.tree.leaves(state.params["layers"]):
        if weight.ndim > 2:
            assert sum(weight.shape[1:] in shape for shape in shapes) == 1, weight.shape
    # As lsjax/costs counts, with full attention, and with the gradient of the frozen state, which XLA leaves out.
    flops = step_flops(config)
    unused = 2 * tiny.width**2 / config.layerskip.exit_token_stride
    counted = count_flops(gradients, state) / batch.tokens.size
    np.testing.assert_allclose(counted, flops.model + flops.exits + unused, rtol=1e-6)


def adapter_config(model, **training):
    return Config(
        model=model,
        layerskip=LayerSkipConfig(
            dropout_max_rate=0.0, exit_curriculum="none", draft_exit=EXIT, exit_adapter="linear", exit_token_stride=2
        ),
        training=TrainingConfig(**training),
        initial_model="some/model",
    )
