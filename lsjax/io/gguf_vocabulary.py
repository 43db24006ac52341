"""Turns a tokenizer into the vocabulary of a GGUF file, the counterpart of gguf_tokenizer.py."""

import dataclasses
import json
from typing import Any

import gguf
import tokenizers
from gguf import TokenType

from lsjax.data.tokenizer import Tokenizer, token_text
from lsjax.errors import UserError
from lsjax.io.gguf_tokenizer import IGNORE_MERGES, PRE_TOKENIZERS, TURN_ENDS


@dataclasses.dataclass(frozen=True)
class GGUFVocabulary:
    """A byte-level BPE vocabulary as llama.cpp wants it.

    pre: llama.cpp's name of the rule that cuts text into words.
    tokens, types: the texts and the types of all ids. merges: pairs of texts, first merge first.
    stop: the ids that end a text: the end of text, then those that end a turn and a message; at most three.
    begin: the id that may open a text. add_begin: whether it opens every text.
    """

    pre: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    stop: tuple[int, ...]
    begin: int | None = None
    add_begin: bool = False
    padding: int | None = None
    chat_template: Any = None

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Adds the tokenizer's fields to a file."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        writer.add_add_bos_token(self.add_begin)
        ends = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
        for add, index in zip(ends, self.stop, strict=False):
            add(index)
        if self.begin is not None:
            writer.add_bos_token_id(self.begin)
        if self.padding is not None:
            writer.add_pad_token_id(self.padding)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def byte_level_vocabulary(tokenizer: Tokenizer, rows: int, where: str) -> GGUFVocabulary:
    """Returns the vocabulary of a tokenizer with byte-level BPE, for an embedding with `rows` rows.

    Raises UserError, naming the model `where`, for a tokenizer of another kind or with a rule that GGUF cannot express.
    """
    tree = json.loads(tokenizer.backend.to_str())
    _check_byte_level(tree, where)
    added = tokenizer.backend.get_added_tokens_decoder()
    texts = {index: text for text, index in tokenizer.backend.get_vocab().items() if index < rows}
    types = dict.fromkeys(texts, TokenType.NORMAL)
    for index, token in added.items():
        if index >= rows:
            continue
        if token.lstrip or token.rstrip or token.single_word:
            raise UserError(
                f"{where}: its token {token.content!r} looks at the characters around it, which GGUF cannot say"
            )
        types[index] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    settings = tokenizer.settings
    begin = tokenizer.begin
    return GGUFVocabulary(
        pre=_pre_tokenizer_name(tree, where),
        # llama.cpp's converter names and marks rows without a token like this.
        tokens=[texts.get(index, f"[PAD{index}]") for index in range(rows)],
        types=[types.get(index, TokenType.UNUSED) for index in range(rows)],
        merges=[" ".join(merge) for merge in tree["model"]["merges"]],
        stop=_stop_ids(tokenizer, where),
        begin=_id_of(tokenizer, settings.get("bos_token"), rows) if begin is None else begin,
        add_begin=begin is not None,
        padding=_id_of(tokenizer, settings.get("pad_token"), rows),
        chat_template=settings.get("chat_template"),
    )


def placeholder_vocabulary(rows: int, stop: tuple[int, ...], where: str) -> GGUFVocabulary:
    """Returns a vocabulary whose tokens are called <0>, <1> ..., for a file that is only ever given token ids.

    Raises UserError, naming the model `where`, for more than three ids that end a text.
    """
    if len(stop) > 3:
        raise UserError(f"{where} has {len(stop)} tokens that end a text, and a GGUF file can name only three")
    tokens = [f"<{index}>" for index in range(rows)]
    # llama.cpp refuses a file without merges.
    return GGUFVocabulary("gpt-2", tokens, [TokenType.NORMAL] * rows, ["< 0"], stop)


def _check_byte_level(tree: dict[str, Any], where: str) -> None:
    model, decoder = tree["model"], tree["decoder"] or {}
    extras = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if model["type"] != "BPE" or decoder.get("type") != "ByteLevel" or tree["normalizer"]:
        raise UserError(f"{where}: its tokenizer is not byte-level BPE, the only kind that lsjax writes as GGUF")
    if not model["merges"]:
        raise UserError(f"{where}: its tokenizer has no merges, and llama.cpp refuses a GGUF file without any")
    if given := [name for name in extras if model.get(name)]:
        raise UserError(f"{where}: its tokenizer sets {given[0]}, which a GGUF file cannot say")


def _pre_tokenizer_name(tree: dict[str, Any], where: str) -> str:
    """Returns llama.cpp's name of the rule by which a tokenizer cuts text."""
    wanted, ignores_merges = _steps(tree["pre_tokenizer"]), bool(tree["model"].get("ignore_merges"))
    for name, rule in PRE_TOKENIZERS.items():
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = rule
        same = _steps(json.loads(backend.to_str())["pre_tokenizer"]) == wanted
        if same and ignores_merges == (name in IGNORE_MERGES):
            return name
    raise UserError(
        f"{where}: its tokenizer cuts text into words by a rule for which lsjax knows no name of llama.cpp's; "
        f"it knows {', '.join(PRE_TOKENIZERS)}"
    )


def _steps(rule: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Returns the steps of a pre-tokenizer, without a setting that has no influence on ids."""
    steps = rule["pretokenizers"] if rule and rule["type"] == "Sequence" else [rule or {}]
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]


def _stop_ids(tokenizer: Tokenizer, where: str) -> tuple[int, ...]:
    """Returns the ids that end a text and that the file must name, because llama.cpp does not know them by text."""
    first, *others = tokenizer.stop
    named = (first, *(index for index in others if tokenizer.backend.id_to_token(index) not in TURN_ENDS))
    if len(named) > 3:
        raise UserError(f"{where} has {len(named)} tokens that end a text, and a GGUF file can name only three")
    return named


def _id_of(tokenizer: Tokenizer, token: Any, rows: int) -> int | None:
    """Returns the id of a special token as tokenizer_config.json gives it; None if the embedding has none."""
    text = token_text(token)
    index = tokenizer.backend.token_to_id(text) if isinstance(text, str) else None
    return index if index is not None and index < rows else None
