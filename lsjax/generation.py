"""`generate` and `stream`: prompts in, texts out, by any strategy."""

import numbers
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lsjax.checks import attribute_of
from lsjax.decoding.batch import GenerationConfig, Prompt, PromptBatch
from lsjax.decoding.model import Model
from lsjax.decoding.program import DecodeProgram
from lsjax.decoding.results import GenerateResult, sequence_result
from lsjax.decoding.session import DecodedSequence, DecodeSession
from lsjax.decoding.stop_strings import Stop, StopTokens, text_so_far
from lsjax.decoding.strategies import AUTOREGRESSIVE, GREEDY, Sampling, Strategy
from lsjax.tuning.cost_model import resolve_auto

if TYPE_CHECKING:
    from typing_extensions import TypeIs


def generate(
    model: Model,
    prompts: str | Sequence[Prompt],
    max_new_tokens: int | Sequence[int] = 128,
    strategy: Strategy = AUTOREGRESSIVE,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop: Stop = (),
    stop_tokens: StopTokens = (),
    batch_size: int | None = None,
) -> GenerateResult:
    """Continues prompts, greedily unless `sampling` says otherwise.

    prompts: a text, or a list of texts and token lists of any lengths.
    max_new_tokens: the most new tokens per prompt.
    strategy: Autoregressive(), EarlyExit(E) or SelfSpeculative(E, d). SelfSpeculative("auto", "auto") first measures
      which setting suits these prompts, at every call. The seconds that takes pay for long texts; for many calls,
      `tune` once, or keep a table beside the model with `tune_table`, which "auto" then takes. Where no setting is
      predicted to be faster, decoding is autoregressive. `stats` say what it was.
    seed: seed of the draws, in 0..2^64-1.
    stop, stop_tokens: texts and token ids that end a sequence, beside the tokenizer's own stop token.
    batch_size: sequences decoded side by side; None takes all. A finished one makes room for the next prompt.

    max_new_tokens, and temperature, top_k and top_p of `sampling`, may be lists with one value per prompt; stop and
    stop_tokens, lists with one list per prompt. Prompts of different settings decode side by side in one program, and
    other values do not recompile it. Where all temperatures are 0, nothing is drawn.

    A sequence's result does not depend on the others. What is drawn depends on the seed, on the prompt, and on the
    number of equal prompts before it, so n copies of a prompt give n samples.

    A sequence ends with a stop token, or with the token that completes a stop text (its own text ends just before that
    text), or after max_new_tokens. Its stats say `finish_reason` "stop" or "length". Stop texts are looked for after
    every round, and every round is then one device call.

    Raises UserError for an empty or too long prompt, and for a token, exit layer or setting out of range.
    """
    request = GenerationConfig(max_new_tokens, sampling, seed, stop, stop_tokens, batch_size)
    batch = PromptBatch.make(model, [prompts] if isinstance(prompts, str) else prompts, request)
    return compiled_program(model, strategy, batch).run(model, batch)


class Piece(NamedTuple):
    """The new tokens and text that one round adds to a sequence.

    tokens: its new tokens. text: the text that is certain with them; half a character, or what may become a stop text,
      waits for a later piece. row: the number of the prompt. finish_reason: "stop" or "length" in its last piece.
    stats: in its last piece, the stats of the sequence, as in `generate` but without the times of the whole batch.
    """

    tokens: list[int]
    text: str
    row: int = 0
    finish_reason: str | None = None
    stats: dict[str, Any] | None = None


def stream(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    max_new_tokens: int | Sequence[int] = 128,
    strategy: Strategy = AUTOREGRESSIVE,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop: Stop = (),
    stop_tokens: StopTokens = (),
) -> Iterator[Piece]:
    """Continues prompts like `generate`, and yields each sequence's new tokens and text after every round.

    prompts: one prompt (a text or a token list), or a list of prompts.

    The pieces of a sequence together are what `generate` returns for the same arguments. Each round is one device call,
    made when its pieces are asked for, so leaving early costs nothing. Raises UserError as `generate` does, when
    called.
    """
    prompts = [prompts] if _is_one_prompt(prompts) else prompts
    batch = PromptBatch.make(model, prompts, GenerationConfig(max_new_tokens, sampling, seed, stop, stop_tokens))
    return _pieces(model, batch, compiled_program(model, strategy, batch))


class Ended(NamedTuple):
    """The result of one prompt, when it has ended: its number, and what `generate` returns for it."""

    index: int
    tokens: list[int]
    text: str
    stats: dict[str, Any]


def generate_in_turn(
    model: Model, prompts: Sequence[Prompt], request: GenerationConfig, strategy: Strategy = AUTOREGRESSIVE
) -> Iterator[Ended]:
    """Continues prompts like `generate`, and yields the result of each one when it has ended.

    The stats are without the times of the whole batch. Raises UserError as `generate` does, when called.
    """
    batch = PromptBatch.make(model, prompts, request)
    return _results_in_turn(model, batch, compiled_program(model, strategy, batch))


def compiled_program(model: Model, strategy: Strategy, batch: PromptBatch) -> DecodeProgram:
    """Returns the program of a strategy for a batch, with "auto" settings resolved, compiled."""
    program = DecodeProgram(model.config, resolve_auto(strategy, model, batch), batch)
    program.compile(program.weights(model), model.kernels, model.cache)
    return program


def _is_one_prompt(prompts: Prompt | Sequence[Prompt]) -> "TypeIs[Prompt]":
    """Returns whether `prompts` is one text, or the token ids of one."""
    if isinstance(prompts, str):
        return True
    if attribute_of(prompts, "__len__") is None:
        return False
    # The first entry tells; the others are looked at when the prompt is read, whose length is bounded.
    try:
        return len(prompts) > 0 and isinstance(next(iter(prompts)), numbers.Integral)
    except Exception:  # an array of one number has no length; what cannot be read is refused as a list of prompts
        return False


def _pieces(model: Model, batch: PromptBatch, program: DecodeProgram) -> Iterator[Piece]:
    session, rows = program.start(model, batch), len(batch.lengths)
    num_yielded, text_yielded = [0] * rows, [0] * rows
    session.prefill(sync=True)
    while True:
        for row in range(rows):
            tokens, ended = session.tokens(row), session.host_state.done[row]
            if len(tokens) == num_yielded[row]:
                continue
            if ended:
                _, _, text, stats = _ended(model, batch, program, session, row, session.result(row))
            else:
                text, stats = text_so_far(model.tokenizer, tokens, batch.stop_texts[row], batch.prompt(row)), None
            reason = stats["finish_reason"] if stats else None
            yield Piece(tokens[num_yielded[row] :], text[text_yielded[row] :], row, reason, stats)
            num_yielded[row], text_yielded[row] = len(tokens), len(text)
        if session.host_state.done.all():
            return
        session.run_round()


def _results_in_turn(model: Model, batch: PromptBatch, program: DecodeProgram) -> Iterator[Ended]:
    session = program.start(model, batch)
    for index, sequence in session.run_in_turn():
        yield _ended(model, batch, program, session, index, sequence)


def _ended(
    model: Model,
    batch: PromptBatch,
    program: DecodeProgram,
    session: DecodeSession,
    index: int,
    sequence: DecodedSequence,
) -> Ended:
    """Returns the result of prompt `index`."""
    text, own = sequence_result(model, batch, index, sequence, session.prefill_seconds[index])
    strategy = program.strategy
    stats = {"strategy": strategy.name, **strategy.settings(), "kernels": str(program.kernels)} | own
    return Ended(index, sequence.tokens, text, stats)
