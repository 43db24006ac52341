"""`tune` finds the exit layer and draft length that decode fastest, from a few measurements.

`tune_table` finds them for several temperatures and batch sizes, and keeps them beside the model.
"""

import numbers
from collections.abc import Callable, Sequence
from typing import Any

from lsjax.decoding.batch import GenerationConfig, Prompt, check_whole_number, prompt_batches
from lsjax.decoding.model import Model, check_model_type
from lsjax.decoding.per_prompt import freeze
from lsjax.decoding.strategies import GREEDY, Sampling, SelfSpeculative
from lsjax.errors import UserError, shown
from lsjax.files import check_writable
from lsjax.tuning.choices import Choices, choices_of
from lsjax.tuning.cost_model import Tuning, measure_settings
from lsjax.tuning.tuned_settings import (
    BOTH_AUTO,
    TunedSetting,
    TunedSettings,
    describe_use,
    settings_path,
    write_settings,
)


def tune(
    model: Model,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 64,
    strategy: SelfSpeculative = BOTH_AUTO,
    *,
    batch_size: int | None = None,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    note: Callable[[str], None] = lambda _: None,
) -> Tuning:
    """Chooses what `strategy` leaves "auto", for these prompts on this device.

    Decodes the prompts once, autoregressively. One pass over these texts tells which drafts of every exit layer would
    be kept. Then a few settings are timed. The result's `.strategy` is ready to use.

    Drafts in int8 are among the choices, unless the model is in int8. If a list of frequent tokens lies beside the
    model (`lsjax draft_vocabulary`), so are drafts of parts of it. What `strategy` says of either is kept.

    batch_size: prompts decoded together; None takes all, as `generate` does. note: receives lines of progress.

    `.table` predicts every exit layer with every draft length, even where nothing beats autoregressive decoding
    (`.predicted_speedup` is then 1 or less). Raises UserError on bad input, and when every text ends with its first
    token, since there is nothing to measure then.
    """
    choices = choices_of(strategy, model)
    request = GenerationConfig(max_new_tokens, sampling, seed, batch_size=batch_size)
    return tune_over(model, prompts, choices, request, note)


def tune_over(
    model: Model,
    prompts: Sequence[Prompt],
    choices: Choices,
    request: GenerationConfig,
    note: Callable[[str], None] = lambda _: None,
) -> Tuning:
    """Tunes over the given choices."""
    tuning = measure_settings(model, prompt_batches(model, prompts, request), choices, note)
    if tuning is None:
        raise UserError("every text ended with its first token, so there is no speed to tune: give other prompts")
    return tuning


def tune_table(
    model: Model,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 64,
    *,
    temperatures: Sequence[float] = (0.0, 0.8),
    batch_sizes: Sequence[int] = (1, 8),
    seed: int = 0,
    note: Callable[[str], None] = lambda _: None,
) -> TunedSettings:
    """Tunes at every temperature with every batch size, and keeps the table beside the model.

    It writes tuned_settings.json into the model's folder, or next to its GGUF file. From then on,
    SelfSpeculative("auto", "auto") takes the nearest setting of the table and measures nothing; where self-speculation
    loses, that is autoregressive decoding. A table of other weights, another device or another version is not used.

    temperatures, batch_sizes: those to measure; each prompt is repeated to fill a batch. top_k, top_p and coupled
      sampling are left at their defaults, and "auto" does not look at them. note: receives lines of progress.

    Raises UserError as `tune` does, and before it measures when nothing can be written beside the model.
    """
    check_model_type(model)
    path = settings_path(model.path)
    check_writable(path, "the tuned settings")
    batch_sizes = _values("batch_sizes", batch_sizes)
    for batch_size in batch_sizes:
        check_whole_number("batch_size", batch_size, least=1)  # None, for a request, takes all prompts
    requests = [
        GenerationConfig(max_new_tokens, Sampling(temperature), seed, batch_size=batch_size)
        for temperature in _values("temperatures", temperatures)
        for batch_size in batch_sizes
    ]
    for request in requests:
        prompt_batches(model, prompts, request)  # raises for bad input before anything is measured
    table = TunedSettings(tuple(_tuned(model, prompts, request, note) for request in requests), describe_use(model))
    write_settings(path, table)
    return table


def _values(name: str, values: Any) -> tuple[Any, ...]:
    """Returns the values of an argument. Raises UserError when it is no list, or an empty one."""
    frozen = freeze(name, values)
    if not isinstance(frozen, tuple) or not frozen:
        raise UserError(f"{name} must be a list of at least one value, got {shown(values)}")
    return frozen


def _tuned(
    model: Model, prompts: Sequence[Prompt], request: GenerationConfig, note: Callable[[str], None]
) -> TunedSetting:
    """Returns the fastest setting for a request."""
    temperature, batch_size = request.sampling.temperature, request.batch_size
    assert isinstance(temperature, numbers.Real)  # one for all prompts
    note(f"tuning at temperature {float(temperature):g} and batch size {batch_size}")
    best = tune_over(model, prompts, choices_of(BOTH_AUTO, model), request, note).best
    assert isinstance(best.draft_vocabulary, int | None)  # a part of the list beside the model
    return TunedSetting(
        temperature=float(temperature),
        batch_size=int(batch_size or 0),
        exit_layer=best.exit_layer if best.speedup > 1 else None,
        num_speculations=best.num_speculations if best.speedup > 1 else 0,
        draft_vocabulary=best.draft_vocabulary if best.speedup > 1 else None,
        predicted_speedup=best.speedup,
        draft_weights=best.draft_weights if best.speedup > 1 else None,
    )
