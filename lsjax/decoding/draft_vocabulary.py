"""Draft vocabularies: which tokens drafts choose among, and the head's rows for them.

A draft reads the whole head, half of its bytes in a small model with a large vocabulary. A few thousand frequent tokens
are nearly all that occur (FR-Spec, arXiv 2502.14856). Verification reads the whole head, so it emits every token, and
layers, cache and exit states stay the model's own.
"""

import jax
import numpy as np

from lsjax.data.tokenizer import Tokenizer
from lsjax.decoding.forward import TOKEN_IDS, Weights
from lsjax.decoding.shardings import draft_head_shardings
from lsjax.decoding.strategies import DraftVocabulary
from lsjax.errors import UserError
from lsjax.io.draft_vocabulary import checked_ids, has_list, list_path, read_list
from lsjax.model.weight_layout import OutputMajor
from lsjax.parallel.sharding import mesh_of, replicated_like


def draft_token_ids(vocabulary: DraftVocabulary, tokenizer: Tokenizer, vocab_size: int, model_path: str) -> np.ndarray:
    """Returns the ids of a draft vocabulary, with the stop and special tokens, ascending: int32 [k].

    vocabulary: as SelfSpeculative holds it. A number is the length of the result, unless there are more stop and
    special tokens than that.

    Raises UserError when ids are wrong, or when a number is given and the model has no list, or a shorter one.
    """
    always = always_drafted(tokenizer, vocab_size)
    if isinstance(vocabulary, tuple):
        return np.union1d(checked_ids(vocabulary, vocab_size, "draft_vocabulary"), always)
    if isinstance(vocabulary, str):
        return np.union1d(read_list(vocabulary, vocab_size), always)
    assert isinstance(vocabulary, int)
    return most_frequent(_ranked_ids(vocabulary, vocab_size, model_path), always, vocabulary)


def most_frequent(ranked: np.ndarray, always: np.ndarray, count: int) -> np.ndarray:
    """Returns `count` ids, or more if `always` has more: all of `always`, then the first of `ranked`; ascending."""
    rest = ranked[~np.isin(ranked, always)]
    return np.union1d(rest[: max(0, count - len(always))], always)


def always_drafted(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """Returns the ids that every draft vocabulary has: the tokens that end a text and the special tokens, ascending."""
    ids = {*tokenizer.stop, *tokenizer.special_tokens.values()}
    return np.array(sorted(index for index in ids if 0 <= index < vocab_size), np.int32)


def _ranked_ids(count: int, vocab_size: int, model_path: str) -> np.ndarray:
    """Returns the ids of the list beside a model, at least `count` of them."""
    if not model_path:
        raise UserError(
            f"draft_vocabulary {count} takes the most frequent tokens of a list beside the model, but this model was "
            "not loaded from files: give token ids, or the path of a list"
        )
    path = list_path(model_path)
    if not has_list(model_path):
        raise UserError(
            f"draft_vocabulary {count} needs a list of frequent tokens, and there is no {path}; make it with: "
            f"lsjax draft_vocabulary --model={model_path} --corpus=TEXTS"
        )
    ranked = read_list(path, vocab_size)
    if len(ranked) < count:
        raise UserError(f"draft_vocabulary {count} is more than the {len(ranked)} tokens that {path} lists")
    return ranked


def trim_head(weights: Weights, ids: np.ndarray) -> Weights:
    """Returns the head's rows for some tokens, and their ids, as weights that only draft: {lm_head, token_ids}.

    weights: the decoder weights; their head may be tied, or in int8. ids: [k], ascending.
    """
    head = weights["lm_head"] if "lm_head" in weights else OutputMajor(weights["embed"])
    mesh = mesh_of(weights["embed"])
    shardings = draft_head_shardings(head, len(ids), mesh) if mesh else None
    token_ids = jax.device_put(ids, replicated_like(weights["embed"]))
    rows = jax.jit(_take_rows, out_shardings=shardings)(head, token_ids)
    return {"lm_head": rows, TOKEN_IDS: token_ids}


def _take_rows(head, token_ids: jax.Array):
    return jax.tree.map(lambda leaf: leaf[token_ids], head)  # every layout has one row per token
