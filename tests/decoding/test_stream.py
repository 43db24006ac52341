"""Pieces together are the whole text; stop strings and stop tokens end it where they should; every draft counts."""

import itertools

import jax
import numpy as np
import pytest
import tokenizers
import tokenizers.decoders
import tokenizers.models

import lsjax
from lsjax.benchmarks.decoding import benchmark
from lsjax.data.tokenizer import Tokenizer, train_tokenizer
from lsjax.decoding.model import Model
from lsjax.decoding.program_cache import PROGRAM_CACHE
from lsjax.errors import UserError
from lsjax.model.transformer import forward

PROMPTS = [[5, 9, 2], [7] * 17, [300, 1, 14, 15, 92, 6, 53]]
NEW = 24
DRAFTING = lsjax.SelfSpeculative(2, 4)
STRATEGIES = pytest.mark.parametrize("strategy", [lsjax.Autoregressive(), DRAFTING], ids=lambda s: s.name)
COUNTS = ("new_tokens", "rounds", "drafted", "accepted", "accepted_by_position", "acceptance_by_position")


@pytest.fixture(scope="module")
def model(varied, varied_params):
    """Returns a model with byte-level BPE: what a random model writes with it is full of halves of characters."""
    tokenizer = train_tokenizer(["zwölf Boxkämpfer jagen Viktor über den großen Sylter Deich — 日本語 😀"], 320)
    assert tokenizer.vocab_size == 320
    return Model(varied, varied_params, tokenizer)


@pytest.fixture(scope="module")
def whole(model):
    return lsjax.generate(model, PROMPTS, NEW)


def joined(pieces, rows):
    def of_row(row):
        return [piece for piece in pieces if piece.row == row]

    tokens = [[token for piece in of_row(row) for token in piece.tokens] for row in range(rows)]
    return tokens, ["".join(piece.text for piece in of_row(row)) for row in range(rows)]


@STRATEGIES
def test_pieces_together_are_what_generate_returns(model, whole, strategy):
    pieces = list(lsjax.stream(model, PROMPTS, NEW, strategy))
    assert joined(pieces, 3) == (whole.tokens, whole.text)
    assert {piece.row for piece in pieces[:3]} == {0, 1, 2}  # a round at a time, not a row at a time
    assert [sum(piece.finish_reason == "length" for piece in pieces if piece.row == row) for row in range(3)] == [1] * 3
    assert all(piece.tokens for piece in pieces)
    # A piece of its own for every round, and some rounds accept several tokens.
    stats = lsjax.generate(model, PROMPTS, NEW, strategy).stats
    assert [sum(piece.row == row for piece in pieces) for row in range(3)] == [1 + row["rounds"] for row in stats]
    assert (max(len(piece.tokens) for piece in pieces) > 1) == (strategy is DRAFTING)


def test_one_prompt_streams_its_own_tokens(model, whole):
    for row in (0, 2):
        pieces = list(lsjax.stream(model, PROMPTS[row], NEW, DRAFTING))
        assert joined(pieces, 1) == ([whole.tokens[row]], [whole.text[row]])
    sampling = lsjax.Sampling(1.0)
    expected = lsjax.generate(model, ["über"], NEW, DRAFTING, sampling, 3)
    assert joined(list(lsjax.stream(model, "über", NEW, DRAFTING, sampling, 3)), 1) == (expected.tokens, expected.text)


def test_a_stream_may_be_left_and_two_may_alternate(model, whole):
    left, *both = (lsjax.stream(model, PROMPTS[row], NEW, DRAFTING) for row in (0, 0, 2))
    next(left)
    left.close()
    pieces = list(itertools.zip_longest(*both))
    for row, column in zip((0, 2), zip(*pieces, strict=True), strict=True):
        assert joined([piece for piece in column if piece], 1) == ([whole.tokens[row]], [whole.text[row]])


