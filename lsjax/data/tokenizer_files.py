"""Loads a tokenizer from the files that Hugging Face keeps beside a model.

tokenizer.json holds the vocabulary and the rules, but not everything: special tokens, added tokens, the chat template
and the ids that end a text may stand only in tokenizer_config.json, special_tokens_map.json, added_tokens.json,
chat_template.jinja, generation_config.json or config.json. Where these disagree, lsjax follows transformers.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from lsjax.data.tokenizer import (
    END,
    GENERATION,
    SETTINGS,
    TOKENIZER,
    Tokenizer,
    begin_with,
    building,
    panics_silenced,
    token_text,
)
from lsjax.errors import UserError, shown
from lsjax.files import check_not_pointer, path_of, read_json

_SPECIAL_TOKENS, _ADDED_TOKENS, _TEMPLATE = "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"
FILES = (TOKENIZER, SETTINGS, _SPECIAL_TOKENS, _ADDED_TOKENS, _TEMPLATE, GENERATION)  # beside config.json
OTHER_FORMATS = ("tokenizer.model", "vocab.json")
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# transformers gives these classes default tokens, and lets their add_bos_token override tokenizer.json.
_LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")
_LLAMA_DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def load_tokenizer(path: Path) -> Tokenizer:
    """Loads the tokenizer of a folder, or a tokenizer.json with the files beside it.

    Raises UserError when it cannot be read, or when no file says which token ends a text.
    """
    path = path_of(path, "the tokenizer")
    try:
        path = path / TOKENIZER if path.is_dir() else path
    except OSError as error:  # such as a name of more than 255 bytes
        raise UserError(f"no tokenizer at {path}: {error.strerror}") from None
    folder = path.parent
    backend = _read_tokenizer_json(path)
    settings = _read_settings(folder, backend)
    end_ids = _listed_end_ids(folder)
    with building(f"{folder}: the special tokens beside {TOKENIZER} cannot be added"):
        _add_tokens(backend, settings, end_ids[1] if end_ids else [], folder)
        _obey_add_bos(backend, settings)
    stop = _stop_ids(path, backend, settings, end_ids)
    with building(str(path)), panics_silenced():
        return Tokenizer(backend, stop, settings)


def _read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    try:
        check_not_pointer(path)
        text = path.read_text(encoding="utf-8")
        tree = json.loads(text)
    except FileNotFoundError:
        raise UserError(f"no tokenizer at {path}{_how_to_make_it(path.parent)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a tokenizer.json: {error}") from None
    with building(f"{path} is not a tokenizer.json"), panics_silenced():
        added = tree.get("added_tokens") or []
        ordered = sorted(added, key=lambda token: token["id"])
        # The library numbers added tokens in the order in which they stand, whatever ids the file gives them.
        backend = tokenizers.Tokenizer.from_str(
            text if ordered == added else json.dumps(tree | {"added_tokens": ordered})
        )
    _check_ids(backend, ordered, path)
    return backend


def _check_ids(backend: tokenizers.Tokenizer, added: list[dict[str, Any]], path: Path) -> None:
    """Raises UserError when two tokens share an id, or an added token has another id than the file gives it."""
    for token in added:
        if backend.token_to_id(token["content"]) not in (token["id"], None):
            raise UserError(
                f"{path} gives the added token {token['content']!r} the id {token['id']}, but its vocabulary leaves it "
                f"{backend.token_to_id(token['content'])}"
            )
    owners: dict[int, str] = {}
    for text, index in backend.get_vocab().items():
        if owners.setdefault(index, text) != text:
            raise UserError(f"{path} gives two tokens, {owners[index]!r} and {text!r}, the id {index}")


def _how_to_make_it(folder: Path) -> str:
    for name in OTHER_FORMATS:
        if (folder / name).is_file():
            return (
                f", only {name}: make tokenizer.json with transformers' "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
    return ""


def _read_settings(folder: Path, backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """Returns tokenizer_config.json, completed by what other files and the tokenizer's class say."""
    settings = _optional_json(folder / SETTINGS)
    named = _optional_json(folder / _SPECIAL_TOKENS)
    # In transformers, special_tokens_map.json wins where tokenizer_config.json has no added_tokens_decoder.
    settings = named | settings if "added_tokens_decoder" in settings else settings | named
    if settings.get("tokenizer_class") in (None, *_LLAMA_CLASSES):
        usual = {key: token for key, token in _LLAMA_DEFAULTS.items() if backend.token_to_id(token) is not None}
        settings = usual | settings
    template = folder / _TEMPLATE
    if template.is_file():
        try:
            settings["chat_template"] = template.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {template}: {error}") from None
    return settings


