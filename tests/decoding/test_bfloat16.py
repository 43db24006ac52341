"""Greedy decoding in bfloat16 differs from autoregressive decoding only where two tokens are as good as equal.

Passes of one token and of d + 1 tokens round differently, so self-speculation may take the other of two such tokens.

How equal "as good as equal" is, by hand: a rounding to bfloat16 errs by up to u = 2^-8 of a number, and by u/sqrt(3) of
it on average (root mean square). A state is rounded some R times on its way: in each layer after both norms, the four
matmuls, the rotation, the attention weights, SwiGLU and both additions, and once after the last norm. If these errors
are independent, each of a normed state's D numbers (about 1) is off by u sqrt(R/3), and its product with a column w of
the head by u sqrt(R/3) |w|. The margin of two logits between two programs holds four such errors, which is twice as
much. Four times that is next to impossible.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsjax
from lsjax.decoding import lowering
from lsjax.decoding.forward import decoder_weights, embed, init_cache, prefill, run_layers
from lsjax.decoding.lowering import DecodeShape
from lsjax.decoding.sampling import Greedy
from lsjax.model.transformer import exit_logits
from tests.conftest import VARIED

NEW, BUCKET, CAPACITY = 72, 16, 128
LENGTHS = np.array([3, 16, 7, 12])


@pytest.fixture(scope="module")
def weights(varied_params):
    return decoder_weights(varied_params, jnp.bfloat16)


@pytest.fixture(scope="module")
def prompts():
    tokens = np.random.default_rng(0).integers(0, VARIED.vocab_size, (len(LENGTHS), BUCKET))
    return np.where(np.arange(BUCKET) < LENGTHS[:, None], tokens, 0).astype(np.int32)


@pytest.fixture(scope="module")
def margin(varied_params):
    """Returns how far two logits may differ and still change places."""
    roundings = 11 * VARIED.num_layers + 1
    head = np.max(np.linalg.norm(varied_params["lm_head"], axis=0)) * np.max(varied_params["final_norm"]["scale"])
    return 4 * 2 * 2.0**-8 * np.sqrt(roundings / 3) * head


def decode(weights, prompts, strategy) -> np.ndarray:
    """Returns the new tokens [B, NEW]."""
    how = {"config": VARIED, "strategy": strategy}
    inputs = jnp.int32(NEW), jnp.array([-1]), Greedy()
    shape = DecodeShape(len(prompts), BUCKET, CAPACITY, NEW + 16, 1)

    @jax.jit
    def run(weights):
        state = lowering._first_token(weights, prompts, LENGTHS, *inputs, **how, shape=shape)
        return lowering._decode(weights, state, *inputs, **how).tokens[:, :NEW]

    return np.asarray(run(weights))


@pytest.fixture(scope="module")
def autoregressive(weights, prompts):
    return decode(weights, prompts, lsjax.Autoregressive())


def control(weights, prompts, new, drafts: int) -> np.ndarray:
    """Returns the full model's logits of each new token [B, NEW, V], reading the text in blocks of d + 1 as
    verification does."""
    blocks = -(-(NEW - 1) // (drafts + 1))
    text = np.zeros((len(new), blocks * (drafts + 1)), np.int32)
    text[:, : NEW - 1] = new[:, :-1]

    @jax.jit
    def read(weights, text):
        def block(carry, tokens):
            cache, start = carry
            x, cache = run_layers(weights, embed(weights, tokens), cache, start, layers, VARIED)
            return (cache, start + drafts + 1), exit_logits(weights, x, VARIED)

        layers = range(VARIED.num_layers)
        cache = init_cache(VARIED, len(new), CAPACITY, jnp.bfloat16)
        first, cache = prefill(weights, prompts, LENGTHS, cache, VARIED, layers)
        blocks = text.reshape(len(new), -1, drafts + 1).swapaxes(0, 1)
        _, logits = jax.lax.scan(block, (cache, jnp.asarray(LENGTHS)), blocks)
        return jnp.concatenate([first[:, None], logits.swapaxes(0, 1).reshape(*text.shape, -1)], axis=1)

    return np.asarray(read(weights, text))[:, :NEW]


def short_of_the_best(logits, tokens) -> np.ndarray:
    """Returns how far each token's logit is below the largest [B, NEW]."""
    return logits.max(axis=-1) - np.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize(("exit_layer", "drafts"), [(1, 3), (2, 8)])
def test_self_speculation_departs_from_autoregressive_only_at_ties(
    weights, prompts, autoregressive, margin, exit_layer, drafts
):
    found = decode(weights, prompts, lsjax.SelfSpeculative(exit_layer, drafts))
    logits = control(weights, prompts, found, drafts)
    short = short_of_the_best(logits, found)
    assert short.max() <= margin, np.argwhere(short > margin)
    # Two texts are the same up to where they part; there, both tokens are as good as the best.
    for row in range(len(found)):
        parted = np.flatnonzero(found[row] != autoregressive[row])[:1]
        both = logits[row, parted].max(axis=-1) - logits[row, parted, autoregressive[row, parted]]
        assert np.all(both <= margin)


def test_the_margin_tells_tokens_apart(weights, prompts, autoregressive, margin):
    """Most other tokens would break the margin, and no pass of another shape moves a margin by more."""
    single, block = (control(weights, prompts, autoregressive, drafts) for drafts in (0, 8))
    assert 2 * np.abs(single - block).max() <= margin
    second = np.sort(single, axis=-1)[..., -2]
    assert np.mean(single.max(axis=-1) - second > margin) > 0.5
