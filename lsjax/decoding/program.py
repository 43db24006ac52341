"""A compiled decoder for one strategy and the shapes of one batch."""

import dataclasses
import time
from typing import Any

import jax

from lsjax.config import ModelConfig
from lsjax.decoding.batch import PromptBatch
from lsjax.decoding.forward import DRAFT, Weights
from lsjax.decoding.lowering import DecodeShape, cache_use, choose_kernels, lower_decoding, lower_refill
from lsjax.decoding.model import Model
from lsjax.decoding.program_cache import PROGRAM_CACHE
from lsjax.decoding.results import GenerateResult, collect_result
from lsjax.decoding.sampling import Sampler
from lsjax.decoding.session import DecodeSession, Programs
from lsjax.decoding.strategies import AUTO, SelfSpeculative, Strategy, check_strategy
from pallas_kernels.kv_cache.interface import KERNELS, Kernels

_ROUNDING = 64  # buffers and caches are rounded up to this many entries, so that new lengths seldom recompile


class DecodeProgram:
    """Prefill and decoding loop of one strategy, compiled for the shapes of a batch.

    capacity: cache entries per sequence.
    Once compiled: kernels, what writes and reads the cache; entries_read, about how many entries of a sequence's cache
    a pass reads.
    """

    kernels: Kernels
    entries_read: int

    def __init__(self, config: ModelConfig, strategy: Strategy, batch: PromptBatch):
        check_strategy(strategy, config.num_layers)
        prompt_length, new_tokens = batch.tokens.shape[1], _rounded_up(int(batch.max_new_tokens.max()))
        self.strategy = strategy
        self.capacity = _rounded_up(prompt_length + new_tokens + strategy.tokens_per_pass)
        self._config = config
        self._shape = DecodeShape(
            batch_size=batch.batch_size,
            padded_prompt_length=prompt_length,
            capacity=self.capacity,
            buffer_size=new_tokens + strategy.tokens_per_pass,
            num_stop_tokens=batch.stop_token_ids.shape[1],
        )
        self._sampler = jax.tree.map(jax.typeof, batch.sampler.take(range(batch.batch_size)))
        self._prompts_wait = batch.batch_size < len(batch.lengths)

    def weights(self, model: Model) -> Weights:
        """Returns the weights that it reads: the decoder weights, and those that only draft.

        The latter are the early layers in int8, the head's rows of a draft vocabulary, and the adapter of the exit. An
        early exit's own text goes through the adapter too.
        """
        strategy, weights = self.strategy, model.decoder_weights()
        drafter = model.adapter_weights(int(strategy.settings()["exit_layer"] or 0))
        if not isinstance(strategy, SelfSpeculative):
            return weights | drafter
        if strategy.draft_weights is not None:
            drafter |= model.draft_weights(int(strategy.exit_layer))
        if strategy.draft_vocabulary is not None:
            drafter |= model.draft_head(strategy.draft_vocabulary, weights | drafter)
        return weights | {DRAFT: drafter} if drafter else weights

    def compile(self, weights: Weights, kernels: str = AUTO, cache: str = AUTO) -> float:
        """Compiles for these weights, unless equal programs exist already. Returns the seconds it took.

        kernels, cache: the settings of lsjax.load.
        """
        began = time.perf_counter()
        shape = self._shape._replace(cache=cache)
        self.kernels = choose_kernels(kernels, weights, self._config, self.strategy, shape, platform=None)
        use = cache_use(weights, self._config, self.strategy, shape)
        self.entries_read = KERNELS[self.kernels.name].entries_read(use)
        shape = shape._replace(kernels=self.kernels.name)
        decoding = self._compiled(lower_decoding, weights, shape)
        refill = self._compiled(lower_refill, weights, shape) if self._prompts_wait else (None, None)
        self._programs = Programs(prefill=decoding[0], decode=decoding[1], prefill_one=refill[0], replace=refill[1])
        return time.perf_counter() - began

    def _compiled(self, lower: Any, weights: Weights, shape: DecodeShape) -> tuple[Any, Any]:
        """Returns the two programs that `lower` (lower_decoding or lower_refill) makes, compiled."""
        layout = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), weights)
        leaves, tree = jax.tree.flatten(layout)
        config, sampler = self._config, self._sampler
        strategy = self.strategy
        if isinstance(strategy, SelfSpeculative):
            # The ids of a draft vocabulary are weights, so other ids of the same number need no other program.
            strategy = dataclasses.replace(strategy, draft_vocabulary=None)

        def build():
            programs = lower(layout, config, strategy, shape, sampler)
            return tuple(program.compile() for program in programs)

        key = (lower, tree, tuple(leaves), config, strategy, shape, _hashable(sampler))
        return PROGRAM_CACHE.get(key, build)

    def start(self, model: Model, batch: PromptBatch, weights: Weights | None = None) -> DecodeSession:
        """Returns a session for a batch of the shapes that this program was compiled for.

        weights: those that it was compiled for; None means `self.weights(model)`.
        """
        weights = self.weights(model) if weights is None else weights
        return DecodeSession(self._programs, weights, batch, model.tokenizer)

    def run(self, model: Model, batch: PromptBatch, weights: Weights | None = None) -> GenerateResult:
        """Decodes a batch, and times prefill (up to the first token) and the loop. No time holds compilation.

        weights: as for `start`.
        """
        session = self.start(model, batch, weights)
        session.prefill(sync=batch.has_stop_texts)
        session.run_to_end()
        return collect_result(self.strategy, str(self.kernels), model, batch, session)


def _rounded_up(length: int) -> int:
    return -(-length // _ROUNDING) * _ROUNDING


def _hashable(sampler: Sampler) -> Any:
    leaves, tree = jax.tree.flatten(sampler)
    return tree, tuple(leaves)
