"""Rebuilds the tokenizer inside a GGUF file with the `tokenizers` library."""

import math
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from lsjax.data.tokenizer import Tokenizer, begin_with, building
from lsjax.errors import UserError, shown

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # token types of llama.cpp
# llama.cpp knows the tokens that end a turn by their texts, because many files lack the fields that name them.
TURN_ENDS = {"<|eot_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "<end_of_turn>"}
TURN_ENDS |= {"<end_of_utterance>", "<｜end▁of▁sentence｜>", "_<EOT>"}
_TURN_ENDS_IF_CONTROL = {"</s>", "<eos>", "<EOT>", "[EOT]", "[EOS]"}  # texts that a plain piece may have, too
_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


def _split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """Returns a pre-tokenizer that isolates what each pattern matches, one pattern after the other."""
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# How a byte-level tokenizer splits text before it merges, by the name in tokenizer.ggml.pre.
PRE_TOKENIZERS = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTE_LEVEL]),
    "llama-bpe": _split(_LLAMA3_WORDS),
    "smaug-bpe": _split(_LLAMA3_WORDS),
    "default": _split(r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]"),
}
# Rules with which a word that is one token is not built from merges.
IGNORE_MERGES = ("llama-bpe",)
# The other names that llama.cpp gives to these rules.
_LLAMA3_NAMES = ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano")
_GPT2_NAMES = ("phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0", "mellum")
_GPT2_NAMES += ("modern-bert", "exaone4")
_ALIASES = dict.fromkeys(_LLAMA3_NAMES, "llama-bpe") | dict.fromkeys(_GPT2_NAMES, "gpt-2")
# What llama.cpp takes a SentencePiece vocabulary to have where the file does not say.
_LISTS = {"tokens": (str, "texts"), "token_type": (int, "whole numbers"), "merges": (str, "texts"),
          "scores": (float, "numbers")}  # fmt: skip
_PER_TOKEN = ("token_type", "scores")
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}


def gguf_tokenizer(fields: dict[str, Any], where: str) -> Tokenizer:
    """Builds a tokenizer from the `tokenizer.*` fields.

    Where a field is missing, llama.cpp's default holds. Raises UserError for an unknown kind of tokenizer, and for
    a vocabulary that holds a text twice.
    """
    kind = fields.get("tokenizer.ggml.model")
    for key in ("tokens", "token_type", "scores" if kind == "llama" else "eos_token_id"):
        if f"tokenizer.ggml.{key}" not in fields:
            raise UserError(f"{where} has no field tokenizer.ggml.{key}")
    _check_fields(fields, where)
    if kind == "gpt2" and "tokenizer.ggml.merges" not in fields and _needs_merges(fields):
        raise UserError(f"{where} has no field tokenizer.ggml.merges")
    with building(f"{where}: its tokenizer cannot be rebuilt"):
        return _rebuild(fields, kind, where)


def _check_fields(fields: dict[str, Any], where: str) -> None:
    """Raises UserError that names the first `tokenizer.*` field of another type or length than llama.cpp writes."""
    count = len(fields["tokenizer.ggml.tokens"]) if isinstance(fields["tokenizer.ggml.tokens"], list) else 0
    for key, (kind, what) in _LISTS.items():
        values = fields.get(f"tokenizer.ggml.{key}", [])
        if not isinstance(values, list) or any(type(value) is not kind for value in values):
            raise UserError(f"{where}: tokenizer.ggml.{key} must be a list of {what}, got {shown(values)}")
        if key in _PER_TOKEN and values and len(values) != count:
            raise UserError(f"{where}: tokenizer.ggml.{key} has {len(values)} entries for {count} tokens")
    if not all(math.isfinite(score) for score in fields.get("tokenizer.ggml.scores", [])):
        raise UserError(f"{where}: tokenizer.ggml.scores holds NaN or infinity")
    for key, value in fields.items():
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id") and type(value) is not int:
            raise UserError(f"{where}: {key} must be a token id, got {shown(value)}")
    for key in ("add_bos_token", "add_space_prefix"):
        if type(value := fields.get(f"tokenizer.ggml.{key}", True)) is not bool:
            raise UserError(f"{where}: tokenizer.ggml.{key} must be true or false, got {shown(value)}")


def _needs_merges(fields: dict[str, Any]) -> bool:
    """Returns whether a byte-level vocabulary has tokens of several bytes. Writers of GGUF leave empty lists out."""
    entries = zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True)
    return any(len(text) > 1 for text, type_ in entries if _token_type(text, type_) == _NORMAL)


