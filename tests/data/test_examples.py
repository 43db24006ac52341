"""Checks which tokens of an example are learned, token by token, and that examples are packed whole."""

import dataclasses
import json

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from lsjax.config import DataConfig
from lsjax.data.examples import Example, encode_chat, encode_completions
from lsjax.data.packers import WholePacker
from lsjax.data.pipeline import unpack
from lsjax.data.prepare import prepare
from lsjax.data.tokenizer import Tokenizer, train_tokenizer
from lsjax.errors import UserError


@pytest.fixture
def tokenizer() -> Tokenizer:
    """Returns a tokenizer in which every character of ASCII is a token."""
    return train_tokenizer([], 258)


def spell(tokenizer: Tokenizer, example: Example) -> tuple[str, str]:
    """Returns the tokens as text, and the learned ones with a dot for each of the others."""
    texts = [tokenizer.backend.id_to_token(int(index)) for index in example.tokens]
    texts = [text.replace("Ġ", " ").replace("Ċ", "\n") for text in texts]
    dots = [text if learned else "." for text, learned in zip(texts, example.learned, strict=True)]
    return "".join(texts), "".join(dots)


def test_a_completion_and_its_end_are_learned(tokenizer):
    rows = [
        {"prompt": "say ab:", "completion": " ab"},
        {"prompt": "", "completion": "c"},
        {"prompt": "d", "completion": ""},
    ]
    assert [spell(tokenizer, example) for example in encode_completions(rows, tokenizer)] == [
        ("<|begin_of_text|>say ab: ab<|end_of_text|>", "........ ab<|end_of_text|>"),
        ("<|begin_of_text|>c<|end_of_text|>", ".c<|end_of_text|>"),
        ("<|begin_of_text|>d<|end_of_text|>", "..<|end_of_text|>"),
    ]


def test_the_prompt_has_the_tokens_of_decoding_even_where_a_token_would_join_both():
    tokenizer = train_tokenizer(["the cat the cat the cat"] * 9, 300)
    assert len(tokenizer.encode("the cat")) == 3  # begin, "the", " cat"
    (example,) = encode_completions([{"prompt": "the c", "completion": "at"}], tokenizer)
    prompt = tokenizer.encode("the c")
    assert example.tokens[: len(prompt)].tolist() == prompt
    assert tokenizer.decode(example.tokens[len(prompt) :].tolist()) == "at"
    assert example.learned.tolist() == [False] * len(prompt) + [True] * (len(example.tokens) - len(prompt))


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}[A]"
    "{% generation %}{{ message.content | trim }}{{ eos_token }}{% endgeneration %}"
    "{% else %}[{{ message.role | upper }}]{{ message.content }}{% endif %}{% endfor %}"
)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes\nsir"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Ciao "},
]


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    tokenizer.backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    settings = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "chat_template": template}
    return Tokenizer(tokenizer.backend, tokenizer.stop, settings)


def test_the_turns_of_a_plain_template_are_learned_with_their_ends(tokenizer):
    example = encode_chat({"messages": MESSAGES}, with_template(tokenizer, CHATML), "")
    text, learned = spell(tokenizer, example)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nYes\nsir<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nCiao <|im_end|>\n"
    )
    before = 1 + len("system\nBe brief.") + 2 + 1 + len("user\nHi") + 2 + 1 + len("assistant\n")
    between = 1 + 1 + len("user\nBye") + 2 + 1 + len("assistant\n")
    assert learned == "." * before + "Yes\nsir<|im_end|>" + "." * between + "Ciao <|im_end|>" + "."


def test_the_turns_that_a_template_marks_are_learned(tokenizer):
    example = encode_chat({"messages": MESSAGES}, with_template(tokenizer, MARKED), "")
    text, learned = spell(tokenizer, example)
    assert text == (
        "<|begin_of_text|>[SYSTEM]Be brief.[USER]Hi[A]Yes\nsir<|end_of_text|>[USER]Bye[A]Ciao<|end_of_text|>"
    )
    before = 1 + len("[SYSTEM]Be brief.[USER]Hi[A]")
    between = len("[USER]Bye[A]")
    assert learned == "." * before + "Yes\nsir<|end_of_text|>" + "." * between + "Ciao<|end_of_text|>"


def test_a_conversation_has_the_tokens_of_decoding(tokenizer):
    chat = with_template(tokenizer, CHATML)
    example = encode_chat({"messages": MESSAGES}, chat, "")
    prompt = chat.encode_chat(MESSAGES[:4])
    assert example.tokens[: len(prompt)].tolist() == prompt
    assert not example.learned[len(prompt) - 1]
    assert example.learned[len(prompt)]


