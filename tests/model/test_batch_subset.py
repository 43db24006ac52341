"""Layers computed for the gathered rows only, against all rows computed and masked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.config import MeshConfig
from lsjax.model.batch_subset import subset_update
from lsjax.model.transformer import scan_layers
from lsjax.parallel.sharding import batch_sharding, make_mesh, tree_shardings

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 320, (16, 12))
DOCUMENTS = np.sort(RNG.integers(0, 3, (16, 12)), axis=1)
MASK = RNG.choice([0.0, 1.0, 1.5], (4, 16), p=[0.5, 0.25, 0.25]).astype(np.float32)
MASK[1], MASK[2] = 0.0, 1.0


def value_and_gradient(config, params, tokens, documents, mask, pieces=None, rematerialize="none"):
    def objective(params):
        x, _ = scan_layers(
            params,
            tokens,
            config,
            layer_mask=mask,
            segment_ids=documents,
            rematerialize=rematerialize,
            pieces=pieces,
        )
        phases = jnp.arange(x.size).reshape(x.shape) % 7  # small, so that the sum keeps the last bits of x
        return jnp.sum(jnp.sin(phases + x))

    return jax.jit(jax.value_and_grad(objective))(params)


def assert_close(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.max(jnp.abs(b))))


@pytest.mark.parametrize("pieces", [(16,), (0, 8, 8), (8, 4, 4), (12, 2, 2)], ids=str)
def test_any_mask_gives_what_masking_gives(tiny, tiny_params, pieces):
    policy = "elementwise" if pieces[0] else "none"
    gathered = value_and_gradient(tiny, tiny_params, TOKENS, DOCUMENTS, MASK, pieces, policy)
    masked = value_and_gradient(tiny, tiny_params, TOKENS, DOCUMENTS, MASK)
    assert_close(gathered, masked)


@pytest.mark.parametrize("sizes", [(4, 2, 1), (2, 2, 2)], ids=str)
def test_any_mask_gives_what_masking_gives_on_a_mesh(tiny, tiny_params, sizes):
    mesh = make_mesh(MeshConfig(*sizes))
    masked = value_and_gradient(tiny, tiny_params, TOKENS, DOCUMENTS, MASK)
    pieces = (0, 1, 1) if sizes[1] * sizes[0] == 8 else (2, 1, 1)
    with jax.set_mesh(mesh):
        params = jax.device_put(tiny_params, tree_shardings(tiny_params, mesh))
        tokens, documents = jax.device_put((TOKENS, DOCUMENTS), batch_sharding(mesh))
        gathered = value_and_gradient(tiny, params, tokens, documents, MASK, pieces)
    assert_close(gathered, masked)


@pytest.mark.parametrize(("kept", "pieces", "computed"), [(5, (0, 2, 2, 2, 2), 6), (4, (4, 2, 2), 4), (1, (4, 4), 4)])
def test_rows_that_are_left_out_are_not_computed(kept, pieces, computed):
    keep = np.zeros(8, np.float32)
    keep[RNG.permutation(8)[:kept]] = 1.0
    seen = []

    def update(layer, x, names):
        jax.debug.callback(lambda names: seen.extend(names.tolist()), names)
        return layer * x + names[:, None, None]

    run = jax.jit(lambda keep: subset_update(update, 1.0, jnp.ones((8, 2, 3)), jnp.arange(8), keep, pieces))
    added = run(keep)
    jax.effects_barrier()
    assert len(seen) == computed
    assert {*np.flatnonzero(keep)} <= {*seen}
    np.testing.assert_array_equal(added[:, 0, 0], keep * (1 + np.arange(8)))
