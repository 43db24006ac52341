"""A batch while it is decoded: to its end in one call of the device, or a round a call with a look at the texts."""

import jax
import numpy as np

from lsjax.data.tokenizer import Tokenizer
from lsjax.decoding.batch import PromptBatch
from lsjax.decoding.loops import ALL_ROUNDS, Decoding
from lsjax.decoding.passes import Weights
from lsjax.decoding.stops import completed_at
from lsjax.scale.sharding import replicated_like


class Running:
    """`seen` is the state as the host last looked at it, without the cache. Rows whose stop string is complete end
    there, on the host and on the device."""

    seen: Decoding

    def __init__(self, prefill, decode, weights: Weights, batch: PromptBatch, tokenizer: Tokenizer):
        self._prefill, self._decode, self._weights = prefill, decode, weights
        self._tokenizer, self._stop_texts = tokenizer, batch.stop_texts
        self._everywhere = replicated_like(weights["embed"])
        inputs = (batch.tokens, batch.lengths, np.int32(batch.max_new_tokens), batch.stop, batch.rule)
        inputs = jax.block_until_ready(jax.device_put(inputs, self._everywhere))
        self._prompts, self._rules = inputs[:2], inputs[2:]
        self._rounds = 0
        jax.block_until_ready(weights)

    def prefill(self, look: bool) -> None:
        """Reads the prompts, to the first token; `look`: a round at a time will follow."""
        self._state = jax.block_until_ready(self._prefill(self._weights, *self._prompts, *self._rules))
        if look:
            self.look()
            nothing = jax.tree.map(np.zeros_like, self.seen)
            self._end_rows(nothing)

    def to_the_end(self) -> None:
        self._run(ALL_ROUNDS)

    def one_round(self) -> None:
        before, self._rounds = self.seen, self._rounds + 1
        self._run(self._rounds)
        self.look()
        self._end_rows(before)

    def look(self) -> None:
        self.seen = jax.tree.map(np.array, jax.device_get(self._state._replace(cache=())))

    def tokens(self, row: int) -> list[int]:
        """The new tokens of a row, as last seen."""
        return self.seen.tokens[row, : self.seen.emitted[row]].tolist()

    def _run(self, pause: int) -> None:
        pause = jax.device_put(np.int32(pause), self._everywhere)
        self._state = jax.block_until_ready(self._decode(self._weights, self._state, *self._rules, pause))

    def _end_rows(self, before: Decoding) -> None:
        """Ends the rows whose tokens since `before` complete a stop string."""
        if not self._stop_texts:
            return
        ended = False
        for row in np.flatnonzero(self.seen.emitted > before.emitted):
            end = completed_at(self._tokenizer, self.tokens(row), int(before.emitted[row]), self._stop_texts)
            if end is not None:
                self._end_row(before, row, end)
                ended = True
        if ended:
            self._state = jax.device_put(self.seen, self._everywhere)._replace(cache=self._state.cache)

    def _end_row(self, before: Decoding, row: int, end: int) -> None:
        now, kept = self.seen, end - before.emitted[row]
        now.done[row] = True
        if end < now.emitted[row]:
            # As the loop counts at a stop token: drafts after it do not, and those before it were accepted.
            now.emitted[row] = end
            for counts, earlier in ((now.drafted_at, before.drafted_at), (now.accepted_at, before.accepted_at)):
                counts[row] = earlier[row] + (np.arange(counts.shape[1]) < kept)
