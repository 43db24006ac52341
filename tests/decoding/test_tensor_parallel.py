"""A model split over several devices gives the tokens of one."""

import jax
import numpy as np
import pytest

import lsjax
from lsjax.data.tokenizer import train_tokenizer
from lsjax.errors import UserError
from lsjax.io.huggingface import write_huggingface
from pallas_kernels.kv_cache import interface as kv_cache
from tests.helpers.interpreted import simulated_gpu

pytestmark = pytest.mark.slow

PROMPTS = [[5, 9, 2], [300, 17, 41, 8, 250, 33, 12, 77, 5, 6, 7], [1]]
REPEATED = [[7, 8, 9] * 4, *PROMPTS]


@pytest.fixture(scope="module")
def folder(varied, varied_params, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_huggingface(path, varied, jax.device_get(varied_params), train_tokenizer(["some text to learn from"], 300))
    return path


@pytest.mark.parametrize(
    "strategy",
    [lsjax.Autoregressive(), lsjax.EarlyExit(2), lsjax.SelfSpeculative(2, 3)],
    ids=lambda strategy: strategy.name,
)
def test_tokens_equal_those_of_one_device(folder, strategy):
    alone, split = lsjax.load(folder), lsjax.load(folder, tensor=2)
    expected = lsjax.generate(alone, PROMPTS, 24, strategy)
    found = lsjax.generate(split, PROMPTS, 24, strategy)
    assert found.tokens == expected.tokens
    assert [s["accepted"] for s in found.stats] == [s["accepted"] for s in expected.stats]


def test_copied_drafts_change_nothing_but_speed(folder):
    """The drafts judged and the drafts accepted equal those on one device, and some are accepted."""
    alone, split = lsjax.load(folder), lsjax.load(folder, tensor=2)
    strategy = lsjax.SelfSpeculative(2, 2, lookup=4)
    expected, found = (lsjax.generate(model, REPEATED, 40, strategy) for model in (alone, split))
    assert found.tokens == expected.tokens == lsjax.generate(alone, REPEATED, 40).tokens
    for key in ("drafted_by_position", "accepted_by_position"):
        assert [s[key] for s in found.stats] == [s[key] for s in expected.stats]
    assert any(s["accepted_by_position"][2] for s in found.stats)  # past the early layers' own


def test_kernels_on_each_device_give_the_same_tokens(folder, monkeypatch):
    """Pallas' interpreter runs rounds of drafts and of copies, and prompts that wait for a place."""
    alone, split = lsjax.load(folder), lsjax.load(folder, tensor=2)
    strategy = lsjax.SelfSpeculative(2, 3, lookup=4)
    expected = lsjax.generate(alone, REPEATED, 16, strategy)
    monkeypatch.setattr(kv_cache, "choose", lambda *_: kv_cache.Kernels("gpu"))
    with simulated_gpu():
        found = lsjax.generate(split, REPEATED, 16, strategy, batch_size=2)
    assert {s["kernels"] for s in found.stats} == {"gpu"}
    assert found.tokens == expected.tokens
    assert [s["accepted"] for s in found.stats] == [s["accepted"] for s in expected.stats]


def test_weights_and_cache_are_split(folder):
    """They are split by heads, feed-forward and vocabulary; the loop gathers no weight and no cache, only rows of D or
    V."""
    from lsjax.aot import hlo
    from lsjax.aot.collectives import collectives
    from lsjax.decoding.lowering import DecodeShape, lower_decoding

    model = lsjax.load(folder, tensor=2)
    weights = model.decoder_weights()
    whole = ("final_norm", "attention_norm", "feed_forward_norm")
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        split = leaf.addressable_shards[0].data.size < leaf.size
        assert split != any(name in jax.tree_util.keystr(path) for name in whole), path
    layout = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), weights)
    shape = DecodeShape(batch_size=2, padded_prompt_length=16, capacity=64, buffer_size=32, num_stop_tokens=1)
    _, loop = lower_decoding(layout, model.config, lsjax.SelfSpeculative(2, 3), shape)
    compiled = loop.compile()
    caches = compiled.output_shardings.cache
    assert all(s.shard_shape((2, 2, 64, 8)) == (2, 1, 64, 8) for s in jax.tree.leaves(caches))
    sent = collectives(hlo.parse(compiled.as_text()), 2)
    row = 2 * 4 * max(model.config.width, model.config.vocab_size) * 4  # B rows of d + 1 tokens, float32
    assert sent
    assert max(c.payload for c in sent) <= row


def test_what_does_not_divide_is_named(folder):
    with pytest.raises(UserError, match=r"config.mesh.tensor \(3\) does not divide"):
        lsjax.load(folder, tensor=3)
    with pytest.raises(UserError, match="tensor is 9, but there are 8"):
        lsjax.load(folder, tensor=9)
    np.testing.assert_equal(lsjax.load(folder).params["embed"].sharding.num_devices, 1)