def _add_tokens(backend: tokenizers.Tokenizer, settings: dict[str, Any], end_ids: list[Any], folder: Path) -> None:
    """Adds the tokens that the other files list or name and tokenizer.json lacks among its added tokens."""
    named = _named_special_tokens(settings, folder)
    listed = settings.get("added_tokens_decoder")
    if listed is not None:
        tokens = {int(index): _added_token(entry) for index, entry in listed.items()}
    else:
        found = _optional_json(folder / _ADDED_TOKENS)
        # Ids that end a text are special even if nothing names them: their texts are not part of an answer.
        special = {text: text in named or index in end_ids for text, index in found.items()}
        tokens = {i: AddedToken(t, special=special[t], normalized=not special[t]) for t, i in found.items()}
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for index, token in sorted(tokens.items()):
        if token.content not in known:
            backend.add_tokens([token])
            if backend.token_to_id(token.content) != index:
                raise UserError(
                    f"{folder}: {SETTINGS} or {_ADDED_TOKENS} gives the token {token.content!r} the id {index!r}, "
                    f"but {TOKENIZER} leaves it {backend.token_to_id(token.content)}"
                )
            known.add(token.content)
    texts = [text for text in named if text not in known]
    backend.add_special_tokens([text for text in texts if backend.token_to_id(text) is not None])


def _named_special_tokens(settings: dict[str, Any], folder: Path) -> list[str]:
    """Returns the texts of the special tokens that the settings name. Raises UserError for a name that is no token."""
    named: dict[str, list[Any]] = {name: [settings[name]] for name in _NAMES if settings.get(name)}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(key) or []
        if not isinstance(more, dict | list):
            raise UserError(f"{folder}: {key} of {SETTINGS} must be a list of tokens, got {shown(more)}")
        named[key] = list(more.values() if isinstance(more, dict) else more)
    for key, values in named.items():
        for value in values:
            if not isinstance(token_text(value), str):
                raise UserError(f"{folder}: {key} of {SETTINGS} must be a token, got {shown(value)}")
    return [token_text(value) for values in named.values() for value in values]


def _added_token(entry: Any) -> AddedToken:
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not entry["content"]:
        raise ValueError(f"{entry!r} is no added token")
    flags = {key: entry[key] for key in ("lstrip", "rstrip", "normalized", "single_word", "special") if key in entry}
    return AddedToken(entry["content"], **flags)


def _obey_add_bos(backend: tokenizers.Tokenizer, settings: dict[str, Any]) -> None:
    """Lets add_bos_token decide whether a text opens with bos_token, for the classes for which transformers does."""
    add, bos = settings.get("add_bos_token"), token_text(settings.get("bos_token"))
    if settings.get("tokenizer_class") not in _LLAMA_CLASSES or not isinstance(add, bool):
        return
    if not add:
        backend.post_processor = None
    elif isinstance(bos, str) and backend.token_to_id(bos) is not None:
        begin_with(backend, bos)


def _listed_end_ids(folder: Path) -> tuple[Path, list[Any]] | None:
    """Returns eos_token_id of generation_config.json, else of config.json, with the file that holds it."""
    for path in (folder / GENERATION, folder / "config.json"):
        ids = _optional_json(path).get("eos_token_id")
        if ids is not None:
            return path, ids if isinstance(ids, list) else [ids]
    return None


def _stop_ids(
    path: Path, backend: tokenizers.Tokenizer, settings: dict[str, Any], end_ids: tuple[Path, list[Any]] | None
) -> tuple[int, ...]:
    """Returns the ids that end a text: the listed ones, else the eos_token of the settings, else our own END."""
    if end_ids is not None:
        source, ids = end_ids
        # bool is a subclass of int, and true is no id.
        if any(type(index) is not int for index in ids):
            raise UserError(f"{source}: eos_token_id must be an id or a list of ids, got {ids}")
        # A model cannot say an id without a token; such ids are left over from other models.
        found = tuple(index for index in ids if 0 <= index < 2**31 and backend.id_to_token(index) is not None)
        if not found:
            raise UserError(f"{source}: eos_token_id {ids} is not in the vocabulary of {path}")
        return found
    for token in (token_text(settings.get("eos_token")), END):
        index = backend.token_to_id(token) if isinstance(token, str) else None
        if index is not None:
            return (index,)
    raise UserError(
        f"nothing says which token of {path} ends a text: give eos_token_id in {path.parent / GENERATION}, or "
        f"eos_token in {path.parent / SETTINGS}"
    )


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
