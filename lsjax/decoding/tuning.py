"""`tune`: the exit layer and the draft length that decode fastest, from a few measurements instead of a whole grid."""

from collections.abc import Callable, Sequence

from lsjax.decoding.benchmark import prompt_batches
from lsjax.decoding.generate import DecodeProgram
from lsjax.decoding.settings import Tuning, candidates, measure_settings
from lsjax.decoding.strategies import AUTO, Sampling, SelfSpeculative
from lsjax.errors import UserError
from lsjax.loading import Model


def tune(
    model: Model,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int = 64,
    strategy: SelfSpeculative = SelfSpeculative(AUTO, AUTO),  # noqa: B008 (frozen)
    *,
    batch_size: int | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    seed: int = 0,
    note: Callable[[str], None] = lambda _: None,
) -> Tuning:
    """Chooses what `strategy` leaves "auto", for these prompts on this device; `.strategy` of the result is for use.

    The prompts are decoded once, autoregressively; one pass over these texts says which drafts of every exit layer
    would be kept; a few settings are timed. batch_size: prompts decoded together (None: all, as `generate` does).
    `.table` predicts every exit layer with every draft length, also where nothing beats autoregressive decoding
    (`.predicted_speedup` is then 1 or less). Raises UserError on bad input, and when every text ends with its first
    token, which leaves nothing to measure.
    """
    grid = candidates(strategy, model.config.num_layers)
    return tune_over(
        model, prompts, *grid, max_new_tokens, len(prompts) if batch_size is None else batch_size, sampling, seed, note
    )


def tune_over(
    model: Model,
    prompts: Sequence[str | Sequence[int]],
    exit_layers: Sequence[int],
    num_speculations: Sequence[int],
    max_new_tokens: int,
    batch_size: int = 1,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    seed: int = 0,
    note: Callable[[str], None] = lambda _: None,
) -> Tuning:
    """The same over given exit layers and draft lengths."""
    batches = prompt_batches(model, prompts, max_new_tokens, batch_size, sampling, seed)
    tuning = measure_settings(model, batches, DecodeProgram, exit_layers, num_speculations, note)
    if tuning is None:
        raise UserError("every text ended with its first token: there is no speed to tune (see max_new_tokens)")
    return tuning
