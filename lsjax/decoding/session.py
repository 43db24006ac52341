"""A decode session: one batch while it is decoded.

It runs to the end in few device calls, or one round per call when the host must look at the texts. When prompts wait,
a finished sequence makes room for the next one (continuous batching): the loop pauses, the prompt is read on its own,
and its state replaces the finished sequence.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lsjax.data.tokenizer import Tokenizer
from lsjax.decoding.batch import PromptBatch, Settings
from lsjax.decoding.forward import Weights
from lsjax.decoding.loops import NEVER, DecodeState, Pause
from lsjax.decoding.stop_strings import completed_at
from lsjax.parallel.sharding import replicated_like


class Programs(NamedTuple):
    """Compiled programs: those of lower_decoding and, where prompts wait, those of lower_refill."""

    prefill: Callable
    decode: Callable
    prefill_one: Callable | None = None
    replace: Callable | None = None


class DecodedSequence(NamedTuple):
    """The result for one prompt: its new tokens, its rounds, and the counts of DecodeState [d]."""

    tokens: list[int]
    rounds: int
    drafted_at: np.ndarray
    accepted_at: np.ndarray


class DecodeSession:
    """The state of a batch on the device, and its last copy on the host.

    host_state: the state as last copied to the host, without the cache. A sequence whose stop string is complete ends
      there first, and then on the device.
    prefill_seconds: time to the first token of each prompt [N]. seconds: time of all the rest.
    """

    host_state: DecodeState
    seconds: float

    def __init__(self, programs: Programs, weights: Weights, batch: PromptBatch, tokenizer: Tokenizer):
        self._programs, self._weights, self._batch, self._tokenizer = programs, weights, batch, tokenizer
        self._everywhere = replicated_like(weights["embed"])
        self._prompt_of_row = list(range(batch.batch_size))
        self._waiting = list(range(batch.batch_size, len(batch.lengths)))
        self._finished: dict[int, DecodedSequence] = {}
        self.prefill_seconds = np.zeros(len(batch.lengths))
        jax.block_until_ready(weights)

    def prefill(self, sync: bool) -> None:
        """Reads the first prompts up to their first token. sync: copies the state to the host, for single rounds."""
        began = time.perf_counter()
        self._state, self._settings = self._first_tokens(self._programs.prefill, self._prompt_of_row)
        self.prefill_seconds[self._prompt_of_row] = time.perf_counter() - began
        if sync:
            self.sync()
            self._end_at_stop_strings(self._without_tokens_of(range(len(self._prompt_of_row))))

    def run_to_end(self) -> None:
        """Decodes until every prompt is done."""
        began = time.perf_counter()
        while self._waiting:
            self._run_until_fewer_than(self._batch.batch_size)
            self._refill()
        if self._batch.has_stop_texts:
            while not self.host_state.done.all():
                self.run_round()
        else:
            self._call_loop(NEVER)
        self.seconds = time.perf_counter() - began - self.prefill_seconds[self._batch.batch_size :].sum()
        self.sync()

    def run_in_turn(self) -> Iterator[tuple[int, DecodedSequence]]:
        """Decodes until every prompt is done; yields (number of the prompt, its result) when it has ended."""
        yielded: set[int] = set()
        self.prefill(sync=True)
        while True:
            ended = np.flatnonzero(self.host_state.done).tolist()
            for row in ended:
                if (prompt := self._prompt_of_row[row]) not in yielded:
                    yielded.add(prompt)
                    yield prompt, self.result(row)
            if self._waiting and ended:
                self._refill()
            elif len(ended) == len(self._prompt_of_row):
                return
            else:
                self._run_until_fewer_than(len(self._prompt_of_row) - len(ended))

    def run_round(self) -> None:
        """Runs one round, copies the state to the host, and ends sequences at their stop strings."""
        before = self.host_state
        self._call_loop(Pause(before.round + 1, NEVER.unfinished))
        self.sync()
        self._end_at_stop_strings(before)

    def sync(self) -> None:
        """Copies the state, without the cache, to the host."""
        self.host_state = jax.tree.map(np.array, jax.device_get(self._state._replace(cache=())))

    def tokens(self, row: int) -> list[int]:
        """Returns the new tokens of a row of the batch, as of the last copy."""
        return self.host_state.tokens[row, : self.host_state.emitted[row]].tolist()

    def result(self, row: int) -> DecodedSequence:
        """Returns the result of a row of the batch, as of the last copy."""
        state = self.host_state
        return DecodedSequence(
            tokens=self.tokens(row),
            rounds=int(state.rounds[row]),
            drafted_at=np.array(state.drafted_at[row]),
            accepted_at=np.array(state.accepted_at[row]),
        )

    def results(self) -> list[DecodedSequence]:
        """Returns the result for every prompt, once all are done."""
        for row in range(len(self._prompt_of_row)):
            self._take_out(row)
        return [self._finished[prompt] for prompt in range(len(self._finished))]

    def _run_until_fewer_than(self, unfinished: int) -> None:
        """Runs until fewer sequences than this are unfinished; with stop strings, a single round."""
        if self._batch.has_stop_texts:
            self.run_round()
        else:
            self._call_loop(Pause(NEVER.round, unfinished))
            self.sync()

    def _refill(self) -> None:
        """Puts waiting prompts into the rows that are done."""
        assert self._programs.prefill_one is not None
        assert self._programs.replace is not None
        rows = np.flatnonzero(self.host_state.done)[: len(self._waiting)].tolist()
        for row in rows:
            self._take_out(row)
            self._prompt_of_row[row] = prompt = self._waiting.pop(0)
            began = time.perf_counter()
            new, _ = self._first_tokens(self._programs.prefill_one, [prompt])
            self._state = jax.block_until_ready(self._programs.replace(self._state, self._put(np.int32(row)), new))
            self.prefill_seconds[prompt] = time.perf_counter() - began
        if rows:
            self._settings = self._put(self._batch.settings(self._prompt_of_row))
            self.sync()
            self._end_at_stop_strings(self._without_tokens_of(rows))

    def _first_tokens(self, prefill: Callable, prompts: list[int]) -> tuple[DecodeState, Settings]:
        """Reads some prompts. Returns (the state with their first tokens, their settings)."""
        batch = self._batch
        tokens, lengths = self._put(batch.tokens[prompts]), self._put(batch.lengths[prompts])
        own = self._put(batch.settings(prompts))
        state = prefill(self._weights, tokens, lengths, own.max_new_tokens, own.stop_token_ids, own.sampler)
        return jax.block_until_ready(state), own

    def _call_loop(self, pause: Pause) -> None:
        """Runs the decoding loop until it finishes or pauses."""
        pause, own = self._put(jax.tree.map(np.int32, pause)), self._settings
        self._state = jax.block_until_ready(
            self._programs.decode(
                self._weights, self._state, own.max_new_tokens, own.stop_token_ids, own.sampler, pause
            )
        )

    def _without_tokens_of(self, rows: Sequence[int]) -> DecodeState:
        """Returns the last copy of the state as if `rows` had no new tokens."""
        emitted = self.host_state.emitted.copy()
        emitted[rows] = 0
        return self.host_state._replace(emitted=emitted)

    def _take_out(self, row: int) -> None:
        """Stores the result of a row of the batch."""
        self._finished[self._prompt_of_row[row]] = self.result(row)

    def _put(self, arrays: Any) -> Any:
        return jax.block_until_ready(jax.device_put(arrays, self._everywhere))

    def _end_at_stop_strings(self, before: DecodeState) -> None:
        """Ends the sequences whose tokens since `before` complete a stop string."""
        if not self._batch.has_stop_texts:
            return
        ended = False
        for row in np.flatnonzero(self.host_state.emitted > before.emitted).tolist():
            index, known = self._prompt_of_row[row], int(before.emitted[row])
            if not self._batch.stop_texts[index]:
                continue
            stops, prompt = self._batch.stop_texts[index], self._batch.prompt(index)
            end = completed_at(self._tokenizer, self.tokens(row), known, stops, prompt)
            if end is not None:
                self._end_sequence(before, row, end)
                ended = True
        if ended:
            self._state = self._put(self.host_state)._replace(cache=self._state.cache)

    def _end_sequence(self, before: DecodeState, row: int, end: int) -> None:
        """Ends a sequence after `end` new tokens."""
        now, kept = self.host_state, end - before.emitted[row]
        now.done[row] = True
        if end < now.emitted[row]:
            # Count as the loop does at a stop token: drafts before it were accepted, drafts after it do not count.
            now.emitted[row] = end
            for counts, earlier in ((now.drafted_at, before.drafted_at), (now.accepted_at, before.accepted_at)):
                counts[row] = earlier[row] + (np.arange(counts.shape[1]) < kept)
