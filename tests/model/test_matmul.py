"""The hand-written gradient of products with weights, against the definition in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.model.matmul import matmul, rounding_products


@pytest.mark.parametrize("rounded", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("axes", "definition", "shapes"),
    [
        (1, "sta,aef->stef", [(2, 3, 4), (4, 5, 6), (2, 3, 5, 6)]),
        (2, "stab,abe->ste", [(2, 3, 4, 5), (4, 5, 6), (2, 3, 6)]),
        (3, "sabc,abce->se", [(3, 2, 4, 5), (2, 4, 5, 6), (3, 6)]),
    ],
)
def test_the_gradient_is_that_of_the_sum(axes, definition, shapes, rounded):
    """Checks float32 factors, and factors rounded to bfloat16, whose products are summed in float32."""
    x, weight, gradient = (np.random.default_rng(0).normal(size=shape) for shape in shapes)
    inputs, kernel, outputs = definition.replace("->", ",").split(",")
    with rounding_products(rounded):
        out, pullback = jax.vjp(lambda x, weight: matmul(x, weight, axes), jnp.float32(x), jnp.float32(weight))
        of_x, of_weight = pullback(jnp.float32(gradient))
    assert {a.dtype for a in (out, of_x, of_weight)} == {np.dtype("float32")}
    if rounded:
        x, weight, gradient = (a.astype(jnp.bfloat16).astype(float) for a in (x, weight, gradient))

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    close(out, np.einsum(definition, x, weight))
    close(of_x, np.einsum(f"{outputs},{kernel}->{inputs}", gradient, weight))
    close(of_weight, np.einsum(f"{inputs},{outputs}->{kernel}", x, gradient))


def test_gradients_have_the_dtypes_of_their_arguments():
    x, weight = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.bfloat16)
    out, pullback = jax.vjp(lambda x, weight: matmul(x, weight, out_dtype=jnp.float32), x, weight)
    assert out.dtype == jnp.float32
    assert [a.dtype for a in pullback(out)] == [jnp.bfloat16, jnp.bfloat16]
