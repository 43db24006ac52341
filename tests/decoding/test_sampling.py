"""Sampling draws from the full model's distribution, with drafts and without, tested against the enumerated one."""

import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsjax
from lsjax.config import ModelConfig
from lsjax.decoding import lowering, sampling
from lsjax.decoding.draft_vocabulary import trim_head
from lsjax.decoding.forward import DRAFT, decoder_weights
from lsjax.decoding.lowering import DecodeShape
from lsjax.decoding.model import Model
from lsjax.decoding.program_cache import PROGRAM_CACHE
from lsjax.decoding.sampling import Coupled, Sampled, Subset, filtered_log_probabilities
from lsjax.decoding.strategies import Sampling, SelfSpeculative
from lsjax.errors import UserError
from lsjax.model.transformer import forward
from tests.conftest import random_params
from tests.helpers.prompts import PROMPTS, NoTokenizer

SMALL = ModelConfig(3, 16, 2, 1, 8, 24, 7, 64, tie_embeddings=False)
PROMPT = (3, 1, 4)
NEW = 3
SETTINGS = [Sampling(1.0), Sampling(0.7, top_k=4), Sampling(1.3, top_p=0.8), Sampling(1.6, top_k=5, top_p=0.7)]


def filtered(logits, s: Sampling) -> np.ndarray:
    """Computes probabilities by the definitions, in float64: temperature, then top_k, then top_p."""
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
    """Returns layers that change their minds: the first exit's distribution is far from the last layer's."""
    params = random_params(SMALL, seed=3)
    late = jax.tree.map(lambda a: a.at[1:].multiply(2) if a.ndim > 2 else a, params["layers"])
    return params | {"lm_head": 15 * params["lm_head"], "layers": late}


@pytest.fixture(scope="module")
def next_logits(params):
    return logits_after(params, PROMPT)


def logits_after(params, prompt):
    """Returns {tokens after the prompt: logits of the full model and of exit 1} for every continuation of up to two
    tokens."""
    texts = [text for n in range(NEW) for text in itertools.product(range(SMALL.vocab_size), repeat=n)]
    padded = np.array([[*prompt, *text, *[0] * (NEW - len(text))] for text in texts])
    last = [len(prompt) + len(text) - 1 for text in texts]

    def pick(logits):
        return np.asarray(logits)[np.arange(len(texts)), last]

    only_first = jnp.array([1.0, 0.0, 0.0])
    full, early = forward(params, padded, SMALL), forward(params, padded, SMALL, only_first)
    return dict(zip(texts, zip(pick(full), pick(early), strict=True), strict=True))


def enumerated(next_logits, s: Sampling) -> np.ndarray:
    """Returns the probability of every text of three tokens [7, 7, 7]."""
    joint = np.zeros((SMALL.vocab_size,) * NEW)
    for text in itertools.product(range(SMALL.vocab_size), repeat=NEW):
        joint[text] = np.prod([filtered(next_logits[text[:n]][0], s)[text[n]] for n in range(NEW)])
    return joint


