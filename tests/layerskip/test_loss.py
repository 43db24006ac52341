"""The multi-exit loss against naive full logits in numpy, its gradient against naive JAX and finite differences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.data.batch import Batch
from lsjax.layerskip.loss import multi_exit_loss
from lsjax.model.transformer import exit_logits, hidden_states, init_params
from tests.helpers import numpy_llama
from tests.helpers.batches import weighted_batch

ACTIVE = np.array([True, False, True, True])
WEIGHTS = np.array([0.1, 0.0, 0.3, 0.6], np.float32)


@pytest.fixture(scope="module")
def batch():
    return weighted_batch()


def fused(params, batch, config, **options):
    return multi_exit_loss(params, batch, config, exit_weights=WEIGHTS, exit_active=ACTIVE, **options)


def naive(params, batch, config):
    """Computes full logits at every exit, with the public functions whose arithmetic is tested elsewhere."""
    logits = exit_logits(params, hidden_states(params, batch.tokens, config), config)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[None, ..., None], axis=-1)[..., 0]
    return -jnp.sum(WEIGHTS[:, None, None] * picked * batch.weights[None])


def test_every_exit_reads_the_state_after_its_layer(tiny, tiny_params, batch):
    """Compares the loss of entry l with float64 numpy on x_{l+1}, the state after layer l, for each active exit."""
    total, losses = fused(tiny_params, batch, tiny, loss_chunk=4)
    expected = np.zeros(4)
    for row in range(2):
        states = numpy_llama.hidden_states(tiny_params, batch.tokens[row], tiny)
        logits = numpy_llama.logits(tiny_params, states, tiny)
        for layer in np.flatnonzero(ACTIVE):
            for s in range(8):
                ce = numpy_llama.cross_entropy(logits[layer, s], batch.targets[row, s])
                expected[layer] += batch.weights[row, s] * ce
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    np.testing.assert_allclose(total, (WEIGHTS * expected).sum(), rtol=1e-4)


@pytest.mark.parametrize(
    ("chunk", "rematerialize"), [(1, "none"), (4, "elementwise"), (16, "feed_forward"), (4, "layer"), (1000, "layer")]
)
def test_gradient_equals_naive_full_logits(tiny, tiny_params, batch, chunk, rematerialize):
    ours = jax.grad(lambda p: fused(p, batch, tiny, loss_chunk=chunk, rematerialize=rematerialize)[0])(tiny_params)
    theirs = jax.grad(naive)(tiny_params, batch, tiny)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), ours, theirs)


def test_gradient_equals_finite_differences(tiny, tiny_params, batch):
    direction = jax.tree.map(lambda a: jax.random.normal(jax.random.key(a.size), a.shape), tiny_params)
    loss = jax.jit(lambda p: fused(p, batch, tiny)[0])
    step = 1e-3
    moved = [jax.tree.map(lambda a, d, s=s: a + s * step * d, tiny_params, direction) for s in (1, -1)]
    numeric = (loss(moved[0]) - loss(moved[1])) / (2 * step)
    gradient = jax.grad(lambda p: fused(p, batch, tiny)[0])(tiny_params)
    exact = sum(jax.tree.leaves(jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, direction)))
    np.testing.assert_allclose(numeric, exact, rtol=2e-2)


def test_the_last_layer_has_a_gradient_and_dropped_layers_have_none(tiny, tiny_params, batch):
    mask = jnp.array([1.0, 0.0, 1.0, 1.0])
    gradient = jax.grad(lambda p: fused(p, batch, tiny, layer_mask=mask)[0])(tiny_params)
    size = jax.tree.reduce(
        jnp.add, jax.tree.map(lambda g: jnp.sum(jnp.abs(g).reshape(4, -1), axis=1), gradient["layers"])
    )
    assert (np.asarray(size)[[0, 2, 3]] > 0).all()
    assert size[1] == 0


def test_rotating_exits_never_recompiles(tiny, tiny_params, batch):
    loss = jax.jit(
        lambda active, weights: multi_exit_loss(
            tiny_params, batch, tiny, exit_weights=weights, exit_active=active, loss_chunk=4
        )[1]
    )
    for exits in ([0, 3], [1, 3], [0, 1, 2, 3], [3]):
        active = np.isin(np.arange(4), exits)
        losses = loss(active, active.astype(np.float32))
        assert np.flatnonzero(losses).tolist() == exits
    assert loss._cache_size() == 1


def test_an_inactive_exit_costs_nothing(tiny, tiny_params, batch):
    """Checks that the loss of an exit sits in a branch and is not just multiplied by zero."""
    loss = jax.jit(lambda p, on: multi_exit_loss(p, batch, tiny, exit_weights=WEIGHTS, exit_active=on)[0])
    text = loss.lower(tiny_params, ACTIVE).compile().as_text()
    assert " conditional(" in text


def test_logits_never_exist_at_once(tiny, tiny_params, batch):
    """Compares temporaries of four exits over 2 x 128 tokens: ours hold less than one exit's logits, naive all four."""
    length = 128
    long = Batch(*(np.tile(column, (1, length // 8)) for column in batch))
    config = dataclasses.replace(tiny, vocab_size=8192)
    params = tiny_params | {"embed": jnp.tile(tiny_params["embed"], (26, 1))[:8192]}
    chunked = jax.jit(jax.grad(lambda p: fused(p, long, config, loss_chunk=16, rematerialize="layer")[0]))
    full = jax.jit(jax.grad(lambda p: naive(p, long, config)))
    one_exit = 2 * length * config.vocab_size * 4
    assert full.lower(params).compile().memory_analysis().temp_size_in_bytes > 4 * one_exit
    assert chunked.lower(params).compile().memory_analysis().temp_size_in_bytes < one_exit


def test_four_exits_need_little_more_memory_than_one(tiny):
    """Compares temporaries of the gradient with four exits on and in a program that has only the last one."""
    config = dataclasses.replace(tiny, vocab_size=4096, width=64, feed_forward_width=128)
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    tokens = jax.ShapeDtypeStruct((16, 128), jnp.int32)
    batch = Batch(tokens, tokens, jax.ShapeDtypeStruct(tokens.shape, jnp.float32))

    def temporaries(active):
        def loss(params, batch):
            return multi_exit_loss(
                params,
                batch,
                config,
                exit_weights=WEIGHTS,
                exit_active=active,
                loss_chunk=128,
                rematerialize="layer",
            )[0]

        return jax.jit(jax.grad(loss)).lower(params, batch).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(np.ones(4, bool)) < 1.2 * temporaries(None)


def test_without_early_exits_the_program_has_no_branch(tiny, tiny_params, batch):
    def alone(active):
        return multi_exit_loss(tiny_params, batch, tiny, exit_weights=WEIGHTS, exit_active=active)

    total, losses = alone(None)
    np.testing.assert_allclose(total, alone(np.arange(4) == 3)[0], rtol=1e-6)
    assert np.flatnonzero(losses).tolist() == [3]
    assert "cond" not in str(jax.make_jaxpr(lambda: alone(None))())


def test_no_layer_keeps_a_gradient_of_the_head(tiny, batch):
    """Checks, with exits inside the layer scan and nothing recomputed, that residuals do not hold an [L,V,D] array."""
    config = dataclasses.replace(tiny, vocab_size=8192, num_layers=16)
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), config))

    def loss(params):
        weights, active = np.ones(16, np.float32), np.ones(16, bool)
        return multi_exit_loss(params, batch, config, exit_weights=weights, exit_active=active, loss_chunk=4)[0]

    gradient = jax.jit(jax.grad(loss))
    head = config.vocab_size * config.width * 4
    assert gradient.lower(params).compile().memory_analysis().temp_size_in_bytes < 16 * head / 2


def test_distillation_is_the_divergence_from_the_last_layer(tiny, tiny_params, batch):
    plain, _ = fused(tiny_params, batch, tiny, loss_chunk=4)
    distilled, losses = fused(tiny_params, batch, tiny, loss_chunk=4, distillation=0.7)
    expected = 0.0
    for row in range(2):
        logits = numpy_llama.logits(tiny_params, numpy_llama.hidden_states(tiny_params, batch.tokens[row], tiny), tiny)
        for layer in np.flatnonzero(ACTIVE):
            for s in range(8):
                teacher, student = numpy_llama.softmax(logits[-1, s]), numpy_llama.softmax(logits[layer, s])
                divergence = (teacher * np.log(teacher / student)).sum()
                expected += WEIGHTS[layer] * batch.weights[row, s] * divergence
    np.testing.assert_allclose(distilled - plain, 0.7 * expected, rtol=1e-3)
    np.testing.assert_allclose(losses, fused(tiny_params, batch, tiny)[1], rtol=1e-5)


def test_each_exit_learns_its_own_share_from_the_last_layer(tiny, tiny_params, batch):
    """Checks that the objective is linear in the shares, and that shares of inactive exits count nothing."""

    def value(*shares):
        return fused(tiny_params, batch, tiny, distillation=np.float32(shares))[0]

    nothing, first, third = value(0, 0, 0, 0), value(0.7, 0, 0, 0), value(0, 0, 0.7, 0)
    assert first - nothing > 0.05 < third - nothing
    np.testing.assert_allclose(value(0.7, 0, 0.35, 0), first + (third - nothing) / 2, rtol=1e-5)
    np.testing.assert_allclose(value(0.7, 9, 0.7, 9), fused(tiny_params, batch, tiny, distillation=0.7)[0], rtol=1e-6)
    np.testing.assert_allclose(nothing, fused(tiny_params, batch, tiny)[0], rtol=1e-6)


def test_distillation_does_not_pull_on_the_last_layer(tiny, tiny_params, batch):
    """Takes the gradient of the divergences alone: early layers have one, the last layer (teacher only) has none."""

    def only_divergence(params):
        return fused(params, batch, tiny, distillation=1.0)[0] - fused(params, batch, tiny)[0]

    down = jax.grad(only_divergence)(tiny_params)["layers"]["feed_forward"]["down"]
    largest = np.abs(down).max(axis=(1, 2))
    assert largest[0] > 1e-3
    assert largest[3] < 1e-5 * largest[0]


def test_strided_exits_read_every_other_token_with_twice_its_weight(tiny, tiny_params, batch):
    """Checks that early exits sum the sampled tokens with twice the weight, and the last layer all tokens once."""
    for offset in (0, 1):
        _, losses = fused(tiny_params, batch, tiny, token_stride=2, token_offset=offset, loss_chunk=4)
        logits = exit_logits(tiny_params, hidden_states(tiny_params, batch.tokens, tiny), tiny)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[None, ..., None], axis=-1)[..., 0]
        weighted = np.asarray(-picked * batch.weights)
        expected = np.append(2 * weighted[:-1, :, offset::2].sum((1, 2)), weighted[-1].sum()) * ACTIVE
        np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize("distillation", [None, 0.7])
