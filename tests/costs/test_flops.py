"""FLOPs against published parameter counts, against hand counts of a small model, and against jaxprs."""

import functools
import math
import re
import types

import jax
import jax.numpy as jnp
import pytest

import lsjax
from lsjax.aot import hlo
from lsjax.aot.report import _branch_share
from lsjax.config import Config, LayerSkipConfig, ModelConfig, TrainingConfig
from lsjax.costs.flops import (
    early_exits,
    forward_flops,
    model_flops_per_token,
    round_flops,
    skipped_share,
    step_flops,
    utilization,
)
from lsjax.costs.hardware import CHIPS, chip_of
from lsjax.decoding import lowering
from lsjax.decoding.forward import decoder_weights
from lsjax.decoding.lowering import DecodeShape
from lsjax.decoding.sampling import Greedy
from lsjax.model.batch_subset import SUBSET_BRANCH
from lsjax.training.step import init_state, mean_gradients, recipe_at
from tests.helpers.counted import count_flops
from tests.helpers.runs import make_batch, replace

LLAMA2_7B = ModelConfig(
    num_layers=32,
    width=4096,
    num_heads=32,
    num_kv_heads=32,
    head_width=128,
    feed_forward_width=11008,
    vocab_size=32000,
    context_length=4096,
    tie_embeddings=False,
)


def test_llama2_7b_is_6n_plus_attention():
    """Checks PaLM's formula 6 N + 12 L H Q T, with N the published 6,738,415,616 less embedding and norms."""
    matrices = 6_738_415_616 - 32_000 * 4096 - 65 * 4096
    config = Config(model=LLAMA2_7B, training=TrainingConfig(sequence_length=4096))
    assert model_flops_per_token(config) == 6 * matrices + 12 * 32 * 32 * 128 * 4096
    causal = model_flops_per_token(config, causal=True)
    assert causal == 6 * matrices + 12 * 32 * 32 * 128 * 4097 / 2


def test_grouped_heads_by_hand():
    """Counts D=8, N=4, K=2, H=3, F=5, V=7, L=2, S=6 by hand: q 8x12, k and v 8x6, out 12x8, three of 8x5."""
    config = ModelConfig(
        num_layers=2, width=8, num_heads=4, num_kv_heads=2, head_width=3, feed_forward_width=5, vocab_size=7
    )
    flops = forward_flops(config, 6)
    assert flops.layers == 2 * 2 * (96 + 48 + 48 + 96 + 120)
    assert flops.attention_full == 2 * (2 * 6 * 12 + 2 * 6 * 12)
    assert flops.attention_causal == 2 * 2 * 2 * 12 * (1 + 2 + 3 + 4 + 5 + 6) / 6
    assert flops.head == 2 * 8 * 7


@pytest.mark.parametrize(
    ("kind", "peak"), [("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("cpu", None)]
)
def test_peaks_are_found_by_the_devices_own_name(kind, peak):
    chip = chip_of(kind)
    assert (chip and chip.peak_flops) == peak


def test_utilization_is_the_share_of_the_peak():
    config = Config(model=LLAMA2_7B, training=TrainingConfig(sequence_length=4096))
    at_peak = 64 * 989e12 / model_flops_per_token(config)
    found = utilization(config, at_peak / 2, 64, CHIPS["gpu:h100"])
    assert found["mfu"] == pytest.approx(0.5)
    assert 0.4 < found["mfu_causal"] < 0.5


def small(**sections):
    config = Config(
        model=ModelConfig(6, 32, 4, 2, 8, 80, 512, 64, False),
        training=TrainingConfig(batch_size=2, sequence_length=16, rematerialize="none", loss_chunk=8, total_steps=60),
        layerskip=LayerSkipConfig(dropout_max_rate=0.0, exit_curriculum="none"),
    )
    return replace(config, **sections)


def counted(config, share=0.0):
    """Counts the FLOPs per token of loss and gradient in the jaxpr."""
    state, batch = jax.eval_shape(lambda: init_state(config)), make_batch(config)
    step = functools.partial(mean_gradients, recipe=recipe_at(0, config), config=config)
    total = count_flops(lambda s, b: step(s, b), state, batch, share=share)
    return total / batch.tokens.size


def test_the_plain_step_has_the_flops_of_the_formula():
    flops = step_flops(small())
    # Plain attention computes all positions of a short text, and there is no recomputation inside a flash kernel.
    assert counted(small()) == pytest.approx(flops.model, rel=1e-6)
    assert flops.exits == flops.skipped == 0


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"exits_train_head": False},
        {"exit_first": 4},
        {"exit_last": 2},
        {"exit_last": 1, "draft_exit": 3},
        {"exit_last": 2, "exit_distillation": 1.0},
    ],
    ids=str,
)
def test_exits_cost_what_is_counted(recipe):
    """Turns on all exits, so that every branch is taken, except at the first layer's input, which is no exit."""
    config = small(layerskip={"exit_curriculum": "all"} | recipe)
    on = early_exits(config)
    assert on == (2 if {"exit_first", "exit_last"} & {*recipe} else 5)
    extra = counted(config, share=on / 6) - counted(small())
    assert step_flops(config).exits == pytest.approx(extra, rel=1e-6)


