"""The tokenizer inside a GGUF file, rebuilt with the `tokenizers` library."""

from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from lsjax.data.tokenizer import Tokenizer, begin_with, building
from lsjax.errors import UserError

_CONTROL, _USER_DEFINED = 3, 4  # token types of llama.cpp
_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a byte-level tokenizer cuts text before merging, by the name in tokenizer.ggml.pre.
_PRE_TOKENIZERS = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTE_LEVEL]),
    "llama-bpe": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


def gguf_tokenizer(fields: dict[str, Any], where: str) -> Tokenizer:
    """From the values of the `tokenizer.*` fields. Raises UserError on a kind of tokenizer that is not known."""
    kind = fields.get("tokenizer.ggml.model")
    for key in ("tokens", "token_type", "eos_token_id"):
        if f"tokenizer.ggml.{key}" not in fields:
            raise UserError(f"{where} has no field tokenizer.ggml.{key}")
    with building(f"{where}: its tokenizer cannot be rebuilt"):
        return _rebuild(fields, kind, where)


def _rebuild(fields: dict[str, Any], kind: str, where: str) -> Tokenizer:
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    ids = {token: index for index, token in enumerate(tokens)}
    if kind == "gpt2":
        backend = _byte_level(fields, ids, where)
    elif kind == "llama":
        backend = _sentencepiece(fields, tokens, ids, where)
    else:
        raise UserError(f"{where}: tokenizer.ggml.model is {kind!r}; lsjax knows gpt2 (byte-level BPE) and llama")
    special = [
        AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, types, strict=True) if k == _CONTROL
    ]
    defined = [AddedToken(t, normalized=False) for t, k in zip(tokens, types, strict=True) if k == _USER_DEFINED]
    backend.add_special_tokens(special)
    backend.add_tokens(defined)
    begin = _token_id(fields, "bos", tokens)
    # llama.cpp's defaults where the file does not say.
    usual = kind == "llama" or fields.get("tokenizer.ggml.pre") == "llama-bpe"
    if begin is not None and fields.get("tokenizer.ggml.add_bos_token", usual):
        begin_with(backend, tokens[begin])
    # End of text, and where the file has them end of turn and end of message.
    stop = [_token_id(fields, name, tokens) for name in ("eos", "eot", "eom")]
    if stop[0] is None:
        raise UserError(f"{where}: tokenizer.ggml.eos_token_id is not one of its {len(tokens)} tokens")
    stop = tuple(dict.fromkeys(index for index in stop if index is not None))
    return Tokenizer(backend, stop, _settings(fields, tokens))


def _byte_level(fields: dict[str, Any], ids: dict[str, int], where: str) -> tokenizers.Tokenizer:
    name = fields.get("tokenizer.ggml.pre")
    if name not in _PRE_TOKENIZERS:
        raise UserError(f"{where}: tokenizer.ggml.pre is {name!r}; lsjax knows {', '.join(_PRE_TOKENIZERS)}")
    merges = [tuple(merge.split(" ", 1)) for merge in fields.get("tokenizer.ggml.merges", [])]
    backend = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=name == "llama-bpe"))
    backend.pre_tokenizer = _PRE_TOKENIZERS[name]
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(fields: dict[str, Any], tokens: list[str], ids: dict[str, int], where: str) -> tokenizers.Tokenizer:
    """SentencePiece BPE with byte fallback, as Llama 1 and 2 have it: pieces with scores instead of merges."""
    if "tokenizer.ggml.scores" not in fields:
        raise UserError(f"{where} has no field tokenizer.ggml.scores")
    merges = _merges_from_scores(tokens, fields["tokenizer.ggml.scores"], ids)
    unknown = tokens[_token_id(fields, "unknown", tokens) or 0]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prepend = [normalizers.Prepend("▁")] if fields.get("tokenizer.ggml.add_space_prefix", True) else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prepend else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _merges_from_scores(tokens: list[str], scores: list[float], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, best score first: the order SentencePiece merges in."""
    found = []
    for token, score in zip(tokens, scores, strict=True):
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        found += [(-score, ids[a], ids[b], a, b) for a, b in halves if a in ids and b in ids]
    return [(a, b) for *_, a, b in sorted(found)]


def _token_id(fields: dict[str, Any], name: str, tokens: list[str]) -> int | None:
    """llama.cpp writes 2^32 - 1 for a token that there is not."""
    index = fields.get(f"tokenizer.ggml.{name}_token_id")
    return index if index is not None and 0 <= index < len(tokens) else None


def _settings(fields: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    """What tokenizer_config.json would say."""
    settings = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = _token_id(fields, key, tokens)
        if index is not None:
            settings[f"{name}_token"] = tokens[index]
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    return settings