def test_a_template_that_changes_earlier_turns_is_refused(tokenizer):
    forgetful = "{% for m in messages %}{{ m.content if loop.last else '-' }}{% endfor %}"
    with pytest.raises(UserError, match=r"rows\.jsonl:7: .*mark them with \{% generation %\}"):
        encode_chat({"messages": MESSAGES}, with_template(tokenizer, forgetful), "rows.jsonl:7")


def example_of(length: int, owner: int) -> Example:
    return Example(np.full(length, owner, np.int32), np.arange(length) >= length // 2)


def test_examples_are_packed_whole_and_only_long_ones_are_cut():
    lengths = np.random.default_rng(0).integers(2, 9, 600).tolist()
    lengths[100], lengths[200] = 9, 24  # a whole window; three windows and a rest
    packer = WholePacker(8)
    windows = [w for i, n in enumerate(lengths) for w in packer.add(example_of(n, i + 1))] + list(packer.finish())
    assert packer.cut == 1
    assert packer.sequences == len(windows)
    found: dict[int, int] = {}
    padding = 0
    for tokens, owners, learned in windows:
        assert len(tokens) == 9
        padding += np.sum(owners == -1)
        for owner in set(owners.tolist()) - {-1}:
            at = np.flatnonzero(owners == owner)
            assert (np.diff(at) == 1).all()
            assert (tokens[at] == owner + 1).all()
            if owner != 200:
                assert owner not in found, "an example is in two windows"
                assert learned[at].tolist() == (np.arange(len(at)) >= lengths[owner] // 2).tolist()
            found[owner] = found.get(owner, 0) + len(at)
    assert padding == packer.padding
    assert padding / (9 * len(windows)) < 0.1
    assert found.pop(200) == 24 + 2  # one token of overlap at each cut
    assert found == {i: n for i, n in enumerate(lengths) if i != 200}


def test_what_is_not_learned_has_no_weight():
    tokens = np.array([1, 2, 3, 4, 5, 6, 0], np.int32)
    owners = np.array([0, 0, 0, 1, 1, 1, -1], np.int32)
    learned = np.array([0, 0, 1, 1, 0, 1, 0], np.int32)
    batch = unpack(np.stack([tokens, owners, learned]).tobytes(), 6)
    # Token 4 begins an example: nothing before it predicts it, although it is marked.
    assert batch.weights.tolist() == [0, 1, 0, 0, 1, 0]
    assert batch.segment_ids.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.fixture
def completions(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"number {i}: ", "completion": "one " * (i % 7), "more": i} for i in range(300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_corpus_of_completions_is_prepared(completions, tiny_run, tmp_path):
    data = DataConfig(corpus=str(completions), format="completion", held_out_fraction=0.1)
    notes = []
    tokenizer, manifest = prepare(dataclasses.replace(tiny_run, data=data), tmp_path / "data", notes.append)
    counts = manifest["splits"]["train"]
    assert counts["documents"] + manifest["splits"]["held_out"]["documents"] == 300
    assert any(note.startswith("train: ") and "% padding" in note for note in notes)
    reader = ArrayRecordReader(str(tmp_path / "data" / next(iter(manifest["files"]["train"]))))
    batches = [unpack(record, 32) for record in reader.read_all()]
    ends = sum(int(np.sum(batch.weights[batch.targets == tokenizer.stop[0]])) for batch in batches)
    assert ends == counts["documents"]
    said = {tokenizer.decode(batch.targets[batch.weights == 1].tolist()).replace("one ", "") for batch in batches}
    assert said == {""}


@pytest.mark.parametrize(
    ("layout", "row", "message"),
    [
        ("completion", {"prompt": "a"}, r':2: want a JSON object with "completion", got the keys'),
        ("completion", {"prompt": "a", "completion": 5}, r':2: "prompt" and "completion" must be strings'),
        ("chat", {"text": "a"}, r':2: want a JSON object with "messages"'),
        ("chat", {"messages": [{"role": "user", "content": "a"}]}, r':2: "messages" must be a list .*"assistant"'),
        ("chat", {"messages": ["a"]}, r':2: "messages" must be a list'),
    ],
)
def test_bad_examples_are_named(layout, row, message, tiny_run, tmp_path):
    good = {"prompt": "a", "completion": "b", "messages": MESSAGES}
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n")
    data = DataConfig(corpus=str(path), format=layout)
    with pytest.raises(UserError, match=rf"rows\.jsonl{message}"):
        prepare(dataclasses.replace(tiny_run, data=data), tmp_path / "data", lambda _: None)