def test_rotating_exits_are_counted_over_a_rotation():
    config = small(layerskip={"exit_curriculum": "rotational", "exit_rotation": 4})
    by_hand = [sum(layer % 4 == t for layer in range(5)) for t in range(4)]  # 2, 1, 1, 1
    assert early_exits(config) == pytest.approx(sum(by_hand) / 4)
    assert early_exits(small(layerskip={"exit_curriculum": "gradual"})) == pytest.approx(
        sum(min(5, int(12 * t / 60)) for t in range(60)) / 60, rel=1e-6
    )


@pytest.mark.parametrize("policy", ["elementwise", "feed_forward", "layer"])
def test_recomputation_by_policy(policy):
    """Compares with the products in the compiled program, from which the compiler has dropped unused ones."""
    config = small(training={"rematerialize": policy})
    flops, none = step_flops(config), step_flops(small())
    dots = compiled_dots(config)
    forward = forward_flops(config.model, 16)
    # A recomputed layer computes its attention in full here; step_flops counts the causal part.
    full = forward.attention_full - forward.attention_causal if policy == "layer" else 0.0
    attention_again = 0.0 if policy == "layer" else again(policy, forward)
    expected = none.model + flops.recomputed - none.recomputed + full + attention_again
    assert dots == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("targets", ["layers", "layers,lm_head"])
def test_lora_saves_gradients_of_weights(targets):
    """The compiled program adds to the count only what A and B cost: 6 FLOPs for each of their numbers."""
    config = small(training={"lora_rank": 4, "lora_targets": targets})
    adapter = jax.eval_shape(lambda: init_state(config)).params
    thin = 6 * sum(leaf.size for leaf in jax.tree.leaves(adapter["layers"]))
    merging = 2 * 3 * 4 * 32 * 512 / 32 if "lm_head" in targets else 0  # A B once for the 32 tokens, and its gradients
    assert compiled_dots(config) == pytest.approx(step_flops(config).model + thin + merging, rel=1e-6)
    assert model_flops_per_token(config) < model_flops_per_token(small())


@pytest.mark.parametrize(
    "frozen",
    [
        "layers/feed_forward",
        "layers/attention/qkv,lm_head",
        "embed,lm_head",
        "embed,layers,lm_head",
        "embed,layers",
        "embed,layers,final_norm",
        "layers",
    ],
)
def test_frozen_parameters_save_what_the_compiled_program_leaves_out(frozen):
    config = small(training={"frozen": frozen})
    assert compiled_dots(config) == pytest.approx(step_flops(config).model, rel=1e-6)
    assert model_flops_per_token(config) < model_flops_per_token(small())


def test_a_frozen_tied_embedding_is_a_frozen_head():
    config = small(model={"tie_embeddings": True}, training={"frozen": "embed"})
    assert compiled_dots(config) == pytest.approx(step_flops(config).model, rel=1e-6)
    assert step_flops(config).model == step_flops(small()).model - forward_flops(config.model, 16).head


def test_lora_of_the_head_alone_has_no_backward_pass_through_the_layers():
    config = small(training={"lora_rank": 4, "lora_targets": "lm_head"})
    merging = 2 * 3 * 4 * 32 * 512 / 32  # as above
    assert compiled_dots(config) == pytest.approx(step_flops(config).model + merging, rel=1e-6)
    forward = forward_flops(config.model, 16)
    assert step_flops(config).model == forward.model() + forward.head


@pytest.mark.parametrize("frozen", ["embed,layers", "embed,layers,lm_head", "lm_head", "layers/attention"])
@pytest.mark.parametrize(
    "recipe", [{}, {"exits_train_head": False}, {"exit_last": 2, "exit_distillation": 1.0}], ids=str
)
def test_exits_of_frozen_parameters_cost_what_is_counted(frozen, recipe):
    plain, config = (
        small(training={"frozen": frozen}),
        small(layerskip={"exit_curriculum": "all"} | recipe, training={"frozen": frozen}),
    )
    on = early_exits(config)
    extra = compiled_dots(config, share=on / 6) - compiled_dots(plain)
    assert step_flops(config).exits == pytest.approx(extra, rel=1e-6)


