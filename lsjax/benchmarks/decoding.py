"""Fair comparisons of decoding strategies: same prompts, repeats interleaved, medians, compilation timed apart."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lsjax.benchmarks.bandwidth import PlainRead, bytes_per_round
from lsjax.benchmarks.measurements import Decoder, Measurements
from lsjax.benchmarks.reuse import NO_REUSE, without_reuse
from lsjax.decoding.batch import GenerationConfig, Prompt, PromptBatch, prompt_batches
from lsjax.decoding.forward import Weights, cache_dtype
from lsjax.decoding.model import Model
from lsjax.decoding.program import DecodeProgram
from lsjax.decoding.results import GenerateResult
from lsjax.decoding.stop_strings import check_stop
from lsjax.decoding.strategies import GREEDY, INT8, Autoregressive, Sampling, Strategy, label
from lsjax.errors import UserError
from lsjax.tuning.cost_model import Tuning

MakeDecoders = Callable[[list[PromptBatch]], Sequence[Decoder]]


def benchmark(
    model: Model,
    prompts: Sequence[Prompt],
    strategies: Sequence[Strategy],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    batch_size: int = 1,
    repeats: int = 3,
    baselines: MakeDecoders | None = None,
    tuning: Tuning | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Runs every strategy on every prompt `repeats` times, and returns the report of the decode command.

    Autoregressive decoding always runs as well, since `speedup` and `matches_autoregressive` compare with it. The
    latter is None when sampling, where the distribution is the same but the tokens are not.

    max_new_tokens, sampling, seed, stop: as in `generate`. Looking for stop texts is part of the measured time.
    batch_size: prompts decoded side by side; a prompt that ends makes room for the next.
    baselines: makes decoders of the same batches, such as another library, that are measured in the same rounds.
    tuning: a cost model whose predictions the report puts beside the measurements.
    note: receives lines of progress.
    """
    if repeats < 1:
        raise UserError(f"repeats must be at least 1, got {repeats}")
    request = GenerationConfig(
        max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, stop=stop, batch_size=batch_size
    )
    batches = prompt_batches(model, prompts, request)
    strategies = [Autoregressive(), *(strategy for strategy in strategies if strategy != Autoregressive())]
    ours = [StrategyDecoder(model, strategy, batches) for strategy in strategies]
    if model.cache == INT8 and jax.default_backend() == "cpu":
        note("an int8 KV cache is for TPU and GPU: on a CPU it is smaller, but every pass writes it out in float32")
    read = PlainRead(model.decoder_weights())
    decoders: list[Decoder] = [*ours, *(baselines(batches) if baselines else ())]
    measured = _measure(decoders, len(batches), read, repeats, len(prompts), note)
    return _settings_report(model, request, len(prompts), repeats) | {
        "bandwidth": read.summary(ours[0].bytes_per_round(), measured[0].seconds_per_pass()),
        "runs": [
            measurements.summary(autoregressive=measured[0], greedy=sampling.temperature == 0)
            | {"bytes_per_round": decoder.bytes_per_round()}
            | _predictions(decoder.strategy, tuning)
            for decoder, measurements in zip(decoders, measured, strict=True)
        ],
    }


def _settings_report(model: Model, request: GenerationConfig, num_prompts: int, repeats: int) -> dict[str, Any]:
    """Returns the part of the report that says what was measured, and on what."""
    embed = model.decoder_weights()["embed"]
    return {
        "model": model.path,
        "adapter": model.adapter,
        "weights": INT8 if model.in_int8 else str(embed.dtype),
        "cache": str(cache_dtype(model.decoder_weights(), model.cache)),
        "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()})",
        "devices": len(embed.sharding.device_set),
        "jax_version": jax.__version__,
        "max_new_tokens": request.max_new_tokens,
        "sampling": dataclasses.asdict(request.sampling) | {"seed": request.seed},
        "stop": list(check_stop(request.stop)),
        "prompts": num_prompts,
        "repeats": repeats,
    }


def _measure(
    decoders: Sequence[Decoder],
    num_batches: int,
    read: PlainRead,
    repeats: int,
    num_prompts: int,
    note: Callable[[str], None],
) -> list[Measurements]:
    """Compiles all decoders, then lets them take turns on each batch, each turn after a plain read of the weights."""
    measured = []
    for index, decoder in enumerate(decoders, 1):
        note(f"compiling {index}/{len(decoders)}: {decoder.label}")
        measured.append(Measurements([[] for _ in range(num_batches)], decoder.compile()))
    for repeat in range(repeats):
        note(f"measuring, round {repeat + 1}/{repeats}: {len(decoders)} settings on {num_prompts} prompt(s)")
        for batch_index in range(num_batches):
            read.measure()
            for decoder, measurements in zip(decoders, measured, strict=True):
                measurements.results[batch_index].append(decoder.decode(batch_index))
    return measured


def _predictions(strategy: Strategy | None, tuning: Tuning | None) -> dict[str, float | None]:
    """Returns what the cost model predicts for a strategy; None without a model, or for other settings than its own."""
    setting = tuning.at(strategy) if tuning and strategy else None
    return {
        "predicted_speedup": setting.speedup if setting else None,
        "predicted_tokens_per_round": setting.tokens_per_round if setting else None,
    }


class StrategyDecoder:
    """One of our strategies as a Decoder: a compiled program for each batch.

    reuse: False verifies drafts without what drafting them computed, as a drafter with a cache of its own would have
      it (lsjax/benchmarks/reuse.py); only for SelfSpeculative.
    """

    def __init__(self, model: Model, strategy: Strategy, batches: list[PromptBatch], reuse: bool = True):
        self.model, self.strategy, self.batches, self.reuse = model, strategy, batches, reuse
        self.programs = [DecodeProgram(model.config, strategy, batch) for batch in batches]

    @property
    def label(self) -> str:
        """The strategy with its settings, as in the table."""
        return label(self.strategy) if self.reuse else f"{label(self.strategy)}, {NO_REUSE}"

    def compile(self) -> float:
        """Compiles every program, runs one once as a warm-up, and returns the seconds that compilation took."""
        seconds = sum(
            program.compile(self._weights(program), kernels=self.model.kernels, cache=self.model.cache)
            for program in self.programs
        )
        self.decode(0)
        return seconds

    def decode(self, batch_index: int) -> GenerateResult:
        """Decodes one batch."""
        program = self.programs[batch_index]
        result = program.run(self.model, self.batches[batch_index], self._weights(program))
        if self.reuse:
            return result
        named = {"strategy": f"{self.strategy.name}, {NO_REUSE}"}
        return result._replace(stats=[entry | named for entry in result.stats])

    def bytes_per_round(self) -> int:
        """Returns the bytes that a round must read at least, as the mean over the batches."""
        weights = self._weights(self.programs[0])
        total = sum(
            bytes_per_round(
                weights,
                self.model.config,
                self.strategy,
                batch_size=batch.batch_size,
                entries=program.entries_read,
                cache=self.model.cache,
            )
            for program, batch in zip(self.programs, self.batches, strict=True)
        )
        return total // len(self.programs)

    def _weights(self, program: DecodeProgram) -> Weights:
        weights = program.weights(self.model)
        return weights if self.reuse else without_reuse(weights, self.strategy)
