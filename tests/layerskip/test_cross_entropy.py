"""The loss of one exit on a chunk and its hand-written gradient, against float64 numpy and finite differences."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.layerskip.cross_entropy import Exits, Targets, Teacher, exit_loss, read_teacher
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
    """Returns head, states [2,3,5], the teacher's states, targets and weights, for a vocabulary of 7 words."""
    rng = np.random.default_rng(0)
    head = {name: rng.normal(size=(5, 7) if name == "lm_head" else (7, 5))}
    states, teacher = 2 * rng.normal(size=(2, 2, 3, 5))
    return head, states, teacher, np.array([[0, 6, 3], [3, 3, 1]]), np.array([[1.0, 0.0, 1.5], [1.0, 1.0, 0.5]])


def logits_of(head, states):
    return states @ (head["lm_head"] if "lm_head" in head else head["embed"].T)


def formula(logits, taught, targets, weights, penalties):
    """Computes the loss in float64 straight from the definitions, without subtracting the largest logit."""
    normalizer = np.exp(logits).sum(-1, keepdims=True)
    log_p, q = np.log(np.exp(logits) / normalizer), np.exp(taught) / np.exp(taught).sum(-1, keepdims=True)
    each = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    cross_entropy = (each * weights).sum()
    each = each + penalties.distillation * (q * (np.log(q) - log_p)).sum(-1)
    each = each + penalties.z_loss * np.log(normalizer[..., 0]) ** 2
    return WEIGHT * (each * weights).sum(), cross_entropy


def charged(head, states, teacher, targets, weights, penalties, **options):
    def single(a):
        return jnp.asarray(a, jnp.float32)

    head = jax.tree.map(single, head)
    text = Targets(jnp.asarray(targets), single(weights), single(teacher) if penalties.distillation else None)
    options = {"with_gradient": True, "head_learns": True} | options
    return exit_loss(
        head,
        single(states),
        penalties.exit_,
        targets=text,
        teacher=read_teacher(head, text),
        z_loss=penalties.z_loss,
        **options,
    )


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
        head, states, teacher, targets, weights = problem(name)
        jaxpr = jax.make_jaxpr(lambda h: charged(h, states, teacher, targets, weights, Penalties(0.7)))(head)
    products = weight_products(jaxpr.jaxpr)
    assert len(products) == 4  # logits of the teacher and of the exit, and both gradients
    assert {v.aval.dtype.name for eqn in products for v in eqn.invars} == {"bfloat16"}
    assert {eqn.outvars[0].aval.dtype.name for eqn in products} == {"float32"}


def check(name, penalties, value_rtol, rtol, atol):
    head, states, teacher, targets, weights = problem(name)
    ours = charged(head, states, teacher, targets, weights, penalties)
    taught = logits_of(head, teacher)  # held fixed: the teacher has no gradient

    def value(head, states):
        return formula(logits_of(head, states), taught, targets, weights, penalties)

    np.testing.assert_allclose([ours.objective, ours.cross_entropy], value(head, states), rtol=value_rtol)
    head_gradient = differences(lambda matrix: value({name: matrix}, states)[0], head[name])
    states_gradient = differences(lambda x: value(head, x)[0], states)
    for gradient, expected in ((ours.head_gradient[name], head_gradient), (ours.states_gradient, states_gradient)):
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
def test_there_is_one_exponential_per_logit(penalties):
    """Counts exponentials in value and both gradients together. The teacher is read once for all exits, apart."""
    head, states, _, targets, weights = problem("lm_head")
    text, q = Targets(targets, weights), Teacher(jnp.ones((2, 3, 7)), jnp.ones((2, 3)), jnp.ones(()))

    def run(head, states):
        return exit_loss(
            head,
            states,
            penalties.exit_,
            targets=text,
            teacher=q,
            z_loss=penalties.z_loss,
            with_gradient=True,
            head_learns=True,
        )

    program = jax.make_jaxpr(run)(head, states)
    assert len(re.findall(r"f32\[2,3,7\] = exp", str(program))) == 1


def test_a_head_that_does_not_learn_has_no_gradient():
    result = charged(*problem("embed"), Penalties(), head_learns=False)
    assert result.head_gradient is None
    np.testing.assert_array_equal(result.states_gradient, charged(*problem("embed"), Penalties()).states_gradient)
    assert charged(*problem("embed"), Penalties(), with_gradient=False).states_gradient is None


def test_bfloat16_gradients_are_summed_in_float32():
    """Sums the small gradients of 4,096 equal tokens; in bfloat16 the sum would stop growing after 256 of them."""
    tokens = 4096
    head, x = {"embed": jnp.eye(2, dtype=jnp.bfloat16)}, jnp.ones((1, tokens, 2), jnp.bfloat16)
    text = Targets(jnp.zeros((1, tokens), jnp.int32), jnp.ones((1, tokens)))
    result = exit_loss(
        head,
        x,
        Exits(jnp.float32(1)),
        targets=text,
        teacher=None,
        z_loss=0.0,
        with_gradient=True,
        head_learns=True,
    )
    assert result.head_gradient["embed"].dtype == jnp.float32
    np.testing.assert_allclose(result.head_gradient["embed"], tokens * np.array([[-0.5, -0.5], [0.5, 0.5]]), rtol=1e-2)
