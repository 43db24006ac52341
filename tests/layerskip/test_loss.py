"""The multi-exit loss against naive full logits in numpy, its gradient against naive JAX and finite differences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.data.batch import Batch
from lsjax.layerskip.loss import multi_exit_loss
from lsjax.model.transformer import exit_logits, hidden_states, init_params
from tests import numpy_llama

ACTIVE = np.array([True, False, True, True])
WEIGHTS = np.array([0.1, 0.0, 0.3, 0.6], np.float32)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 320, (2, 9)).astype(np.int32)
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=np.array([[1, 1, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 1, 0]], np.float32),
        positions=np.broadcast_to(np.arange(8, dtype=np.int32), (2, 8)),
        segment_ids=np.zeros((2, 8), np.int32),
    )


def fused(params, batch, config, **options):
    return multi_exit_loss(params, batch, config, exit_weights=WEIGHTS, exit_active=ACTIVE, **options)


def naive(params, batch, config):
    """Full logits at every exit, by the public functions whose arithmetic is tested elsewhere."""
    logits = exit_logits(params, hidden_states(params, batch.tokens, config), config)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[None, ..., None], axis=-1)[..., 0]
    return -jnp.sum(WEIGHTS[:, None, None] * picked * batch.weights[None])


def test_every_exit_reads_the_state_after_its_layer(tiny, tiny_params, batch):
    """Index l is the loss of x_{l+1}: float64 numpy on the state after layer l, for each active exit."""
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
    """The loss of an exit sits in a branch, not behind a multiplication by zero."""
    loss = jax.jit(lambda p, on: multi_exit_loss(p, batch, tiny, exit_weights=WEIGHTS, exit_active=on)[0])
    text = loss.lower(tiny_params, ACTIVE).compile().as_text()
    assert " conditional(" in text


def test_logits_never_exist_at_once(tiny, tiny_params, batch):
    """Temporaries of four exits over 2 x 128 tokens: less than the logits of one exit, where naive has all four."""
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
    """Temporaries of the gradient with four exits on, against a program that has only the last one."""
    config = dataclasses.replace(tiny, vocab_size=4096, width=64, feed_forward_width=128)
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    tokens = jax.ShapeDtypeStruct((8, 128), jnp.int32)
    batch = Batch(tokens, tokens, jax.ShapeDtypeStruct(tokens.shape, jnp.float32))

    def temporaries(active):
        exits = {"exit_weights": WEIGHTS, "exit_active": active}
        loss = lambda p, b: multi_exit_loss(p, b, config, loss_chunk=128, rematerialize="layer", **exits)[0]  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(params, batch).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(np.ones(4, bool)) < 1.2 * temporaries(None)


def test_without_early_exits_the_program_has_no_branch(tiny, tiny_params, batch):
    alone = lambda active: multi_exit_loss(tiny_params, batch, tiny, exit_weights=WEIGHTS, exit_active=active)  # noqa: E731
    total, losses = alone(None)
    np.testing.assert_allclose(total, alone(np.arange(4) == 3)[0], rtol=1e-6)
    assert np.flatnonzero(losses).tolist() == [3]
    assert "cond" not in str(jax.make_jaxpr(lambda: alone(None))())


def test_no_layer_keeps_a_gradient_of_the_head(tiny, batch):
    """Exits inside the layer scan, nothing recomputed: what is kept for the backward pass does not hold [L, V, D]."""
    config = dataclasses.replace(tiny, vocab_size=8192, num_layers=16)
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    exits = {"exit_weights": np.ones(16, np.float32), "exit_active": np.ones(16, bool)}
    gradient = jax.jit(jax.grad(lambda p: multi_exit_loss(p, batch, config, loss_chunk=4, **exits)[0]))
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
    """The objective is linear in the shares: exit by exit they add up; those of exits that are off count nothing."""
    value = lambda *shares: fused(tiny_params, batch, tiny, distillation=np.float32(shares))[0]  # noqa: E731
    nothing, first, third = value(0, 0, 0, 0), value(0.7, 0, 0, 0), value(0, 0, 0.7, 0)
    assert first - nothing > 0.05 < third - nothing
    np.testing.assert_allclose(value(0.7, 0, 0.35, 0), first + (third - nothing) / 2, rtol=1e-5)
    np.testing.assert_allclose(value(0.7, 9, 0.7, 9), fused(tiny_params, batch, tiny, distillation=0.7)[0], rtol=1e-6)
    np.testing.assert_allclose(nothing, fused(tiny_params, batch, tiny)[0], rtol=1e-6)


def test_distillation_does_not_pull_on_the_last_layer(tiny, tiny_params, batch):
    """Only the divergences: early layers have a gradient, the last layer, which only the teacher uses, has none."""
    only_divergence = lambda p: fused(p, batch, tiny, distillation=1.0)[0] - fused(p, batch, tiny)[0]  # noqa: E731
    down = jax.grad(only_divergence)(tiny_params)["layers"]["feed_forward"]["down"]
    largest = np.abs(down).max(axis=(1, 2))
    assert largest[0] > 1e-3
    assert largest[3] < 1e-5 * largest[0]


def test_strided_exits_read_every_other_token_for_two(tiny, tiny_params, batch):
    """Early exits: the naive sum over the sampled tokens, twice; the last layer: all tokens, once."""
    for offset in (0, 1):
        _, losses = fused(tiny_params, batch, tiny, token_stride=2, token_offset=offset, loss_chunk=4)
        logits = exit_logits(tiny_params, hidden_states(tiny_params, batch.tokens, tiny), tiny)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[None, ..., None], axis=-1)[..., 0]
        weighted = np.asarray(-picked * batch.weights)
        expected = np.append(2 * weighted[:-1, :, offset::2].sum((1, 2)), weighted[-1].sum()) * ACTIVE
        np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize("distillation", [None, 0.7])
def test_what_early_exits_may_pull_on(tiny, tiny_params, batch, distillation):
    """Only the last layer trains norm and head, or none trains the head; the layers learn the same from all."""
    gradient = lambda **options: jax.grad(  # noqa: E731
        lambda p: fused(p, batch, tiny, distillation=distillation, **options)[0]
    )(untied)
    untied = tiny_params | {"lm_head": tiny_params["embed"].T}
    both, detached = gradient(), gradient(exits_train_head=False)
    last_only = jax.grad(
        lambda p: multi_exit_loss(p, batch, tiny, exit_weights=WEIGHTS, exit_active=np.arange(4) == 3)[0]
    )(untied)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)  # noqa: E731
    close(detached["lm_head"], last_only["lm_head"])
    close(detached["final_norm"]["scale"], last_only["final_norm"]["scale"])
    jax.tree.map(close, detached["layers"], both["layers"])
    assert np.abs(both["lm_head"] - last_only["lm_head"]).max() > 1e-2
    frozen = gradient(head_learns=False)
    assert not np.any(frozen["lm_head"])
    jax.tree.map(close, frozen["layers"], both["layers"])
    close(frozen["final_norm"]["scale"], both["final_norm"]["scale"])


def test_distilled_gradient_equals_naive(tiny, tiny_params, batch):
    """Formed in the forward pass, chunk by chunk, against JAX's own gradient of the whole formula."""

    def formula(params):
        logits = exit_logits(params, hidden_states(params, batch.tokens, tiny), tiny)
        teacher = jax.nn.log_softmax(jax.lax.stop_gradient(logits[-1]))
        divergence = jnp.sum(jnp.exp(teacher) * (teacher - jax.nn.log_softmax(logits)), axis=-1)
        early = WEIGHTS[:, None, None] * divergence * batch.weights
        return naive(params, batch, tiny) + 0.7 * jnp.sum(early[:-1])

    ours = jax.grad(lambda p: 3 * fused(p, batch, tiny, distillation=0.7, loss_chunk=4)[0])(tiny_params)
    theirs = jax.grad(lambda p: 3 * formula(p))(tiny_params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3), ours, theirs)