def test_characters_come_whole(model):
    """Takes every beginning of an encoding: the settled part is a prefix of the text, and whole characters do not
    wait.
    """
    text = "größe — 日本 😀 \ufffd x"
    ids = model.tokenizer.encode(text)[1:]
    assert len(ids) > len(text)
    for end in range(len(ids) + 1):
        settled = model.tokenizer.decode_settled(ids[:end])
        assert text.startswith(settled)
        raw = model.tokenizer.decode(ids[:end])
        assert len(settled) >= len(raw) - 1
    assert model.tokenizer.decode_settled(ids) == text


def test_characters_of_byte_tokens_come_whole():
    """SentencePiece decodes a run of byte tokens at once: one broken byte at its end turns all of them into signs."""
    import tokenizers
    from tokenizers import decoders, models

    letters = ["<unk>", "</s>", "▁", "a", "b"]
    vocabulary = {token: i for i, token in enumerate([*letters, *(f"<0x{byte:02X}>" for byte in range(256))])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.add_special_tokens(["</s>"])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    tokenizer = Tokenizer(backend, [1])
    rng = np.random.default_rng(0)
    alphabet = [1, 2, 3, 4, *(5 + byte for byte in "é€😀".encode())]
    waited = 0
    for _ in range(200):
        ids = rng.choice(alphabet, size=12).tolist()
        for start in (3, 6):
            ids[start : start + 3] = [5 + byte for byte in "€".encode()]
        settled = [tokenizer.decode_settled(ids[:end]) for end in range(13)]
        assert all(tokenizer.decode(ids).startswith(text) for text in settled)
        waited += settled[12] != tokenizer.decode(ids)
    assert 0 < waited < 200


def expected_end(model, tokens, stops):
    """Returns, by the definition, the first token with which the text holds a stop string, and the text before the
    string."""
    for end in range(1, len(tokens) + 1):
        text = model.tokenizer.decode(tokens[:end])
        starts = [text.index(stop) for stop in stops if stop in text]
        if starts:
            return tokens[:end], text[: min(starts)], "stop"
    return tokens, model.tokenizer.decode(tokens), "length"


@STRATEGIES
def test_a_stop_string_ends_its_row_wherever_it_stands(model, whole, strategy):
    """Takes strings of every text in turn: inside a token, over several, over rounds; alone, in pairs, and in no
    text.
    """
    texts = [text.replace("\ufffd", "|").split("|") for text in whole.text]
    parts = [part[at : at + size] for row in texts for part in row for size in (1, 2, 4, 7) for at in range(0, 24, 5)]
    parts = sorted({part for part in parts if part and "\ufffd" not in part})
    assert max(map(len, parts)) > 3
    cases = [[part] for part in parts[::3]] + [list(pair) for pair in zip(parts[::4], parts[2::4], strict=False)]
    cases.append(["nowhere", whole.text[0][-3:] + "and on"])
    # Two inside one token, the later one listed first.
    within = {model.tokenizer.decode([token]) for token in itertools.chain(*whole.tokens)}
    cases += [[text[-1], text[0]] for text in sorted(within) if len(text) > 1 and text[0] != text[-1]]
    ends = set()
    for stops in cases:
        expected = [expected_end(model, tokens, stops) for tokens in whole.tokens]
        found = lsjax.generate(model, PROMPTS, NEW, strategy, stop=stops)
        assert list(zip(found.tokens, found.text, (s["finish_reason"] for s in found.stats), strict=True)) == expected
        assert joined(list(lsjax.stream(model, PROMPTS, NEW, strategy, stop=stops)), 3) == (found.tokens, found.text)
        ends |= {(row, len(tokens)) for row, tokens in enumerate(found.tokens)}
        # The limit counts as a stop string at the same token should.
        row = min(range(3), key=lambda row: len(found.tokens[row]))
        limited = lsjax.generate(model, PROMPTS, len(found.tokens[row]), strategy).stats[row]
        assert [found.stats[row][key] for key in COUNTS] == [limited[key] for key in COUNTS]
    assert len(ends) > 15


def test_pieces_never_show_what_a_stop_string_takes_back(model, whole):
    """A stop string of many tokens waits as long as it may come, and its text is shown once it cannot."""
    text = whole.text[2]
    for start in range(0, len(text) - 12, 4):
        stop = text[start : start + 9] + "?"
        pieces = list(lsjax.stream(model, PROMPTS[2], NEW, DRAFTING, stop=["unseen", stop]))
        assert joined(pieces, 1)[1] == [text]
        shown = ""
        count = 0
        for piece in pieces[:-1]:
            shown, count = shown + piece.text, count + len(piece.tokens)
            settled = model.tokenizer.decode_settled(whole.tokens[2][:count])
            assert not any(settled.endswith(stop[:size]) and shown == settled for size in range(1, 10))


def test_more_stop_tokens_and_why_a_row_ended(model, whole):
    row = whole.tokens[1]
    for index in range(0, NEW, 5):
        stops = [row[index], 319]
        expected = [tokens[: next((i + 1 for i, t in enumerate(tokens) if t in stops), NEW)] for tokens in whole.tokens]
        found = lsjax.generate(model, PROMPTS, NEW, DRAFTING, stop_tokens=stops)
        assert found.tokens == expected
        assert [s["finish_reason"] for s in found.stats] == ["stop" if t[-1] in stops else "length" for t in expected]
        pieces = list(lsjax.stream(model, PROMPTS, NEW, DRAFTING, stop_tokens=stops))
        assert joined(pieces, 3) == (found.tokens, found.text)
        reasons = {piece.row: piece.finish_reason for piece in pieces}
        assert [reasons[row] for row in range(3)] == [s["finish_reason"] for s in found.stats]


def test_streams_and_stop_strings_compile_nothing_of_their_own(model):
    lsjax.generate(model, PROMPTS, NEW, DRAFTING)
    before = PROGRAM_CACHE.misses
    list(lsjax.stream(model, PROMPTS, 9, DRAFTING, stop=["a", "b"]))
    lsjax.generate(model, PROMPTS, NEW, DRAFTING, stop="c")
    assert PROGRAM_CACHE.misses == before


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"stop": ["x", ""]}, "stop must be non-empty texts, got ''"),
        ({"stop": [3]}, r"got 3 \(token ids go into stop_tokens\)"),
        ({"stop": 3}, r"got 3 \(token ids go into stop_tokens\)"),
        ({"stop_tokens": ["x"]}, "stop_tokens must be token ids"),
        ({"stop_tokens": 5}, "stop_tokens must be token ids"),
        ({"stop_tokens": [320]}, "stop_tokens holds 320, outside the vocabulary 0..319"),
        ({"prompts": []}, "at least one"),
        ({"prompts": 5}, "prompts must be a list of texts or token lists, got 5"),
        ({"strategy": lsjax.EarlyExit(9)}, "exit_layer 9 is out of range"),
    ],
)
def test_bad_input_is_named_before_the_first_piece(model, how, message):
    with pytest.raises(UserError, match=message):
        lsjax.stream(model, **({"prompts": PROMPTS, "max_new_tokens": 4} | how))


