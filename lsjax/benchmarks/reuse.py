"""Self-speculation that reuses nothing of its drafts, to measure what the shared cache and exit states save.

The paper's Table 7 compares the two. Without reuse, the early layers draft the same tokens, but verification reads
neither the states that they end with nor the cache entries that they wrote: all layers read every drafted token again
from its embedding and overwrite those entries. The weights are held once. What a drafter with a cache of its own would
need besides, memory for that cache and time to read the prompt into it, is not part of the comparison.
"""

from lsjax.decoding.forward import DRAFT, Weights
from lsjax.decoding.strategies import SelfSpeculative, Strategy
from lsjax.errors import UserError

NO_REUSE = "no reuse"


def without_reuse(weights: Weights, strategy: Strategy) -> Weights:
    """Returns the weights with which the engine verifies drafts from the start: the early layers count as a drafter.

    Raises UserError unless the strategy drafts with the model's own early layers, whose work could be reused.
    """
    if not isinstance(strategy, SelfSpeculative) or not strategy.num_speculations or strategy.draft_weights:
        raise UserError("only drafts of the model's own early layers are reused: draft with them, and not in int8")
    return weights | {DRAFT: weights.get(DRAFT, {}) | {"layers": weights["layers"][: int(strategy.exit_layer)]}}
