"""`tune`: finds the exit layer and draft length that decode fastest, from a few measurements."""

from collections.abc import Callable, Sequence

from lsjax.decoding.batch import GenerationConfig, Prompt, prompt_batches
from lsjax.decoding.model import Model
from lsjax.decoding.strategies import AUTO, GREEDY, Sampling, SelfSpeculative
from lsjax.errors import UserError
from lsjax.tuning.cost_model import Tuning, Vocabulary, candidates, measure_settings, vocabularies

BOTH_AUTO = SelfSpeculative(AUTO, AUTO)


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
    be kept. Then a few settings are timed. The result's `.strategy` is ready to use. If a list of frequent tokens lies
    beside the model (`lsjax draft_vocabulary`), drafts of parts of it are among the choices.

    batch_size: prompts decoded together; None takes all, as `generate` does. note: receives lines of progress.

    `.table` predicts every exit layer with every draft length, even where nothing beats autoregressive decoding
    (`.predicted_speedup` is then 1 or less). Raises UserError on bad input, and when every text ends with its first
    token, since there is nothing to measure then.
    """
    exit_layers, num_speculations = candidates(strategy, model.config.num_layers)
    request = GenerationConfig(max_new_tokens, sampling, seed, batch_size=batch_size)
    draft_vocabularies = vocabularies(strategy, model)
    return tune_over(model, prompts, exit_layers, num_speculations, request, note, draft_vocabularies)


def tune_over(
    model: Model,
    prompts: Sequence[Prompt],
    exit_layers: Sequence[int],
    num_speculations: Sequence[int],
    request: GenerationConfig,
    note: Callable[[str], None] = lambda _: None,
    draft_vocabularies: Sequence[Vocabulary] = (None,),
) -> Tuning:
    """Tunes over the given exit layers, draft lengths and draft vocabularies."""
    batches = prompt_batches(model, prompts, request)
    tuning = measure_settings(model, batches, exit_layers, num_speculations, note, draft_vocabularies)
    if tuning is None:
        raise UserError("every text ended with its first token, so there is no speed to tune: give other prompts")
    return tuning
