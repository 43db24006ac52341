"""A batch while it is decoded: to its end in few calls of the device, or a round a call with a look at the texts.

Where prompts wait, a row that is done makes room for the next of them (continuous batching): the loop pauses, the
prompt is read on its own, and its state takes the row's place.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from lsjax.data.tokenizer import Tokenizer
from lsjax.decoding.batch import PromptBatch
from lsjax.decoding.loops import NEVER, Decoding, Pause
from lsjax.decoding.passes import Weights
from lsjax.decoding.rules import Rule
from lsjax.decoding.stops import completed_at
from lsjax.scale.sharding import replicated_like


class Programs(NamedTuple):
    """Compiled: of lower_decoding, and of lower_refill where prompts wait."""

    prefill: Callable
    decode: Callable
    prefill_row: Callable | None = None
    replace: Callable | None = None


class Row(NamedTuple):
    """What became of a prompt: its new tokens; `rounds` it took; `drafted_at` and `accepted_at` [d] as of Decoding."""

    tokens: list[int]
    rounds: int
    drafted_at: np.ndarray
    accepted_at: np.ndarray


class Running:
    """`seen` is the state as the host last looked at it, without the cache. Rows whose stop string is complete end
    there, on the host and on the device. `prefill_seconds` [N] to a prompt's first token, `seconds` of all the rest."""

    seen: Decoding
    seconds: float

    def __init__(self, programs: Programs, weights: Weights, batch: PromptBatch, tokenizer: Tokenizer):
        self._programs, self._weights, self._batch, self._tokenizer = programs, weights, batch, tokenizer
        self._everywhere = replicated_like(weights["embed"])
        self._limits = self._put((np.int32(batch.max_new_tokens), batch.stop))
        self._held = list(range(batch.rows))  # the prompt that each row holds
        self._waiting = list(range(batch.rows, len(batch.lengths)))
        self._ended: dict[int, Row] = {}
        self.prefill_seconds = np.zeros(len(batch.lengths))
        jax.block_until_ready(weights)

    def prefill(self, look: bool) -> None:
        """Reads the first prompts, to the first token; `look`: a round at a time will follow."""
        began = time.perf_counter()
        self._state, self._rule = self._first_tokens(self._programs.prefill, self._held)
        self.prefill_seconds[self._held] = time.perf_counter() - began
        if look:
            self.look()
            self._end_rows(self._before(range(len(self._held))))

    def to_the_end(self) -> None:
        """Until every prompt is done."""
        began = time.perf_counter()
        while self._waiting:
            self._until_a_row_is_done()
            self._refill()
        if self._batch.stop_texts:
            while not self.seen.done.all():
                self.one_round()
        else:
            self._run(NEVER)
        self.seconds = time.perf_counter() - began - self.prefill_seconds[self._batch.rows :].sum()
        self.look()

    def one_round(self) -> None:
        before = self.seen
        self._run(Pause(before.round + 1, NEVER.rows))
        self.look()
        self._end_rows(before)

    def look(self) -> None:
        self.seen = jax.tree.map(np.array, jax.device_get(self._state._replace(cache=())))

    def tokens(self, row: int) -> list[int]:
        """The new tokens of a row, as last seen."""
        return self.seen.tokens[row, : self.seen.emitted[row]].tolist()

    def results(self) -> list[Row]:
        """Of every prompt, once all are done."""
        for row in range(len(self._held)):
            self._take_out(row)
        return [self._ended[prompt] for prompt in range(len(self._ended))]

    def _until_a_row_is_done(self) -> None:
        if self._batch.stop_texts:
            self.one_round()
        else:
            self._run(Pause(NEVER.round, self._batch.rows))
            self.look()

    def _refill(self) -> None:
        """Brings waiting prompts into the rows that are done."""
        rows = np.flatnonzero(self.seen.done)[: len(self._waiting)]
        for row in rows:
            self._take_out(row)
            self._held[row] = prompt = self._waiting.pop(0)
            began = time.perf_counter()
            new, _ = self._first_tokens(self._programs.prefill_row, [prompt])
            self._state = jax.block_until_ready(self._programs.replace(self._state, self._put(np.int32(row)), new))
            self.prefill_seconds[prompt] = time.perf_counter() - began
        if len(rows):
            self._rule = self._put(self._batch.rule.of_rows(self._held))
            self.look()
            self._end_rows(self._before(rows))

    def _first_tokens(self, prefill: Callable, prompts: list[int]) -> tuple[Decoding, Rule]:
        batch = self._batch
        inputs = self._put((batch.tokens[prompts], batch.lengths[prompts], batch.rule.of_rows(prompts)))
        return jax.block_until_ready(prefill(self._weights, *inputs[:2], *self._limits, inputs[2])), inputs[2]

    def _before(self, rows: Sequence[int]) -> Decoding:
        """What was seen, without the first tokens of `rows`."""
        emitted = self.seen.emitted.copy()
        emitted[rows] = 0
        return self.seen._replace(emitted=emitted)

    def _take_out(self, row: int) -> None:
        seen = self.seen
        counts = int(seen.rounds[row]), seen.drafted_at[row], seen.accepted_at[row]
        self._ended[self._held[row]] = Row(self.tokens(row), *counts)

    def _put(self, arrays):
        return jax.block_until_ready(jax.device_put(arrays, self._everywhere))

    def _run(self, pause: Pause) -> None:
        pause = self._put(jax.tree.map(np.int32, pause))
        arguments = self._weights, self._state, *self._limits, self._rule, pause
        self._state = jax.block_until_ready(self._programs.decode(*arguments))

    def _end_rows(self, before: Decoding) -> None:
        """Ends the rows whose tokens since `before` complete a stop string."""
        if not self._batch.stop_texts:
            return
        ended = False
        for row in np.flatnonzero(self.seen.emitted > before.emitted):
            end = completed_at(self._tokenizer, self.tokens(row), int(before.emitted[row]), self._batch.stop_texts)
            if end is not None:
                self._end_row(before, row, end)
                ended = True
        if ended:
            self._state = self._put(self.seen)._replace(cache=self._state.cache)

    def _end_row(self, before: Decoding, row: int, end: int) -> None:
        now, kept = self.seen, end - before.emitted[row]
        now.done[row] = True
        if end < now.emitted[row]:
            # As the loop counts at a stop token: drafts after it do not, and those before it were accepted.
            now.emitted[row] = end
            for counts, earlier in ((now.drafted_at, before.drafted_at), (now.accepted_at, before.accepted_at)):
                counts[row] = earlier[row] + (np.arange(counts.shape[1]) < kept)
