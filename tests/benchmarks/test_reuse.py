"""Decoding without reuse gives the same tokens from the same drafts, and verifies them through all layers."""

import jax
import pytest

from lsjax.benchmarks.decoding import StrategyDecoder, benchmark
from lsjax.benchmarks.reuse import without_reuse
from lsjax.decoding.forward import decoder_weights, init_cache
from lsjax.decoding.loops import begin, self_speculative_loop
from lsjax.decoding.model import Model
from lsjax.decoding.strategies import Autoregressive, EarlyExit, SelfSpeculative
from lsjax.errors import UserError
from tests.conftest import weight_products
from tests.helpers.prompts import NEW, PROMPTS, NoTokenizer

STRATEGY = SelfSpeculative(3, 4)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_reuse_changes_no_token_and_no_draft(varied, varied_params, batch_size):
    model = Model(varied, varied_params, NoTokenizer())
    report = benchmark(
        model,
        PROMPTS[:3],
        [STRATEGY],
        max_new_tokens=NEW,
        batch_size=batch_size,
        repeats=1,
        baselines=lambda batches: [StrategyDecoder(model, STRATEGY, batches, reuse=False)],
    )
    _, reusing, other = report["runs"]
    assert (reusing["strategy"], other["strategy"]) == ("self_speculative", "self_speculative, no reuse")
    assert reusing["matches_autoregressive"]
    assert other["matches_autoregressive"]
    assert 0.2 < reusing["acceptance_rate"] < 0.9
    for same in ("acceptance_by_position", "tokens_per_round", "bytes_per_round", "exit_layer", "num_speculations"):
        assert other[same] == reusing[same], same


def products_by_rows(config, weights):
    """Returns {tokens read together: number of products with weights of one round whose result has that many rows}.

    Of a layer these are the products back to the model's width; others have one axis more.
    """
    ones = jax.numpy.ones(1, int)
    state = begin(init_cache(config, 1, 64, weights["embed"].dtype), ones, 8 * ones, 20, ones, 32, 4)
    loop = jax.make_jaxpr(lambda w, s: self_speculative_loop(w, s, 20, ones, config, 3, 4))(weights, state)
    shapes = [product.outvars[0].aval.shape for product in weight_products(loop.jaxpr)]
    return {rows: sum(shape[-2] == rows for shape in shapes) for rows in (1, 5)}


def test_verification_runs_all_layers_only_without_reuse(varied, varied_params):
    weights = decoder_weights(varied_params, "float32")
    # 2 of a layer's products and the head's. Of 4 layers, 3 draft, and run for the last draft too where it is reused.
    assert products_by_rows(varied, weights) == {1: 2 * (3 + 3) + 1, 5: 2 * 1 + 1}
    assert products_by_rows(varied, without_reuse(weights, STRATEGY)) == {1: 2 * 3 + 1, 5: 2 * 4 + 1}


@pytest.mark.parametrize("strategy", [Autoregressive(), EarlyExit(2), SelfSpeculative(2, 3, "int8")])
def test_what_reuses_nothing_is_refused(strategy):
    with pytest.raises(UserError, match="only drafts of the model's own early layers are reused"):
        without_reuse({"layers": ()}, strategy)