def test_early_exits_can_be_kept_from_training_the_head(tiny, tiny_params, batch, distillation):
    """Lets only the last layer train norm and head, or nothing train the head; gradients of layers stay the same."""
    untied = tiny_params | {"lm_head": tiny_params["embed"].T}

    def gradient(**options):
        return jax.grad(lambda p: fused(p, batch, tiny, distillation=distillation, **options)[0])(untied)

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)

    both, detached = gradient(), gradient(exits_train_head=False)
    last_only = jax.grad(
        lambda p: multi_exit_loss(p, batch, tiny, exit_weights=WEIGHTS, exit_active=np.arange(4) == 3)[0]
    )(untied)
    close(detached["lm_head"], last_only["lm_head"])
    close(detached["final_norm"]["scale"], last_only["final_norm"]["scale"])
    jax.tree.map(close, detached["layers"], both["layers"])
    assert np.abs(both["lm_head"] - last_only["lm_head"]).max() > 1e-2
    frozen = gradient(head_learns=False)
    assert not np.any(frozen["lm_head"])
    jax.tree.map(close, frozen["layers"], both["layers"])
    close(frozen["final_norm"]["scale"], both["final_norm"]["scale"])


def test_distilled_gradient_equals_naive(tiny, tiny_params, batch):
    """Compares the gradient, computed chunk by chunk in the forward pass, with JAX's own of the whole formula."""

    def formula(params):
        logits = exit_logits(params, hidden_states(params, batch.tokens, tiny), tiny)
        teacher = jax.nn.log_softmax(jax.lax.stop_gradient(logits[-1]))
        divergence = jnp.sum(jnp.exp(teacher) * (teacher - jax.nn.log_softmax(logits)), axis=-1)
        early = WEIGHTS[:, None, None] * divergence * batch.weights
        return naive(params, batch, tiny) + 0.7 * jnp.sum(early[:-1])

    ours = jax.grad(lambda p: 3 * fused(p, batch, tiny, distillation=0.7, loss_chunk=4)[0])(tiny_params)
    theirs = jax.grad(lambda p: 3 * formula(p))(tiny_params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3), ours, theirs)
