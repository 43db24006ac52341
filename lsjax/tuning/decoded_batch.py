"""Batches that were decoded once, and which drafts would be accepted on their texts."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lsjax.decoding.batch import PromptBatch
from lsjax.decoding.draft_vocabulary import draft_token_ids
from lsjax.decoding.model import Model
from lsjax.decoding.strategies import INT8
from lsjax.model.quantization import QuantizedLeft, quantize_params, states_in_int8
from lsjax.model.transformer import Params
from lsjax.tuning.acceptance import batch_rounds, draft_acceptance
from lsjax.tuning.choices import Choices, Drafter, Vocabulary

SAMPLE_TOKENS = 64  # per text; more tokens would add little


class DecodedBatch(NamedTuple):
    """A batch that was decoded once, and which drafts would be accepted on its texts.

    acceptance: the chance that a draft of each new token is accepted, by exit layer and prompt [L,N,n].
    tokens: number of new tokens per prompt [N]. batch_size: sequences decoded side by side.
    """

    acceptance: np.ndarray
    tokens: np.ndarray
    batch_size: int

    def rounds(self, rounds_per_prompt: np.ndarray) -> float:
        """Returns the rounds of the batch, from those of each prompt [N]."""
        return batch_rounds(rounds_per_prompt, self.batch_size)


def read_batches(
    model: Model, batches: Sequence[PromptBatch], new_tokens: Sequence[list[list[int]]], choices: Choices
) -> dict[Drafter, list[DecodedBatch]]:
    """Reads batches with their continuations, and finds which drafts of every drafter would be accepted."""
    params, texts = params_as_decoded(model), {}
    for weights in choices.draft_weights:
        drafting = int8_drafting_params(model, max(choices.exit_layers)) if weights == INT8 else None
        read = [
            read_with_vocabularies(model, params, batch, new, choices.draft_vocabularies, drafting)
            for batch, new in zip(batches, new_tokens, strict=True)
        ]
        for index, vocabulary in enumerate(choices.draft_vocabularies):
            texts[Drafter(weights, vocabulary)] = [of_batch[index] for of_batch in read]
    return texts


def params_as_decoded(model: Model) -> Params:
    """Returns stacked parameters, for a model loaded for decoding only a new copy at every call.

    Weights in int8 round states where those that decode do.
    """
    return _rounding_as(model.stack_params(), model.decoder_weights().get("lm_head"))


def int8_drafting_params(model: Model, exit_layer: int) -> Params:
    """Returns the first layers and the head in int8, stacked, which round states where those that draft do."""
    early = quantize_params(model.stack_early(exit_layer))
    return _rounding_as(early, model.draft_weights(exit_layer)["lm_head"])


def _rounding_as(params: Params, head: object) -> Params:
    """Gives int8 weights the form of a head that decodes."""
    return states_in_int8(params, rounded=isinstance(head, QuantizedLeft))


def read_decoded(model: Model, params: Params, batch: PromptBatch, new_tokens: list[list[int]]) -> DecodedBatch:
    """Reads a batch's prompts with their continuations in one pass, and finds which drafts would be accepted."""
    return read_with_vocabularies(model, params, batch, new_tokens, (None,))[0]


def read_with_vocabularies(
    model: Model,
    params: Params,
    batch: PromptBatch,
    new_tokens: list[list[int]],
    draft_vocabularies: Sequence[Vocabulary],
    drafting: Params | None = None,
) -> list[DecodedBatch]:
    """Returns what `read_decoded` does for drafts of each vocabulary, from the same single pass.

    drafting: as in `draft_acceptance`.
    """
    count = min(int(batch.max_new_tokens.max()), SAMPLE_TOKENS)
    texts = np.zeros((batch.tokens.shape[0], batch.tokens.shape[1] + count), np.int32)
    texts[:, : batch.tokens.shape[1]] = batch.tokens
    for row, (start, new) in enumerate(zip(batch.lengths, new_tokens, strict=True)):
        texts[row, start : start + len(new)] = new
    dtype = model.decoder_weights()["embed"].dtype
    known = np.stack([_known_tokens(model, vocabulary) for vocabulary in draft_vocabularies])
    kept = draft_acceptance(
        params,
        texts,
        batch.lengths,
        batch.sampler,
        model.config,
        count,
        dtype,
        known,
        int8_cache=model.cache == INT8,
        exit_adapter=model.exit_adapter,
        drafting=drafting,
    )
    lengths = np.array([len(new) for new in new_tokens])
    return [DecodedBatch(each, lengths, batch.batch_size) for each in np.asarray(kept.chance, np.float64)]


def _known_tokens(model: Model, vocabulary: Vocabulary) -> np.ndarray:
    """Returns which tokens belong to a draft vocabulary, bool [V]."""
    vocab_size = model.config.vocab_size
    if vocabulary is None:
        return np.ones(vocab_size, bool)
    return np.isin(np.arange(vocab_size), draft_token_ids(vocabulary, model.tokenizer, vocab_size, model.path))
