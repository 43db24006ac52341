"""Odd tokenizers: fields of tokenizer.json and of the files beside it that do not belong there."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lsjax.data.tokenizer import Tokenizer
from lsjax.data.tokenizer_files import load_tokenizer
from tests.fuzz.harness import Case
from tests.helpers.recorded import RECORDED

_FOLDER = RECORDED / "smollm2"
_JSON, _SETTINGS, _GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
TEXT = "def main(): return 0 <|im_end|> </s> é 你"
Change = Callable[[dict], Any]


def tokenizer_cases() -> Iterator[Case]:
    """Returns all of them."""
    for name, change in HARMLESS.items():
        yield _case(f"tokenizer.json: {name}", _JSON, change, says_the_same)
    for name, change in OTHER.items():
        yield _case(f"tokenizer.json: {name}", _JSON, change, can_be_used)
    for name, change in REFUSED.items():
        yield _case(f"tokenizer.json: {name}", _JSON, change, None)
    for key in _NAMED:
        for number, value in enumerate(_NAMES_OF_NO_TOKEN):
            yield _case(f"tokenizer_config.json: {key} of no token {number}", _SETTINGS, _set(key, value), None)
    for key in ("additional_special_tokens", "extra_special_tokens"):
        for number, value in enumerate(_NO_LISTS):
            yield _case(f"tokenizer_config.json: {key} of no tokens {number}", _SETTINGS, _set(key, value), None)
        for number, value in enumerate((None, [], {}, ["<s>"], {"x": "<s>"}, [{"content": "<s>"}])):
            yield _case(f"tokenizer_config.json: {key} of tokens {number}", _SETTINGS, _set(key, value), says_the_same)
    for number, value in enumerate(_NO_DECODERS):
        change = _set("added_tokens_decoder", value)
        yield _case(f"tokenizer_config.json: added_tokens_decoder {number}", _SETTINGS, change, None)
    for number, ids in enumerate(([[2]], "2", 2.0, [], -1, 2**70, {}, False, [None], [True], 999)):
        yield _case(f"generation_config.json: eos_token_id {number}", _GENERATION, _set("eos_token_id", ids), None)
    for number, ids in enumerate(([2, 2], [2, 999], [2, -1], None)):
        change = _set("eos_token_id", ids)
        yield _case(f"generation_config.json: eos_token_id, good {number}", _GENERATION, change, can_be_used)
    yield Case("a pipe for tokenizer.json", lambda _, watch: _load(watch, _JSON, _pipe))
    yield Case("a device for a tokenizer", lambda *_: load_tokenizer(Path("/dev/zero")))


def _case(name: str, file: str, change: Change, check: Callable | None) -> Case:
    def edit(path: Path) -> None:
        tree = json.loads(path.read_text())
        change(tree)
        path.write_text(json.dumps(tree))

    return Case(name, lambda _, watch: use(_load(watch, file, edit)), check)


def _load(watch: Any, file: str, edit: Callable[[Path], Any]) -> Tokenizer:
    folder = watch.folder / "tokenizer"
    folder.mkdir()
    for name in (_JSON, _SETTINGS, _GENERATION):
        shutil.copy(_FOLDER / name, folder)
    edit(folder / file)
    watch.prepared()
    return load_tokenizer(folder)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def use(tokenizer: Tokenizer) -> tuple[list[int], str, list[int], tuple[int, ...]]:
    """Returns what a tokenizer makes of a text: its ids, their text, the same as a document, and what ends a text."""
    ids = tokenizer.encode(TEXT)
    half = len(ids) // 2
    assert tokenizer.decode(ids[:half]) + tokenizer.decode(ids[half:], ids[:half]) == tokenizer.decode(ids)
    (document,) = tokenizer.encode_documents([TEXT])
    assert [*ids, tokenizer.stop[0]] == document
    tokenizer.describe(5)
    return ids, tokenizer.decode(ids), tokenizer.encode(TEXT), tokenizer.stop


def says_the_same(_: Any, found: tuple) -> None:
    """Checks a change that means nothing for a text."""
    assert found == use(load_tokenizer(_FOLDER))


def can_be_used(_: Any, found: tuple) -> None:
    """Checks a tokenizer that differs: it says the same at each call, and ids that exist."""
    ids, _, again, stop = found
    assert ids == again
    assert all(type(index) is int and 0 <= index < 300 for index in (*ids, *stop))
    assert stop


def _set(key: str, value: Any) -> Change:
    return lambda tree: tree.__setitem__(key, value)


def _model(**values: Any) -> Change:
    return lambda tree: tree["model"].update(values)


def _token(index: int, content: str, **flags: Any) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": content} | plain | flags


def _add(*tokens: dict[str, Any]) -> Change:
    return lambda tree: tree["added_tokens"].extend(tokens)


def _template(*pieces: str, **ids: list[int]) -> Change:
    def piece(name: str) -> dict:
        return {"Sequence": {"id": "A", "type_id": 0}} if name == "A" else {"SpecialToken": {"id": name, "type_id": 0}}

    known = {name: {"id": name, "ids": found, "tokens": [name] * len(found)} for name, found in ids.items()}
    pair = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    single = [piece(name) for name in pieces]
    processor = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": known}
    return _set("post_processor", processor)


_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token")
_NAMES_OF_NO_TOKEN = (5, True, 1e300, ["<s>"], [{"content": "<s>"}], {"x": "<s>"}, {"content": 5}, {"content": None})
_NO_LISTS = ("abc def", "<s>", 5, True, [5], [None], [["<s>"]], {"content": 5}, [{"contents": "<s>"}])
_NO_DECODERS = (
    5, "x", [1], {"x": {"content": "zz"}}, {"-1": {"content": "zz"}}, {"270": "zz"}, {"270": {"content": ""}},
    {"270": {}}, {"270": {"content": 3}}, {"270": {"content": "zz", "lstrip": "yes"}}, {"271": {"content": "zz"}},
    {"7": {"content": "zz"}}, {"1e3": {"content": "zz"}},
)  # fmt: skip

_WORDS = {"type": "WordLevel", "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "<eot>": 3, "x": 4}, "unk_token": "[UNK]"}
_PIECES = {"type": "Unigram", "vocab": [["<unk>", 0.0], ["<s>", 0.0], ["</s>", 0.0], ["<eot>", 0.0]], "unk_id": None}
HARMLESS: dict[str, Change] = {
    "an unknown token that is unknown": _model(unk_token="nope"),
    "dropout of every merge": _model(dropout=1.0),
    "dropout of half of the merges": _model(dropout=0.5),
    "truncation": _set("truncation", {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}),
    "padding": _set("padding", {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None,
                                "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}),
    "added tokens in another order": lambda tree: tree["added_tokens"].reverse(),
    "an added token that nobody says": _add(_token(270, "qqq")),
    "no added tokens where others list them": _set("version", "1.0"),
    "a template that ends a text": _template("A", "</s>", **{"</s>": [2]}),
}  # fmt: skip
OTHER: dict[str, Change] = {
    "no decoder": _set("decoder", None),
    "no pre-tokenizer": _set("pre_tokenizer", None),
    "lower case": _set("normalizer", {"type": "Lowercase"}),
    "an added token of spaces": _add(_token(270, " ", lstrip=True, rstrip=True, special=False)),
    "an added token that is a word": _add(_token(270, "return", single_word=True, special=False)),
    "merges ignored": _model(ignore_merges=True),
    "a start by Bert": _set("post_processor", {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]}),
} | {
    f"Metaspace, {scheme}": _set(
        "pre_tokenizer", {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}
    )
    for scheme, split in (("first", True), ("always", True), ("never", True), ("always", False))
}  # fmt: skip
REFUSED: dict[str, Change] = {
    "words without an unknown one": _set("model", _WORDS),
    "pieces without an unknown one": _set("model", _PIECES),
    "pieces whose unknown one is none": _set("model", _PIECES | {"unk_id": 9}),
    "two tokens of one id": lambda tree: tree["model"]["vocab"].__setitem__("zzz", 7),
    "a negative id": lambda tree: tree["model"]["vocab"].__setitem__("zzz", -1),
    "an added token with the id of another": _add(_token(1, "qqq")),
    "an added token beyond a gap": _add(_token(500, "qqq")),
    "an added token without an id": lambda tree: tree["added_tokens"][0].pop("id"),
    "added tokens that are texts": _set("added_tokens", ["<s>"]),
    "a template of a token that is none": _template("<q>", "A"),
    "a template of an id that is none": _template("<q>", "A", **{"<q>": [99999]}),
    "a template that opens with two tokens": _template("<q>", "A", **{"<q>": [1, 3]}),
    "a broken charsmap": _set("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "an unknown normalizer": _set("normalizer", {"type": "Foo"}),
    "an unknown prepend scheme": _set(
        "pre_tokenizer", {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "sometimes", "split": True}
    ),
    "a broken pattern": _set("decoder", {"type": "Replace", "pattern": {"Regex": "(("}, "content": "x"}),
    "a merge of three": lambda tree: tree["model"]["merges"].append(["a", "b", "c"]),
    "a merge of unknown tokens": lambda tree: tree["model"]["merges"].append(["qq", "b"]),
    "merges in one text": _model(merges="a b"),
    "a prefix of subwords": _model(continuing_subword_prefix="##"),
    "an unknown version": _set("version", "9.9"),
    "an unknown key": _set("foo", 1),
    "no model": lambda tree: tree.pop("model"),
}  # fmt: skip