def replayed(params, config, prompt, tokens, exit_layer, drafts):
    """Replays rounds by the definition, drafting without a cache: (rounds, drafted, accepted and counted by
    position).
    """
    forward_jit = jax.jit(lambda params, tokens, mask: forward(params, tokens, config, mask))

    def draft(text):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(text)] = text
        mask = np.array([1.0] * exit_layer + [0.0] * (config.num_layers - exit_layer))
        return int(np.argmax(forward_jit(params, padded, mask)[0, len(text) - 1]))

    emitted, rounds, drafted, accepted, counted = 1, 0, 0, [0] * drafts, [0] * drafts
    while emitted < len(tokens):
        text = [*prompt, *tokens[:emitted]]
        for _ in range(drafts):
            text.append(draft(text))
        block = text[len(prompt) + emitted :]
        ahead = tokens[emitted : emitted + drafts]
        agreed = next((i for i in range(len(ahead)) if block[i] != ahead[i]), len(ahead))
        ends = agreed == len(ahead) < drafts or (agreed == drafts and emitted + drafts == len(tokens))
        rounds += 1
        for i in range(drafts):
            counts = not ends or i < len(ahead)
            counted[i] += counts
            drafted += counts
            accepted[i] += i < agreed
        emitted += min(agreed + 1, len(tokens) - emitted)
    return rounds, drafted, accepted, counted


