"""The tokenizer inside a GGUF file, rebuilt with the `tokenizers` library."""

from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from lsjax.data.tokenizer import Tokenizer, begin_with
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
    begin = fields.get("tokenizer.ggml.bos_token_id")
    # llama.cpp's defaults where the file does not say.
    if begin is not None and fields.get("tokenizer.ggml.add_bos_token", kind == "llama"):
        begin_with(backend, tokens[begin])
    return Tokenizer(backend, _stop_ids(fields), _settings(fields, tokens))


def _byte_level(fields: dict[str, Any], ids: dict[str, int], where: str) -> tokenizers.Tokenizer:
    name = fields.get("tokenizer.ggml.pre", "gpt-2")
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
    unknown = tokens[fields.get("tokenizer.ggml.unknown_token_id", 0)]
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


def _stop_ids(fields: dict[str, Any]) -> tuple[int, ...]:
    """End of text, and where the file has them end of turn and end of message."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = (fields.get(f"tokenizer.ggml.{key}") for key in keys)
    return tuple(dict.fromkeys(index for index in ids if index is not None))


def _settings(fields: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    """What tokenizer_config.json would say."""
    settings = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = fields.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and index < len(tokens):
            settings[f"{name}_token"] = tokens[index]
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    return settings