def sampled(params, strategy, s: Sampling, count: int, *prompts: tuple) -> np.ndarray:
    """Counts how often each text of three tokens came out of the first prompt [7, 7, 7].

    One batch runs over and over, with other keys.
    """
    prompts = prompts or (PROMPT,)
    weights = decoder_weights(params, jnp.float32)
    if strategy.draft_vocabulary:
        weights[DRAFT] = trim_head(weights, np.array(strategy.draft_vocabulary, np.int32))
    how = {"config": SMALL, "strategy": strategy}
    shape = DecodeShape(
        batch_size=len(prompts), padded_prompt_length=16, capacity=32, buffer_size=16, num_stop_tokens=1
    )
    tokens = np.zeros((len(prompts), 16), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = jnp.array([len(prompt) for prompt in prompts])

    def one(key):
        sampler = Sampled(jax.random.key_data(jax.random.split(key, len(prompts))), *by_value(s))
        inputs = jnp.int32(NEW), jnp.array([-1]), sampler
        state = lowering._first_token(weights, tokens, lengths, *inputs, **how, shape=shape)
        return lowering._decode(weights, state, *inputs, **how).tokens[0, :NEW]

    many = jax.jit(jax.vmap(one))
    found = np.concatenate([many(jax.random.split(jax.random.key(seed), 10_000)) for seed in range(count // 10_000)])
    counts = np.zeros((SMALL.vocab_size,) * NEW)
    np.add.at(counts, tuple(found.T), 1)
    return counts


def excess(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Returns chi-square over its quantile at 1 - 1e-5 (Wilson and Hilferty): above 1, the two distributions differ.

    Cells that expect fewer than 10 are taken together.
    """
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


@pytest.mark.slow
@pytest.mark.parametrize("s", SETTINGS, ids=str)
@pytest.mark.parametrize("strategy", [DRAFTING, lsjax.Autoregressive()], ids=lambda s: s.name)
def test_texts_come_out_as_often_as_the_full_model_says(params, next_logits, strategy, s):
    count = 100_000 if strategy is DRAFTING else 20_000
    assert excess(sampled(params, strategy, s, count), enumerated(next_logits, s)) < 1


@pytest.fixture(scope="module")
def trimmed(next_logits):
    """Returns a strategy whose drafts lack the likeliest token and the third after the prompt."""
    likeliest = np.argsort(-next_logits[()][0])[[0, 2]]
    return lsjax.SelfSpeculative(1, 2, draft_vocabulary=sorted({*range(SMALL.vocab_size)} - {*likeliest.tolist()}))


@pytest.mark.parametrize("s", [SETTINGS[0], SETTINGS[3]], ids=str)
def test_drafts_of_a_part_of_the_vocabulary_change_no_distribution(params, next_logits, trimmed, s):
    assert excess(sampled(params, trimmed, s, 30_000), enumerated(next_logits, s)) < 1


def no_zeros_outside(self, log_probs):
    """Gives the tokens outside the subset a probability, so that the residual there is not p itself."""
    return jnp.maximum(spread(self, log_probs), jnp.log(0.2))


def by_place(self, log_probs):
    """Takes the tokens of the subset for the ids 0, 1, ..."""
    missing = self.vocab_size - log_probs.shape[1]
    return jnp.pad(log_probs, ((0, 0), (0, missing)), constant_values=-jnp.inf)


spread = Subset.spread


@pytest.mark.parametrize("broken", [no_zeros_outside, by_place], ids=lambda f: f.__name__)
def test_a_broken_rule_for_a_part_of_the_vocabulary_is_noticed(monkeypatch, params, next_logits, trimmed, broken):
    monkeypatch.setattr(Subset, "spread", broken)
    s = SETTINGS[0]
    assert excess(sampled(params, trimmed, s, 20_000), enumerated(next_logits, s)) > 3


def accept_all(self, drafts, draft_log_probs, logits, index):
    block, _ = verify(self, drafts, draft_log_probs, logits, index)
    return block, jnp.full(drafts.shape[0], drafts.shape[1], jnp.int32)


def replace_from_p(self, drafts, draft_log_probs, logits, index):
    """Replaces a rejected draft by a draw from p, not from the residual of p and q."""
    block, accepted = verify(self, drafts, draft_log_probs, logits, index)
    log_p = filtered_log_probabilities(logits, self.temperature, self.top_k, self.top_p)
    at = jnp.take_along_axis(log_p, accepted[:, None, None], axis=1)[:, 0]
    token = self._draw(at, index + accepted, sampling._REPLACE)
    return jnp.where(jnp.arange(block.shape[1]) == accepted[:, None], token[:, None], block), accepted


def judge_unfiltered(self, drafts, draft_log_probs, logits, index):
    return verify(self._replace(top_k=jnp.int32(0), top_p=jnp.float32(1.0)), drafts, draft_log_probs, logits, index)


verify = Sampled.verify


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "s"), zip(COPYING, SETTINGS[1:3], strict=True), ids=str)
def test_copied_drafts_change_no_distribution(params, strategy, s):
    """After nearly every first token there is something to copy; the other sequence has nothing to copy, and drafts."""
    prompt = (1, 0, 1, 2, 1, 3, 1, 4, 1, 5, 1, 6, 1)
    counts = sampled(params, strategy, s, 50_000, prompt, (0, 1, 2, 3, 4, 5, 6))
    assert excess(counts, enumerated(logits_after(params, prompt), s)) < 1


@pytest.mark.slow
@pytest.mark.parametrize("broken", [accept_all, replace_from_p, judge_unfiltered], ids=lambda f: f.__name__)
def test_a_broken_rule_is_noticed(monkeypatch, params, next_logits, broken):
    monkeypatch.setattr(Sampled, "verify", broken)
    s = SETTINGS[3]
    assert excess(sampled(params, DRAFTING, s, 20_000), enumerated(next_logits, s)) > 3


def test_another_order_of_the_filters_is_noticed(monkeypatch, params, next_logits):
    """The mutation applies top_p before the temperature."""
    right = sampling.filtered_log_probabilities

    def wrong(logits, temperature, top_k, top_p):
        return right(right(logits, 1.0, top_k, top_p), temperature, jnp.int32(0), jnp.float32(1.0))

    monkeypatch.setattr(sampling, "filtered_log_probabilities", wrong)
    s = SETTINGS[3]
    assert excess(sampled(params, DRAFTING, s, 20_000), enumerated(next_logits, s)) > 3


@pytest.fixture(scope="module")
def model(varied, varied_params):
    return Model(varied, varied_params, NoTokenizer())


@pytest.mark.slow
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
    before = PROGRAM_CACHE.misses
    for s in (Sampling(1.4, top_k=3), Sampling(0.3, top_p=0.5), Sampling(2.0, top_k=9, top_p=0.9)):
        run(sampling=s, seed=2)
    assert PROGRAM_CACHE.misses == before


def test_a_low_temperature_is_greedy(model):
    cold = lsjax.generate(model, PROMPTS, 16, lsjax.SelfSpeculative(2, 3), Sampling(1e-4)).tokens
    assert cold == lsjax.generate(model, PROMPTS, 16).tokens


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(-1.0), "temperature must be 0"),
        (Sampling(float("nan")), "temperature must be 0"),
        (Sampling(1e-40), r"temperature must be 0 \(greedy\) or in 1e-06"),
        (Sampling(1.0, top_k=-1), "top_k must be 0"),
        (Sampling(1.0, top_p=0.0), "top_p must be at least 1e-30 and at most 1, got 0.0"),
        (Sampling(1.0, top_p=1.5), "top_p must be at least 1e-30 and at most 1, got 1.5"),
        (Sampling(0.0, top_k=5), "need a temperature"),
    ],
)
def test_a_setting_out_of_range_is_named(model, sampling, message):
    with pytest.raises(UserError, match=message):
        lsjax.generate(model, PROMPTS, 8, sampling=sampling)


@pytest.mark.parametrize(
    ("strategy", "sampling"),
    [
        (SelfSpeculative(1, 3), Sampling(0.15, coupled=True)),
        (SelfSpeculative(2, 5), Sampling(0.2, top_k=40, top_p=0.9, coupled=True)),
        (SelfSpeculative(2, 4, lookup=6), Sampling(0.3, top_k=20, top_p=0.9, coupled=True)),
        (SelfSpeculative(2, 3, draft_weights="int8"), Sampling(0.15, coupled=True)),
    ],
    ids=str,
)
def test_coupled_draws_are_those_of_autoregressive_sampling(model, strategy, sampling):
    """Token for token with the same seed, in batches of any make-up, while some drafts are kept and some are not."""
    rng, stats = np.random.default_rng(0), []
    for seed in range(2):
        prompts = [rng.integers(0, 320, rng.integers(1, 16)).tolist() for _ in range(3)] + [[5, 6] * 6]
        drafted = lsjax.generate(model, prompts, 24, strategy, sampling, seed)
        plain = lsjax.generate(model, prompts, 24, sampling=sampling, seed=seed)
        assert drafted.tokens == plain.tokens
        beside_others = [prompts[0], [9], [9, 9], [8]]  # of the same shape, so that nothing compiles
        assert lsjax.generate(model, beside_others, 24, strategy, sampling, seed).tokens[0] == plain.tokens[0]
        stats += drafted.stats
    assert 0 < sum(s["accepted"] for s in stats) < sum(s["drafted"] for s in stats)


def test_sampling_without_drafts_is_the_same_coupled_or_not(model):
    for strategy in (lsjax.EarlyExit(2),):
        plain, coupled = (
            lsjax.generate(model, PROMPTS, 9, strategy, Sampling(0.9, coupled=coupled), seed=3).tokens
            for coupled in (False, True)
        )
        assert plain == coupled


@pytest.mark.parametrize("s", [Sampling(1.0), Sampling(0.7, top_k=5), Sampling(1.3, top_p=0.7)], ids=str)
def test_the_chance_of_a_coupled_draft_is_what_draws_show(s):
    """The closed form against the share of equal draws, with the formula's double sum in numpy between them."""
    rng = np.random.default_rng(1)
    ours, theirs = (jnp.asarray(2 * rng.normal(size=(1, 24)), jnp.float32) for _ in range(2))
    p, q = (filtered(np.asarray(a[0]), s) for a in (ours, theirs))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.maximum(p[None] / p[:, None], q[None] / q[:, None])
    by_sums = sum(1 / ratios[i].sum() for i in range(24) if p[i] > 0 and q[i] > 0)
    count = 40_000
    keys = jax.random.key_data(jax.random.split(jax.random.key(2), count))
    sampler = Coupled(keys, *by_value(s))
    index = jnp.zeros(count, jnp.int32)
    drafts, _ = sampler.choose(jnp.broadcast_to(theirs, (count, 24)), index)
    logits = jnp.broadcast_to(ours[:, None], (count, 2, 24))
    _, accepted = sampler.verify(drafts[:, None], None, logits, index)
    assert float(sampler.acceptance(theirs, ours)[0]) == pytest.approx(by_sums, rel=1e-4)
    assert float(jnp.mean(accepted)) == pytest.approx(by_sums, abs=5 * np.sqrt(0.25 / count))


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [SelfSpeculative(1, 2), SelfSpeculative(2, 1), SelfSpeculative(1, 2, draft_vocabulary=(0, 2, 5))],
    ids=str,
)
def test_coupled_drafts_change_no_distribution(params, next_logits, strategy, monkeypatch):
    """The chi-square test of the ordinary rule, with draws of the coupled one."""
    monkeypatch.setattr(sys.modules[__name__], "Sampled", Coupled)
    s = Sampling(1.0)
    assert excess(sampled(params, strategy, s, 20_000), enumerated(next_logits, s)) < 1