def test_every_draft_is_counted_where_it_stood(model, whole):
    stats = lsjax.generate(model, PROMPTS, NEW, DRAFTING).stats
    total, possible = np.zeros(4), np.zeros(4)
    for prompt, tokens, row in zip(PROMPTS, whole.tokens, stats, strict=True):
        rounds, drafted, accepted, counted = replayed(model.params, model.config, prompt, tokens, 2, 4)
        assert (row["rounds"], row["drafted"], row["accepted"]) == (rounds, drafted, sum(accepted))
        assert row["accepted_by_position"] == accepted
        assert row["acceptance_by_position"] == [a / c for a, c in zip(accepted, counted, strict=True)]
        total, possible = total + accepted, possible + counted
    assert total[0] > total[3] > 0 or total[0] > total[1] > 0
    report = benchmark(model, PROMPTS, [DRAFTING], max_new_tokens=NEW, batch_size=3, repeats=1)
    np.testing.assert_allclose(report["runs"][1]["acceptance_by_position"], total / possible)


SPECIAL = 7  # the id of a special token of `word_tokenizer`


@pytest.fixture(scope="module")
def word_model(varied, varied_params):
    """Returns a model whose tokenizer drops the space before a text's first word, as those of Llama 1 and 2 do."""
    words = {f"\u2581w{i}" if i != SPECIAL else "<|im_end|>": i for i in range(varied.vocab_size)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="\u2581w0"))
    decoders = tokenizers.decoders
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([tokenizers.AddedToken("<|im_end|>", special=True)])
    return Model(varied, varied_params, Tokenizer(backend, stop=(319,)))


def test_a_continuation_keeps_the_space_before_its_first_word(word_model):
    """Prompt text and new text together are the text of all ids, in `text`, in `stream` and for a stop string."""
    backend = word_model.tokenizer.backend
    result = lsjax.generate(word_model, PROMPTS, NEW, DRAFTING)
    for row, prompt in enumerate(PROMPTS):
        assert backend.decode(prompt) + result.text[row] == backend.decode([*prompt, *result.tokens[row]])
        pieces = lsjax.stream(word_model, prompt, NEW, DRAFTING)
        assert "".join(piece.text for piece in pieces) == result.text[row]
    first = backend.decode(result.tokens[0][:1])
    stopped = lsjax.generate(word_model, PROMPTS[:1], NEW, DRAFTING, stop=f" {first}")
    assert (stopped.text, stopped.tokens) == ([""], [result.tokens[0][:1]])


def test_a_stop_string_that_is_a_special_token_stops_at_the_token(word_model):
    """Texts leave special tokens out, so the string itself would never match."""
    plain = lsjax.generate(word_model, [[SPECIAL + 1]], NEW).tokens[0]
    words = {f"\u2581w{i}" if i != plain[3] else "<|im_end|>": i for i in range(word_model.config.vocab_size)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="\u2581w1"))
    backend.add_special_tokens([tokenizers.AddedToken("<|im_end|>", special=True)])
    model = Model(word_model.config, word_model.params, Tokenizer(backend, stop=(319,)))
    result = lsjax.generate(model, [[SPECIAL + 1]], NEW, stop=["<|im_end|>", "never"])
    end = plain.index(plain[3]) + 1
    assert result.tokens[0] == plain[:end]
    assert result.stats[0]["finish_reason"] == "stop"
