"""The loss of a chunk and its gradient, written down by hand, against float64 numpy and its finite differences."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.layerskip.cross_entropy import Exits, Teacher, Text, charge, read_teacher
from lsjax.model.matmul import rounding_products
from tests.conftest import weight_products

WEIGHT = 0.6


class Penalties(NamedTuple):
    distillation: float = 0.0
    z_loss: float = 0.0

    @property
    def exit_(self):
        return Exits(jnp.float32(WEIGHT), None, jnp.float32(self.distillation) if self.distillation else None)


def problem(name):
    """(head, states [2,3,5], teacher's states, targets, weights) with 7 words in the vocabulary."""
    rng = np.random.default_rng(0)
    head = {name: rng.normal(size=(5, 7) if name == "lm_head" else (7, 5))}
    states, teacher = 2 * rng.normal(size=(2, 2, 3, 5))
    return head, states, teacher, np.array([[0, 6, 3], [3, 3, 1]]), np.array([[1.0, 0.0, 1.5], [1.0, 1.0, 0.5]])


def logits_of(head, states):
    return states @ (head["lm_head"] if "lm_head" in head else head["embed"].T)


def formula(logits, taught, targets, weights, penalties):
    """float64, straight from the definitions, without the largest logit taken off."""
    normalizer = np.exp(logits).sum(-1, keepdims=True)
    log_p, q = np.log(np.exp(logits) / normalizer), np.exp(taught) / np.exp(taught).sum(-1, keepdims=True)
    each = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    cross_entropy = (each * weights).sum()
    each = each + penalties.distillation * (q * (np.log(q) - log_p)).sum(-1)
    each = each + penalties.z_loss * np.log(normalizer[..., 0]) ** 2
    return WEIGHT * (each * weights).sum(), cross_entropy


def charged(head, states, teacher, targets, weights, penalties, **options):
    single = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731
    head = jax.tree.map(single, head)
    text = Text(jnp.asarray(targets), single(weights), single(teacher) if penalties.distillation else None)
    options = {"with_gradient": True, "head_learns": True} | options
    how = penalties.exit_, text, read_teacher(head, text), penalties.z_loss
    return charge(head, single(states), *how, **options)


@pytest.mark.parametrize("name", ["lm_head", "embed"])
@pytest.mark.parametrize(
    "penalties", [Penalties(), Penalties(z_loss=0.3), Penalties(0.7), Penalties(0.7, 0.3)], ids=str
)
def test_value_and_gradient_are_those_of_the_formula(name, penalties):
    check(name, penalties, value_rtol=1e-5, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["lm_head", "embed"])
def test_products_of_bfloat16_are_near_the_formula(name):
    with rounding_products(True):
        check(name, Penalties(0.7, 0.3), value_rtol=5e-3, rtol=0.03, atol=0.15)
        head, *rest = problem(name)
        jaxpr = jax.make_jaxpr(lambda h: charged(h, *rest, Penalties(0.7)))(head)
    products = weight_products(jaxpr.jaxpr)
    assert len(products) == 4  # of the teacher; of the states, and both gradients
    assert {v.aval.dtype.name for eqn in products for v in eqn.invars} == {"bfloat16"}
    assert {eqn.outvars[0].aval.dtype.name for eqn in products} == {"float32"}


def check(name, penalties, value_rtol, rtol, atol):
    head, states, teacher, *text = problem(name)
    ours = charged(head, states, teacher, *text, penalties)
    taught = logits_of(head, teacher)  # held fixed: the teacher has no gradient
    value = lambda h, x: formula(logits_of(h, x), taught, *text, penalties)  # noqa: E731
    np.testing.assert_allclose([ours.objective, ours.cross_entropy], value(head, states), rtol=value_rtol)
    of_head = differences(lambda matrix: value({name: matrix}, states)[0], head[name])
    of_states = differences(lambda x: value(head, x)[0], states)
    for gradient, expected in ((ours.of_head[name], of_head), (ours.of_states, of_states)):
        np.testing.assert_allclose(gradient, expected, rtol=rtol, atol=atol)


def differences(function, at, step=1e-5):
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        shift = np.zeros_like(at)
        shift[index] = step
        gradient[index] = (function(at + shift) - function(at - shift)) / (2 * step)
    return gradient


def test_large_logits_give_finite_numbers():
    head, states, teacher, targets, weights = problem("embed")
    result = charged(head, 1000 * states, teacher, targets, weights, Penalties(z_loss=1e-4))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))


@pytest.mark.parametrize("penalties", [Penalties(), Penalties(z_loss=0.3), Penalties(0.7, 0.3)], ids=str)
def test_one_exponential_a_logit(penalties):
    """Value and both gradients together; reading the teacher is apart, once for all exits."""
    head, states, _, targets, weights = problem("lm_head")
    text, q = Text(targets, weights), Teacher(jnp.ones((2, 3, 7)), jnp.ones((2, 3)))
    program = jax.make_jaxpr(lambda h, x: charge(h, x, penalties.exit_, text, q, penalties.z_loss, True, True))(
        head, states
    )
    assert len(re.findall(r"f32\[2,3,7\] = exp", str(program))) == 1


def test_a_head_that_does_not_learn_has_no_gradient():
    result = charged(*problem("embed"), Penalties(), head_learns=False)
    assert result.of_head is None
    np.testing.assert_array_equal(result.of_states, charged(*problem("embed"), Penalties()).of_states)
    assert charged(*problem("embed"), Penalties(), with_gradient=False).of_states is None


def test_bfloat16_gradients_are_summed_in_float32():
    """4,096 equal tokens, each with one small gradient: bfloat16 would stop adding after 256 of them."""
    tokens = 4096
    head, x = {"embed": jnp.eye(2, dtype=jnp.bfloat16)}, jnp.ones((1, tokens, 2), jnp.bfloat16)
    text = Text(jnp.zeros((1, tokens), jnp.int32), jnp.ones((1, tokens)))
    result = charge(head, x, Exits(jnp.float32(1)), text, None, 0.0, True, True)
    assert result.of_head["embed"].dtype == jnp.float32
    np.testing.assert_allclose(result.of_head["embed"], tokens * np.array([[-0.5, -0.5], [0.5, 0.5]]), rtol=1e-2)
