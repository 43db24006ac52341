"""Sampling draws from the full model's distribution, with drafts or without: against the distribution enumerated."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsjax
from lsjax.config import ModelConfig
from lsjax.decoding import programs, rules
from lsjax.decoding.generate import _compiled
from lsjax.decoding.passes import decoder_weights
from lsjax.decoding.programs import DecodeShape
from lsjax.decoding.rules import Sampled, filtered_log_probabilities
from lsjax.decoding.strategies import Sampling
from lsjax.errors import UserError
from lsjax.loading import Model
from lsjax.model.transformer import forward
from tests.conftest import random_params
from tests.decoding.test_loops import PROMPTS, NoTokenizer

SMALL = ModelConfig(3, 16, 2, 1, 8, 24, 7, 64, tie_embeddings=False)
PROMPT = (3, 1, 4)
NEW = 3
SETTINGS = [Sampling(1.0), Sampling(0.7, top_k=4), Sampling(1.3, top_p=0.8), Sampling(1.6, top_k=5, top_p=0.7)]


def filtered(logits, s: Sampling) -> np.ndarray:
    """Probabilities by the definitions, in float64: temperature, then top_k, then top_p."""
    p = np.exp(np.float64(logits) / s.temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    if s.top_k:
        p[order[s.top_k :]] = 0
        p /= p.sum()
    if s.top_p < 1:
        needed = int(np.searchsorted(np.cumsum(p[order]), s.top_p)) + 1
        p[order[needed:]] = 0
        p /= p.sum()
    return p


@pytest.mark.parametrize("s", [*SETTINGS, Sampling(0.5, top_k=50), Sampling(1.0, top_p=1e-6)], ids=str)
def test_filters_are_their_definitions(s):
    logits = np.random.default_rng(0).normal(size=(50, 7)) * 2
    found = np.exp(filtered_log_probabilities(jnp.asarray(logits, jnp.float32), *by_value(s)))
    np.testing.assert_allclose(found, [filtered(row, s) for row in logits], atol=1e-5)


def test_top_p_1_leaves_all_of_a_large_vocabulary():
    logits = np.random.default_rng(0).normal(size=(2, 128_256)) * 3
    found = filtered_log_probabilities(jnp.asarray(logits, jnp.float32), *by_value(Sampling(1.0)))
    assert np.all(np.isfinite(found))


def by_value(s: Sampling):
    return np.float32(s.temperature), np.int32(s.top_k), np.float32(s.top_p)


@pytest.fixture(scope="module")
def params():
    """Layers that change their minds: the first exit's distribution is far from the last one's."""
    params = random_params(SMALL, seed=3)
    late = jax.tree.map(lambda a: a.at[1:].multiply(2) if a.ndim > 2 else a, params["layers"])
    return params | {"lm_head": 15 * params["lm_head"], "layers": late}


@pytest.fixture(scope="module")
def next_logits(params):
    return logits_after(params, PROMPT)


def logits_after(params, prompt):
    """{tokens after the prompt: logits of the full model, of exit 1} for every continuation of up to two tokens."""
    texts = [text for n in range(NEW) for text in itertools.product(range(SMALL.vocab_size), repeat=n)]
    padded = np.array([[*prompt, *text, *[0] * (NEW - len(text))] for text in texts])
    last = [len(prompt) + len(text) - 1 for text in texts]
    pick = lambda logits: np.asarray(logits)[np.arange(len(texts)), last]  # noqa: E731
    only_first = jnp.array([1.0, 0.0, 0.0])
    full, early = forward(params, padded, SMALL), forward(params, padded, SMALL, only_first)
    return dict(zip(texts, zip(pick(full), pick(early), strict=True), strict=True))


def enumerated(next_logits, s: Sampling) -> np.ndarray:
    """Probability of every text of three tokens: [7, 7, 7]."""
    joint = np.zeros((SMALL.vocab_size,) * NEW)
    for text in itertools.product(range(SMALL.vocab_size), repeat=NEW):
        joint[text] = np.prod([filtered(next_logits[text[:n]][0], s)[text[n]] for n in range(NEW)])
    return joint


def sampled(params, strategy, s: Sampling, count: int, *prompts: tuple) -> np.ndarray:
    """How often each text of three tokens came out of the first prompt: [7, 7, 7]. One batch, over and over, with other
    keys."""
    prompts = prompts or (PROMPT,)
    weights = decoder_weights(params, jnp.float32)
    how = {"config": SMALL, "strategy": strategy}
    shape = DecodeShape(rows=len(prompts), bucket=16, capacity=32, room=16, stops=1)
    tokens = np.zeros((len(prompts), 16), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = jnp.array([len(prompt) for prompt in prompts])

    def one(key):
        rule = Sampled(jax.random.key_data(jax.random.split(key, len(prompts))), *by_value(s))
        inputs = jnp.int32(NEW), jnp.array([-1]), rule
        state = programs._first_token(weights, tokens, lengths, *inputs, **how, shape=shape)
        return programs._decode(weights, state, *inputs, **how).tokens[0, :NEW]

    many = jax.jit(jax.vmap(one))
    found = np.concatenate([many(jax.random.split(jax.random.key(seed), 10_000)) for seed in range(count // 10_000)])
    counts = np.zeros((SMALL.vocab_size,) * NEW)
    np.add.at(counts, tuple(found.T), 1)
    return counts


def excess(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Chi-square over its quantile at 1 - 1e-5 (Wilson and Hilferty's): above 1, the two do not agree. Cells with less
    than 10 expected are taken together."""
    expected = counts.sum() * probabilities
    large = expected >= 10
    observed = np.append(counts[large], counts[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    if expected[-1] < 10:
        if observed[-1] > 10 * expected[-1] + 10:
            return np.inf  # what has no probability came out
        observed, expected = observed[:-1], expected[:-1]
    freedom = len(expected) - 1
    quantile = freedom * (1 - 2 / (9 * freedom) + 4.265 * (2 / (9 * freedom)) ** 0.5) ** 3
    return float(np.sum((observed - expected) ** 2 / expected) / quantile)


DRAFTING = lsjax.SelfSpeculative(exit_layer=1, num_speculations=2)
COPYING = [lsjax.SelfSpeculative(1, 2, lookup=1), lsjax.SelfSpeculative(1, 1, lookup=2)]


def test_the_drafter_disagrees_strongly(next_logits):
    full, early = next_logits[()]
    distance = 0.5 * np.abs(filtered(full, Sampling(1.0)) - filtered(early, Sampling(1.0))).sum()
    assert distance > 0.5


@pytest.mark.parametrize("s", SETTINGS, ids=str)
@pytest.mark.parametrize("strategy", [DRAFTING, lsjax.Autoregressive()], ids=lambda s: s.name)
def test_texts_come_out_as_often_as_the_full_model_says(params, next_logits, strategy, s):
    count = 100_000 if strategy is DRAFTING else 20_000
    assert excess(sampled(params, strategy, s, count), enumerated(next_logits, s)) < 1


def accept_all(self, drafts, drawn_by, logits, index):
    block, _ = verify(self, drafts, drawn_by, logits, index)
    return block, jnp.full(drafts.shape[0], drafts.shape[1], jnp.int32)


def replace_from_p(self, drafts, drawn_by, logits, index):
    """Instead of from what the drafter left of p."""
    block, accepted = verify(self, drafts, drawn_by, logits, index)
    log_p = filtered_log_probabilities(logits, self.temperature, self.top_k, self.top_p)
    at = jnp.take_along_axis(log_p, accepted[:, None, None], axis=1)[:, 0]
    token = self._draw(at, index + accepted, rules._REPLACE)
    return jnp.where(jnp.arange(block.shape[1]) == accepted[:, None], token[:, None], block), accepted


def judge_unfiltered(self, drafts, drawn_by, logits, index):
    return verify(self._replace(top_k=jnp.int32(0), top_p=jnp.float32(1.0)), drafts, drawn_by, logits, index)


verify = Sampled.verify


@pytest.mark.parametrize(("strategy", "s"), zip(COPYING, SETTINGS[1:3], strict=True), ids=str)
def test_copied_drafts_change_no_distribution(params, strategy, s):
    """After nearly every first token there is something to copy; the row beside it has nothing, and drafts."""
    prompt = (1, 0, 1, 2, 1, 3, 1, 4, 1, 5, 1, 6, 1)
    counts = sampled(params, strategy, s, 50_000, prompt, (0, 1, 2, 3, 4, 5, 6))
    assert excess(counts, enumerated(logits_after(params, prompt), s)) < 1


@pytest.mark.parametrize("broken", [accept_all, replace_from_p, judge_unfiltered], ids=lambda f: f.__name__)
def test_a_broken_rule_is_noticed(monkeypatch, params, next_logits, broken):
    monkeypatch.setattr(Sampled, "verify", broken)
    s = SETTINGS[3]
    assert excess(sampled(params, DRAFTING, s, 20_000), enumerated(next_logits, s)) > 3


def test_another_order_of_the_filters_is_noticed(monkeypatch, params, next_logits):
    """top_p before the temperature."""
    right = rules.filtered_log_probabilities

    def wrong(logits, temperature, top_k, top_p):
        return right(right(logits, 1.0, top_k, top_p), temperature, jnp.int32(0), jnp.float32(1.0))

    monkeypatch.setattr(rules, "filtered_log_probabilities", wrong)
    s = SETTINGS[3]
    assert excess(sampled(params, DRAFTING, s, 20_000), enumerated(next_logits, s)) > 3


@pytest.fixture(scope="module")
def model(varied, varied_params):
    return Model(varied, varied_params, NoTokenizer())


@pytest.mark.parametrize("strategy", [lsjax.Autoregressive(), lsjax.SelfSpeculative(2, 3)], ids=lambda s: s.name)
def test_a_rows_draws_do_not_depend_on_its_batch(model, strategy):
    how = {"max_new_tokens": 16, "strategy": strategy, "sampling": Sampling(1.0, top_k=50), "seed": 7}
    together = lsjax.generate(model, [*PROMPTS, PROMPTS[0]], **how).tokens
    alone = [lsjax.generate(model, [prompt], **how).tokens[0] for prompt in PROMPTS[::2]]
    assert together[:3:2] == alone
    assert together[3] != together[0]  # a copy is another sample
    other = lsjax.generate(model, [PROMPTS[0]], **(how | {"seed": 8})).tokens[0]
    assert other not in (together[0], together[3])


def test_other_settings_do_not_compile_anew(model):
    run = functools.partial(lsjax.generate, model, PROMPTS, 8, lsjax.SelfSpeculative(2, 3))
    run(sampling=Sampling(0.9, top_k=20), seed=1)
    before = _compiled.cache_info().misses
    for s in (Sampling(1.4, top_k=3), Sampling(0.3, top_p=0.5), Sampling(2.0, top_k=9, top_p=0.9)):
        run(sampling=s, seed=2)
    assert _compiled.cache_info().misses == before


def test_a_low_temperature_is_greedy(model):
    cold = lsjax.generate(model, PROMPTS, 16, lsjax.SelfSpeculative(2, 3), Sampling(1e-4)).tokens
    assert cold == lsjax.generate(model, PROMPTS, 16).tokens


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(-1.0), "temperature must be 0"),
        (Sampling(float("nan")), "temperature must be 0"),
        (Sampling(1e-40), "temperature must be 0 \\(greedy\\) or at least 1e-06"),
        (Sampling(1.0, top_k=-1), "top_k must be 0"),
        (Sampling(1.0, top_p=0.0), "top_p must be above 0"),
        (Sampling(1.0, top_p=1.5), "top_p must be above 0"),
        (Sampling(0.0, top_k=5), "need a temperature"),
    ],
)
def test_a_setting_out_of_range_is_named(model, sampling, message):
    with pytest.raises(UserError, match=message):
        lsjax.generate(model, PROMPTS, 8, sampling=sampling)