def compiled_dots(config, share=0.0):
    """Counts the FLOPs per token of loss and gradient in the compiled program."""
    state, batch = jax.eval_shape(lambda: init_state(config)), make_batch(config)
    step = functools.partial(mean_gradients, recipe=recipe_at(0, config), config=config)
    compiled = jax.jit(lambda s, b: step(s, b)).lower(state, batch).compile()
    return executed_dots(hlo.parse(compiled.as_text()), share) / batch.tokens.size


def again(policy, forward):
    """Counts scores and mixture: plain attention keeps neither under a policy that keeps only its result."""
    return forward.attention_full


def executed_dots(program, share):
    """share: how often an exit is on, as a share of the executions of its branch."""
    total = 0.0
    owners = {id(i): c for c in program.computations.values() for i in c.values()}
    for instruction, times in program.runs(lambda branch: share):
        if instruction.opcode == "dot":
            total += times * dot_flops(owners[id(instruction)], instruction)
        elif instruction.opcode == "fusion":
            inside = program.computations[instruction.called()[0]]
            total += times * sum(dot_flops(inside, i) for i in inside.values() if i.opcode == "dot")
    return total


def dot_flops(computation, dot):
    (_, out, _), (_, left, _) = hlo.arrays(dot.shape)[0], hlo.arrays(computation[dot.operands[0]].shape)[0]
    axes = [int(n) for n in re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)[1].split(",")]
    return 2.0 * math.prod(out) * math.prod(left[axis] for axis in axes)


def test_skipped_layers_are_the_mean_rate():
    """Drops a fifth of the layers: rates linear from 0 to 0.4 over depth, constant in time."""
    recipe = {"dropout_max_rate": 0.4, "dropout_depth_schedule": "linear", "dropout_granularity": "batch"}
    config = small(layerskip=recipe)
    assert skipped_share(config) == pytest.approx(0.2)
    forward = forward_flops(config.model, 16)
    assert step_flops(config).skipped == pytest.approx(3 * 0.2 * (forward.layers + forward.attention_causal))
    assert skipped_share(small(layerskip=recipe | {"dropout_granularity": "subset"})) == pytest.approx(0.2)
    assert skipped_share(small(layerskip=recipe | {"dropout_granularity": "sample"})) == 0  # masked, not skipped


def test_how_often_a_piece_of_a_subset_runs():
    """Takes rates linear from 0 to 0.4 over depth: 3 of 5 groups always run, and on average one of the other two."""
    recipe = {"dropout_max_rate": 0.4, "dropout_depth_schedule": "linear", "dropout_granularity": "subset"}
    share = _branch_share(small(layerskip=recipe | {"dropout_groups": 5}))
    instruction = types.SimpleNamespace(operation=f"jit(step)/while/body/{SUBSET_BRANCH}/cond")
    assert share(instruction) == pytest.approx(0.5)


@pytest.mark.parametrize("strategy", [lsjax.Autoregressive(), lsjax.EarlyExit(2), lsjax.SelfSpeculative(2, 3)], ids=str)
def test_a_round_of_a_decoding_loop(strategy):
    """Compares with the jaxpr of the loop: its body once, the draft loop inside times its turns."""
    config, shape = (
        small().model,
        DecodeShape(batch_size=1, padded_prompt_length=16, capacity=48, buffer_size=24, num_stop_tokens=1),
    )
    weights = jax.eval_shape(lambda: decoder_weights(init_state(small()).params, jnp.float32))
    text = jnp.zeros((1, 16), jnp.int32), jnp.ones(1, jnp.int32)
    inputs = weights, *text, jnp.int32(8), jnp.zeros(1, jnp.int32), Greedy()
    how = {"config": config, "strategy": strategy}
    state = jax.eval_shape(functools.partial(lowering._first_token, **how, shape=shape), *inputs)
    loop = functools.partial(lowering._decode, **how)
    found = count_flops(loop, weights, state, *inputs[3:], share=1.0)
    layers = strategy.layers_run(config.num_layers)
    by_hand = {
        "autoregressive": lambda: round_flops(config, 48, layers, 1, None),
        "early_exit": lambda: round_flops(config, 48, layers, 1, None),
        "self_speculative": lambda: round_flops(config, 48, 2, 3, 2),
    }[strategy.name]()
    assert found == pytest.approx(by_hand, rel=1e-6)


def test_a_loop_with_an_unknown_trip_count_takes_the_given_one():
    loop = jax.jit(lambda x, turns: jax.lax.fori_loop(0, turns, lambda _, y: jnp.sin(y @ y), x))
    program = hlo.parse(loop.lower(jnp.ones((8, 8)), jnp.int32(3)).compile().as_text())
    assert max(times for _, times in program.runs()) == 1
    assert max(times for _, times in program._replace(unknown_trip_count=7).runs()) == 7
