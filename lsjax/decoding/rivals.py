"""The same weights decoded by PyTorch transformers, timed as our own strategies are: an independent yardstick."""

import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lsjax.decoding.batch import PromptBatch
from lsjax.decoding.benchmark import Trial
from lsjax.decoding.generate import GenerateResult
from lsjax.errors import UserError
from lsjax.interop.huggingface import write_huggingface
from lsjax.loading import Model


class Way(NamedTuple):
    """A way that transformers has to decode greedily: arguments of its `generate`, settings of its drafting."""

    name: str
    arguments: dict[str, Any]
    drafting: dict[str, Any]
    exit_layer: int | None = None
    num_speculations: int | None = None


def ways(exit_layer: int, num_speculations: int, batch_size: int) -> list[Way]:
    """Both caches; and its early-exit drafting, as it comes (20 tokens, or until the drafter is less than 40 % sure)
    and with our draft length. That shares the weights but no cache, and takes one row."""
    plain = [Way("dynamic cache", {}, {}), Way("static cache", {"cache_implementation": "static"}, {})]
    if batch_size > 1:
        return plain
    early = {"assistant_early_exit": exit_layer}
    as_ours = {"num_assistant_tokens": num_speculations, "assistant_confidence_threshold": 0.0}
    as_it_comes = {"num_assistant_tokens": 20, "assistant_confidence_threshold": 0.4}
    return [
        *plain,
        Way("early exit", early, as_it_comes, exit_layer),
        Way("early exit", early, as_ours, exit_layer, num_speculations),
    ]


class TransformersModel:
    """The float32 Llama of transformers with a model's weights. Raises UserError when it is not installed."""

    def __init__(self, model: Model):
        try:
            import torch
            import transformers
        except ImportError as error:
            raise UserError(
                f"comparing with transformers needs {error.name}: pip install 'lsjax[parity]', or make test-parity"
            ) from None
        self.torch, self.stop = torch, list(model.tokenizer.stop)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as folder:
            write_huggingface(Path(folder), model.config, model.params, model.tokenizer)
            self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def decode(self, batch: PromptBatch, way: Way) -> tuple[list[list[int]], float, float]:
        """(new tokens of each row, seconds to the first ones, seconds of the others)."""
        torch = self.torch
        longest, clock = int(batch.lengths.max()), _FirstToken()
        tokens = np.zeros((len(batch.lengths), longest), np.int64)
        seen = np.zeros_like(tokens)
        for row, length in enumerate(batch.lengths):  # it goes on at the end of all rows: padding stands before
            tokens[row, longest - length :] = batch.tokens[row, :length]
            seen[row, longest - length :] = 1
        self.model.generation_config.update(**way.drafting)
        arguments = {"eos_token_id": self.stop, "pad_token_id": self.stop[0]} if self.stop else {"eos_token_id": None}
        with torch.inference_mode():
            tokens, seen = torch.as_tensor(tokens), torch.as_tensor(seen)
            began = time.perf_counter()
            result = self.model.generate(
                tokens,
                attention_mask=seen,
                max_new_tokens=batch.max_new_tokens,
                do_sample=False,
                stopping_criteria=[clock],
                **arguments,
                **way.arguments,
            )
            ended = time.perf_counter()
        return [self._until_stop(row[longest:].tolist()) for row in result], clock.first - began, ended - clock.first

    def _until_stop(self, row: list[int]) -> list[int]:
        return row[: next((place + 1 for place, token in enumerate(row) if token in self.stop), len(row))]


class _FirstToken:
    """A criterion that never stops, asked after each pass: it sees when the first tokens are there."""

    first: float | None = None

    def __call__(self, tokens, scores, **_):
        self.first = self.first or time.perf_counter()
        return tokens.new_zeros(len(tokens), dtype=bool)


class TransformersTrial(Trial):
    """One way of transformers and all its measurements, beside those of our strategies."""

    def __init__(self, theirs: TransformersModel, way: Way, batches: list[PromptBatch]):
        self.theirs, self.way, self.batches, self.strategy = theirs, way, batches, None
        self.results: list[list[GenerateResult]] = [[] for _ in batches]
        self.compile_seconds = 0.0

    @property
    def label(self) -> str:
        return f"transformers, {self.way.name}"

    def compile(self) -> None:
        self.theirs.decode(self.batches[0].part(0, self.batches[0].rows), self.way)  # warm-up, not counted

    def measure(self, index: int) -> None:
        batch, way = self.batches[index], self.way
        parts = [batch.part(start, start + batch.rows) for start in range(0, len(batch.lengths), batch.rows)]
        decoded = [self.theirs.decode(part, way) for part in parts]
        tokens = [row for rows, _, _ in decoded for row in rows]
        first_seconds, seconds = decoded[0][1], sum(seconds for _, _, seconds in decoded)
        looped = sum(map(len, tokens)) - len(tokens)
        common = {
            "strategy": self.label,
            "exit_layer": way.exit_layer,
            "num_speculations": way.num_speculations,
            "draft_weights": None,
            "lookup": None,
            "batch_size": batch.rows,
            "seconds": seconds,
            "ms_per_token": 1e3 * seconds / looped if looped else None,
            "tokens_per_second": looped / seconds if looped else None,
            "time_to_first_token_ms": 1e3 * first_seconds,
            "rounds": 0,
            "drafted": 0,
            "accepted": 0,
            "drafted_by_position": [],
            "accepted_by_position": [],
        }
        self.results[index].append(GenerateResult(tokens, [], [common | {"new_tokens": len(row)} for row in tokens]))
