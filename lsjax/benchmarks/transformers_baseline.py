"""Decoding by PyTorch transformers with the same weights, timed like our own strategies: an independent baseline."""

import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lsjax.benchmarks.measurements import other_library_stats
from lsjax.benchmarks.torch_baseline import INSTALL_HINT
from lsjax.decoding.batch import PromptBatch
from lsjax.decoding.model import Model
from lsjax.decoding.results import GenerateResult
from lsjax.errors import UserError
from lsjax.io.huggingface import write_huggingface


class TransformersMode(NamedTuple):
    """A greedy decoding mode of transformers.

    arguments: for its `generate`. generation_config: settings of its drafting.
    exit_layer, num_speculations: what the report says about the mode, if it drafts.
    """

    name: str
    arguments: dict[str, Any]
    generation_config: dict[str, Any]
    exit_layer: int | None = None
    num_speculations: int | None = None


def transformers_modes(exit_layer: int, num_speculations: int, batch_size: int) -> list[TransformersMode]:
    """Lists the modes to compare with: its two caches and, for one sequence, its early-exit drafting.

    Early-exit drafting shares the weights but no cache, and supports one sequence only. It is listed with its default
    settings (20 drafts, or fewer when the drafter is less than 40 % sure) and with our number of drafts.
    """
    plain = [
        TransformersMode("dynamic cache", {}, {}),
        TransformersMode("static cache", {"cache_implementation": "static"}, {}),
    ]
    if batch_size > 1:
        return plain
    early = {"assistant_early_exit": exit_layer}
    defaults = {"num_assistant_tokens": 20, "assistant_confidence_threshold": 0.4}
    as_ours = {"num_assistant_tokens": num_speculations, "assistant_confidence_threshold": 0.0}
    return [
        *plain,
        TransformersMode("early exit", early, defaults, exit_layer),
        TransformersMode("early exit", early, as_ours, exit_layer, num_speculations),
    ]


class DecodedByTransformers(NamedTuple):
    """The new tokens of each sequence, the seconds up to the first ones, and the seconds for all others."""

    tokens: list[list[int]]
    first_seconds: float
    seconds: float


class TransformersModel:
    """The float32 Llama of transformers with the weights of a model.

    Raises UserError when torch or transformers is not installed.
    """

    def __init__(self, model: Model):
        try:
            # Not checked, because a machine need not have this extra.
            import torch  # pyright: ignore[reportMissingImports]
            import transformers  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError(f"comparing with transformers needs {error.name}: {INSTALL_HINT}") from None
        self.torch, self.stop_token_ids = torch, list(model.tokenizer.stop)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as folder:
            write_huggingface(Path(folder), model.config, model.stack_params(), model.tokenizer)
            self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def decode(self, batch: PromptBatch, mode: TransformersMode) -> DecodedByTransformers:
        """Decodes all prompts of a batch together."""
        torch = self.torch
        longest, clock = int(batch.lengths.max()), _FirstTokenClock()
        tokens = np.zeros((len(batch.lengths), longest), np.int64)
        mask = np.zeros_like(tokens)
        for row, length in enumerate(batch.lengths):  # transformers pads on the left: new tokens follow the last column
            tokens[row, longest - length :] = batch.tokens[row, :length]
            mask[row, longest - length :] = 1
        self.model.generation_config.update(**mode.generation_config)
        stop = self.stop_token_ids
        stopping = {"eos_token_id": stop, "pad_token_id": stop[0]} if stop else {"eos_token_id": None}
        with torch.inference_mode():
            tokens, mask = torch.as_tensor(tokens), torch.as_tensor(mask)
            began = time.perf_counter()
            # Not checked: transformers declares `generate` for a protocol that its own models do not fulfil.
            result = self.model.generate(  # pyright: ignore[reportAttributeAccessIssue]
                tokens,
                attention_mask=mask,
                max_new_tokens=int(batch.max_new_tokens.max()),  # one value: measurements take no other
                do_sample=False,
                stopping_criteria=[clock],
                **stopping,
                **mode.arguments,
            )
            ended = time.perf_counter()
        new_tokens = [self._until_stop(sequence[longest:].tolist()) for sequence in result]
        return DecodedByTransformers(new_tokens, clock.first - began, ended - clock.first)

    def _until_stop(self, tokens: list[int]) -> list[int]:
        ends = (index + 1 for index, token in enumerate(tokens) if token in self.stop_token_ids)
        return tokens[: next(ends, len(tokens))]


class _FirstTokenClock:
    """A stopping criterion that never stops. transformers calls it after each pass, so it sees when the first is done.

    first: the time after the first pass.
    """

    first: float = 0.0

    def __call__(self, tokens, scores, **_):
        self.first = self.first or time.perf_counter()
        return tokens.new_zeros(len(tokens), dtype=bool)


class TransformersDecoder:
    """One mode of transformers as a Decoder, measured beside our strategies."""

    strategy = None

    def __init__(self, model: TransformersModel, mode: TransformersMode, batches: list[PromptBatch]):
        self.model, self.mode, self.batches = model, mode, batches

    @property
    def label(self) -> str:
        """The library and its mode."""
        return f"transformers, {self.mode.name}"

    def compile(self) -> float:
        """Decodes once as a warm-up, and returns 0, since nothing is compiled."""
        self.model.decode(self.batches[0].part(0, self.batches[0].batch_size), self.mode)
        return 0.0

    def decode(self, batch_index: int) -> GenerateResult:
        """Decodes one batch, `batch_size` prompts at a time, and returns stats with the keys of our own."""
        batch, mode = self.batches[batch_index], self.mode
        starts = range(0, len(batch.lengths), batch.batch_size)
        parts = [self.model.decode(batch.part(start, start + batch.batch_size), mode) for start in starts]
        texts = [tokens for part in parts for tokens in part.tokens]
        stats = other_library_stats(
            self.label,
            texts,
            parts[0].first_seconds,
            sum(part.seconds for part in parts),
            batch_size=batch.batch_size,
            exit_layer=mode.exit_layer,
            num_speculations=mode.num_speculations,
        )
        return GenerateResult(texts, [], stats)

    def bytes_per_round(self) -> None:
        """Returns None: the bytes that transformers reads are not known."""
