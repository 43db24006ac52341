"""Decoding by transformers gives the same tokens as ours, with any cache, padding and drafting."""

import pytest

from lsjax.decoding.batch import GenerationConfig

pytest.importorskip("torch")
pytest.importorskip("transformers")

import lsjax
from lsjax.benchmarks.decoding import benchmark
from lsjax.benchmarks.transformers_baseline import TransformersDecoder, TransformersModel, transformers_modes
from lsjax.decoding.batch import PromptBatch
from tests.helpers.llamas import make_llama

PROMPTS = [[5, 17, 99, 3, 250], [7] * 3 + [42] * 14, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_mode_gives_our_tokens(batch_size, tmp_path):
    make_llama(tmp_path, "llama3")
    model = lsjax.load(tmp_path)
    theirs = TransformersModel(model)
    modes = transformers_modes(1, 3, batch_size)
    report = benchmark(
        model,
        PROMPTS,
        [lsjax.SelfSpeculative(1, 3)],
        max_new_tokens=24,
        batch_size=batch_size,
        repeats=1,
        baselines=lambda batches: [TransformersDecoder(theirs, mode, batches) for mode in modes],
    )
    names = [run["strategy"] for run in report["runs"]]
    assert names[:2] == ["autoregressive", "self_speculative"]
    expected = ["dynamic cache", "static cache", *(["early exit"] * 2 if batch_size == 1 else [])]
    assert names[2:] == [f"transformers, {name}" for name in expected]
    assert all(run["matches_autoregressive"] for run in report["runs"]), names
    assert all(run["speedup"] > 0 and run["time_to_first_token_ms"] > 0 for run in report["runs"])


def test_a_stop_token_ends_their_sequences_too(tmp_path):
    make_llama(tmp_path, "llama3")
    model = lsjax.load(tmp_path)
    theirs = TransformersModel(model)
    batch = PromptBatch.make(model, PROMPTS, GenerationConfig(24))
    mode = transformers_modes(1, 3, 3)[0]
    tokens = theirs.decode(batch, mode).tokens
    theirs.stop_token_ids = [tokens[0][5]]
    first = tokens[0].index(theirs.stop_token_ids[0])
    again = theirs.decode(batch, mode).tokens
    assert again[0] == tokens[0][: first + 1]
    for stopped, whole in zip(again, tokens, strict=True):
        assert stopped == whole[: len(stopped)]