def _rebuild(fields: dict[str, Any], kind: str | None, where: str) -> Tokenizer:
    tokens = [text or f"[EMPTY_{index}]" for index, text in enumerate(fields["tokenizer.ggml.tokens"])]
    types = [_token_type(*entry) for entry in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)]
    ids = _ids(tokens, where)
    name = fields.get("tokenizer.ggml.pre")
    pre = None if name is None else _ALIASES.get(name, name)
    if kind == "gpt2":
        backend = _byte_level(fields, ids, pre, where)
    elif kind == "llama":
        backend = _sentencepiece(fields, tokens, types, ids)
    else:
        raise UserError(f"{where}: tokenizer.ggml.model is {kind!r}; lsjax knows gpt2 (byte-level BPE) and llama")
    backend.add_special_tokens(
        [
            AddedToken(text, special=True, normalized=False)
            for text, type_ in zip(tokens, types, strict=True)
            if type_ in (_CONTROL, _UNKNOWN)
        ]
    )
    defined = [text for text, type_ in zip(tokens, types, strict=True) if type_ == _USER_DEFINED]
    backend.add_tokens([AddedToken(text, normalized=False) for text in defined])
    begin = _token_id(fields, "bos", tokens)
    # llama.cpp's default where the file does not have the field.
    usual = kind == "llama" or pre == "llama-bpe"
    if begin is not None and fields.get("tokenizer.ggml.add_bos_token", usual):
        begin_with(backend, tokens[begin])
    return Tokenizer(backend, _stop_ids(fields, tokens, types, where), _settings(fields, tokens))


def _token_type(text: str, type_: int) -> int:
    """Returns the type of a token. llama.cpp corrects the type of those that end a turn."""
    return _CONTROL if text in TURN_ENDS else type_


def _ids(tokens: list[str], where: str) -> dict[str, int]:
    ids: dict[str, int] = {}
    for index, text in enumerate(tokens):
        first = ids.setdefault(text, index)
        if first != index:
            raise UserError(
                f"{where}: tokenizer.ggml.tokens holds {text!r} twice, with the ids {first} and {index}; "
                "convert the model again with a tokenizer whose texts differ"
            )
    return ids


def _stop_ids(fields: dict[str, Any], tokens: list[str], types: list[int], where: str) -> tuple[int, ...]:
    """Returns the ids of end of text, end of turn and end of message: those that fields name, then those by text."""
    named = [_token_id(fields, name, tokens) for name in ("eos", "eot", "eom")]
    if named[0] is None:
        raise UserError(f"{where}: tokenizer.ggml.eos_token_id is not one of its {len(tokens)} tokens")
    ends = TURN_ENDS | _TURN_ENDS_IF_CONTROL
    by_text = [i for i, text in enumerate(tokens) if types[i] == _CONTROL and text in ends]
    return tuple(dict.fromkeys(index for index in [*named, *by_text] if index is not None))


def _byte_level(fields: dict[str, Any], ids: dict[str, int], pre: Any, where: str) -> tokenizers.Tokenizer:
    if pre not in PRE_TOKENIZERS:
        raise UserError(
            f"{where}: tokenizer.ggml.pre is {pre!r}; lsjax knows {', '.join([*PRE_TOKENIZERS, *_ALIASES])}. Set it "
            "with the gguf package: gguf-new-metadata --pre-tokenizer NAME OLD.gguf NEW.gguf"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("tokenizer.ggml.merges", [])]
    backend = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=pre in IGNORE_MERGES))
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(
    fields: dict[str, Any], tokens: list[str], types: list[int], ids: dict[str, int]
) -> tokenizers.Tokenizer:
    """Builds SentencePiece BPE with byte fallback, as in Llama 1 and 2: pieces have scores instead of merges."""
    scores = dict(zip(tokens, fields["tokenizer.ggml.scores"], strict=True))
    # As in SentencePiece, control, unknown and byte pieces are never the result or a part of a merge.
    pieces = {text: scores[text] for text, type_ in zip(tokens, types, strict=True) if type_ == _NORMAL}
    unknown = _token_id(fields, "unknown", tokens)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges_from_scores(pieces, ids),
            unk_token=tokens[unknown or 0],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prepend = [normalizers.Prepend("▁")] if fields.get("tokenizer.ggml.add_space_prefix", True) else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prepend else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _merges_from_scores(pieces: dict[str, float], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Returns every pair of pieces that forms a third, best score first: the order in which SentencePiece merges."""
    found = []
    for text, score in pieces.items():
        halves = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        found += [(-score, ids[a], ids[b], a, b) for a, b in halves if a in pieces and b in pieces]
    return [(a, b) for *_, a, b in sorted(found)]


def _token_id(fields: dict[str, Any], name: str, tokens: list[str]) -> int | None:
    """Returns a special token's id, or None. llama.cpp writes 2^32 - 1 for a token that does not exist."""
    usual = _SENTENCEPIECE_IDS.get(name) if fields.get("tokenizer.ggml.model") == "llama" else None
    for index in (fields.get(f"tokenizer.ggml.{name}_token_id"), usual):
        if index is not None and 0 <= index < len(tokens):
            return index
    return None


def _settings(fields: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    """Returns what tokenizer_config.json would contain."""
    settings = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = _token_id(fields, key, tokens)
        if index is not None:
            settings[f"{name}_token"] = tokens[index]
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    return settings
