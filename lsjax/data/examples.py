"""Turns documents into examples: the tokens of each, and which of them the model learns to predict."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lsjax.data.tokenizer import Tokenizer
from lsjax.errors import UserError

COLUMNS = {"completion": ("prompt", "completion"), "chat": ("messages",)}  # of a row, by config.data.format


class Example(NamedTuple):
    """One document as tokens: int32 [n] and bool [n]. learned: whether each token is a target of the loss."""

    tokens: np.ndarray
    learned: np.ndarray


def example_text(row: dict[str, Any], layout: str, place: object) -> str:
    """Returns what an example says as one text, equal for equal examples. Raises UserError when it is none.

    layout: "completion" or "chat", as config.data.format. place: FILE:LINE for the message.
    """
    for key in COLUMNS[layout]:
        if key not in row:
            raise UserError(f'{place}: want a JSON object with "{key}", got the keys {sorted(row)[:8]}')
    values = [row[key] for key in COLUMNS[layout]]
    if layout == "completion" and not all(isinstance(value, str) for value in values):
        raise UserError(f'{place}: "prompt" and "completion" must be strings')
    if layout == "chat" and not _is_conversation(values[0]):
        raise UserError(
            f'{place}: "messages" must be a list of objects with a "role" and a "content", one or more of them of '
            'the role "assistant"'
        )
    try:
        text = json.dumps(values, ensure_ascii=False, sort_keys=True)
        text.encode()
    except (UnicodeEncodeError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{place}: {error}") from None
    return text


def all_learned(tokens: Sequence[int] | np.ndarray) -> Example:
    """Returns the example of a document that is learned as a whole."""
    return Example(np.asarray(tokens, np.int32), np.ones(len(tokens), bool))


def plain_text(row: dict[str, Any]) -> str:
    """Returns the texts of an example one after another, as a sample for training a tokenizer."""
    if "messages" in row:
        return "\n".join(str(message["content"]) for message in row["messages"])
    return row["prompt"] + row["completion"]


def encode_completions(rows: Sequence[dict[str, str]], tokenizer: Tokenizer) -> Iterator[Example]:
    """Yields an example per row {"prompt", "completion"}. The completion and the token that ends it are learned.

    The prompt has the tokens that `Tokenizer.encode` gives it, so that training sees what decoding will.
    """
    head = [] if tokenizer.begin is None else [tokenizer.begin]
    prompts = tokenizer.encode_texts([row["prompt"] for row in rows])
    joined = tokenizer.encode_texts([row["prompt"] + row["completion"] for row in rows])
    for row, prompt, whole in zip(rows, prompts, joined, strict=True):
        # A token of the whole text may reach over the border; then the parts are encoded one by one.
        fits = whole[: len(prompt)] == prompt
        answer = whole[len(prompt) :] if fits else next(iter(tokenizer.encode_texts([row["completion"]])))
        before, after = [*head, *prompt], [*answer, tokenizer.stop[0]]
        learned = np.arange(len(before) + len(after)) >= len(before)
        yield Example(np.asarray([*before, *after], np.int32), learned)


def encode_chat(row: dict[str, Any], tokenizer: Tokenizer, place: object) -> Example:
    """Returns the example of a row {"messages"}. The assistant's turns are learned, with the tokens that end them.

    place: FILE:LINE for the message when the chat template does not take the conversation.
    """
    try:
        tokens, learned = tokenizer.encode_turns(row["messages"])
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    return Example(np.asarray(tokens, np.int32), np.asarray(learned, bool))


def _is_conversation(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in messages)
        and any(m["role"] == "assistant" for m in messages)
    )
