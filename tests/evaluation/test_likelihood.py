"""Log-likelihoods of continuations are sums of the log-probabilities of `lsjax.forward`, at every exit."""

import jax
import numpy as np
import pytest

import lsjax
from lsjax.evaluation import likelihood
from lsjax.evaluation.likelihood import continuation_likelihoods

PAIRS = [([1, 2, 3], [4, 5]), ([7], [8]), (list(range(20, 50)), [9, 9, 9, 9]), ([3], list(range(100, 120)))]


def logits_of(params, config, text, exit_layer):
    """Returns the logits [S,V] of one text, whose layers after the exit are switched off.

    The text is read with tokens after it, which no earlier position sees, so that all texts have one length.
    """
    mask = (np.arange(config.num_layers) < exit_layer).astype(np.float32)
    padded = [*text, *[0] * (config.context_length - len(text))]
    logits = lsjax.forward(params, [padded], config, layer_mask=mask)[0, : len(text)]
    return np.asarray(logits, np.float64)


def by_forward(params, config, context, continuation, exit_layer):
    """Returns (log-likelihood, whether it is the greedy text) of a continuation, from the logits of `lsjax.forward`."""
    rows = logits_of(params, config, [*context, *continuation][:-1], exit_layer)[len(context) - 1 :]
    log_probabilities = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
    total = sum(row[token] for row, token in zip(log_probabilities, continuation, strict=True))
    return total, list(rows.argmax(-1)) == list(continuation)


@pytest.mark.parametrize("exit_layer", [None, 2])
def test_likelihoods_are_sums_of_forward(varied, varied_params, exit_layer):
    found = continuation_likelihoods(varied_params, varied, PAIRS, exit_layer, batch_size=3)
    for (context, continuation), (total, greedy) in zip(PAIRS, found, strict=True):
        expected = by_forward(varied_params, varied, context, continuation, exit_layer or 4)
        assert total == pytest.approx(expected[0], abs=1e-4)
        assert greedy == expected[1] is False


def test_a_greedy_continuation_is_known_as_one(varied, varied_params):
    text = [5, 6, 7]
    for _ in range(4):
        text.append(int(np.argmax(logits_of(varied_params, varied, text, 4)[-1])))
    other = [*text[3:6], (text[6] + 1) % varied.vocab_size]
    found = continuation_likelihoods(varied_params, varied, [(text[:3], text[3:]), (text[:3], other)])
    assert [likelihood.is_greedy for likelihood in found] == [True, False]


def test_of_a_text_that_is_too_long_the_end_counts(varied, varied_params):
    context = np.random.default_rng(0).integers(0, 320, 200).tolist()
    (found,) = continuation_likelihoods(varied_params, varied, [(context, [1, 2, 3])], batch_size=1)
    expected, _ = by_forward(varied_params, varied, context[-126:], [1, 2, 3], 4)
    assert found.log_likelihood == pytest.approx(expected, abs=1e-4)


def test_logits_of_a_whole_text_never_exist(varied, varied_params):
    tokens = np.zeros((2, 128), np.int32)
    program = jax.make_jaxpr(likelihood._score, static_argnums=5)(
        varied_params, tokens, tokens, tokens > 0, np.ones(4, bool), varied, None
    )
    assert "2,32,320" in str(program)
    assert "2,128,320" not in str(program)
