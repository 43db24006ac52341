"""Self-speculation gives the tokens and the acceptance of the paper's own code, round by round.

tests/decoding/layerskip holds a random model that lsjax exported, in bfloat16, and recorded.json, what the greedy
SelfSpeculativeGenerationStrategy of facebookresearch/LayerSkip decoded with it: the tokens, and for each round how many
drafts were accepted and how many were made. None of that code is here. It ran with the versions that recorded.json
names, in float32, from the token ids of each prompt, with the token that ends a text as the only one that does.

The last token of each prompt there is the full model's own next token. Our prefill emits it, so both draft their first
round from the same place. The model never ends a text: the head's column of that token is zero.
"""

import itertools
import json
from pathlib import Path

import pytest

import lsjax

FOLDER = Path(__file__).parent / "layerskip"
RECORDED = json.loads((FOLDER / "recorded.json").read_text())
TEXTS = RECORDED["texts"]


@pytest.fixture(scope="module")
def model():
    return lsjax.load(FOLDER)


@pytest.mark.parametrize("run", RECORDED["runs"], ids=lambda run: f"exit layer {run['exit_layer']}")
def test_tokens_and_acceptance_are_those_of_the_papers_code(model, run):
    prompts = [text["prompt"][:-1] for text in TEXTS]
    new_tokens, drafts = RECORDED["max_new_tokens"] + 1, RECORDED["num_speculations"]
    strategy = lsjax.SelfSpeculative(run["exit_layer"], drafts)
    tokens, rounds = [[] for _ in TEXTS], [[] for _ in TEXTS]
    accepted = drafted = 0
    for piece in lsjax.stream(model, prompts, new_tokens, strategy):
        tokens[piece.row] += piece.tokens
        rounds[piece.row].append(len(piece.tokens) - 1)
        if piece.stats:
            accepted, drafted = accepted + piece.stats["accepted"], drafted + piece.stats["drafted"]
    assert len(TEXTS) == 16
    for text, found, ours, theirs in zip(TEXTS, tokens, rounds, run["rounds"], strict=True):
        assert found == [text["prompt"][-1], *text["tokens"]]
        # The first piece is the token of prefill. Near the limit of new tokens, theirs drafts as much as fits.
        whole = list(itertools.takewhile(lambda made: made[1] == drafts, theirs))
        assert ours[1 : 1 + len(whole)] == [accepted for accepted, _ in whole]
        assert len(whole) >= len(theirs) - drafts
    recorded = [sum(column) for column in zip(*(made for theirs in run["rounds"] for made in theirs), strict=True)]
    assert 0.3 < recorded[0] / recorded[1] < 0.8
    assert accepted / drafted == pytest.approx(recorded[0] / recorded[1], abs=0.02)
