"""Decoding by transformers beside ours: the same tokens, whatever the cache, the padding and the drafting."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import lsjax
from lsjax.decoding.batch import PromptBatch
from lsjax.decoding.benchmark import benchmark
from lsjax.decoding.rivals import TransformersModel, TransformersTrial, ways
from tests.parity.llamas import make_llama

PROMPTS = [[5, 17, 99, 3, 250], [7] * 3 + [42] * 14, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_way_gives_our_tokens(batch_size, tmp_path):
    make_llama(tmp_path, "llama3")
    model = lsjax.load(tmp_path)
    theirs = TransformersModel(model)
    known = ways(1, 3, batch_size)
    report = benchmark(
        model,
        PROMPTS,
        [lsjax.SelfSpeculative(1, 3)],
        max_new_tokens=24,
        batch_size=batch_size,
        repeats=1,
        rivals=lambda batches: [TransformersTrial(theirs, way, batches) for way in known],
    )
    names = [run["strategy"] for run in report["runs"]]
    assert names[:2] == ["autoregressive", "self_speculative"]
    expected = ["dynamic cache", "static cache", *(["early exit"] * 2 if batch_size == 1 else [])]
    assert names[2:] == [f"transformers, {name}" for name in expected]
    assert all(run["matches_autoregressive"] for run in report["runs"]), names
    assert all(run["speedup"] > 0 and run["time_to_first_token_ms"] > 0 for run in report["runs"])


def test_a_stop_token_ends_their_rows_too(tmp_path):
    make_llama(tmp_path, "llama3")
    model = lsjax.load(tmp_path)
    theirs = TransformersModel(model)
    batch = PromptBatch.make(model, PROMPTS, 24)
    tokens, *_ = theirs.decode(batch, ways(1, 3, 3)[0])
    theirs.stop = [tokens[0][5]]
    first = tokens[0].index(theirs.stop[0])
    again, *_ = theirs.decode(batch, ways(1, 3, 3)[0])
    assert again[0] == tokens[0][: first + 1]
    for row, whole in zip(again, tokens, strict=True):
        assert row == whole[: len(row)]
