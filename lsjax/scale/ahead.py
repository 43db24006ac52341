"""Compiles the real programs for hardware that is not there, and says what they will need of it."""

import functools
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lsjax.checkpoint import abstract_arrays
from lsjax.config import Config, MeshConfig, ModelConfig
from lsjax.data.batch import Batch
from lsjax.decoding.passes import DRAFT, PREFILL_CHUNK, cache_dtype, decoder_weights, init_cache
from lsjax.decoding.programs import DecodeShape, choose_kernels, last_layer, lower_decoding
from lsjax.decoding.strategies import Strategy, check_strategy
from lsjax.errors import UserError
from lsjax.evaluation.exits import evaluate_batch, evaluated_exits
from lsjax.model.execution import Execution, choose_execution
from lsjax.model.quantized import quantize_params
from lsjax.model.transformer import init_params
from lsjax.scale.compile_only import compile_only_devices
from lsjax.scale.flops import evaluation_flops, forward_flops, round_flops, step_flops
from lsjax.scale.hardware import Topology
from lsjax.scale.sharding import batch_sharding, check_batch, decoder_shardings, make_mesh
from lsjax.training.step import check_microbatch, init_state, make_train_step, microbatch_residuals, state_shardings


class Ahead(NamedTuple):
    """A program lowered for a mesh of devices that only compile. `held`: {kind: bytes that one device holds for it}
    of what goes in; `kept`: bytes of activations among its temporaries. `flops`: of a token, by kind, `executed` among
    them; `tokens`: of one device, a run (a round, for a decoding loop). `turns`: of a loop in it that values end."""

    name: str
    mesh: Mesh
    execution: Execution
    lowered: jax.stages.Lowered
    held: dict[str, int]
    flops: dict[str, float]
    tokens: float
    kept: int = 0
    turns: int = 1


class Outcome(NamedTuple):
    """`text` is HLO; `memory` is None when the compiler refused the program for want of it, as `problem` then says."""

    seconds: float
    text: str = ""
    memory: Any = None
    problem: str = ""


def train_mesh(config: Config, topology: Topology) -> Mesh:
    """config.mesh over all devices of the topology."""
    return _mesh(config.mesh, topology, topology.size)


def train_program(config: Config, topology: Topology) -> Ahead:
    """The step of launch/train.py. Raises UserError when mesh or batch do not divide."""
    mesh, t = train_mesh(config, topology), config.training
    check_microbatch(config, mesh)
    shardings = state_shardings(config, mesh)
    state = abstract_arrays(jax.eval_shape(lambda: init_state(config)), shardings)
    batch = _abstract_batch(config, mesh)
    with jax.set_mesh(mesh):
        lowered = make_train_step(config, mesh).trace(state, batch).lower(lowering_platforms=(_platform(topology),))
        kept = microbatch_residuals(config, choose_execution(config, topology.chip.platform))
    held = {
        "parameters": device_bytes(state.params),
        "optimizer": device_bytes(state.optimizer),
        "batch": device_bytes(batch),
    }
    ways, flops = mesh.shape["data"] * mesh.shape["fsdp"], step_flops(config)
    by_kind = flops._asdict() | {"executed": flops.executed}
    execution, tokens = choose_execution(config, topology.chip.platform), t.batch_size * t.sequence_length / mesh.size
    return Ahead("train", mesh, execution, lowered, held, by_kind, tokens, kept // ways)


def evaluation_program(config: Config, topology: Topology) -> Ahead:
    """The evaluation of one held-out batch, between training steps (the optimizer's state stays in memory)."""
    mesh = train_mesh(config, topology)
    check_batch(config.training.batch_size, mesh, "config.training.batch_size")
    execution = choose_execution(config, topology.chip.platform)
    exits = evaluated_exits(config.model.num_layers, config.evaluation.exit_stride)
    state = abstract_arrays(jax.eval_shape(lambda: init_state(config)), state_shardings(config, mesh))
    batch = _abstract_batch(config, mesh)
    with jax.set_mesh(mesh):
        traced = evaluate_batch.trace(state.params, batch, config.model, exits, execution)
        lowered = traced.lower(lowering_platforms=(_platform(topology),))
    held = {"parameters": device_bytes(state.params), "batch": device_bytes(batch)}
    held |= {"optimizer, waiting": device_bytes(state.optimizer)}
    tokens = config.training.batch_size * config.training.sequence_length / mesh.size
    return Ahead("evaluation", mesh, execution, lowered, held, {"executed": evaluation_flops(config)}, tokens)


def decode_programs(
    config: Config,
    topology: Topology,
    strategy: Strategy,
    rows: int,
    prompt_tokens: int,
    new_tokens: int,
    in_int8: bool = False,
    kernels: str = "auto",
    cache: str = "auto",
) -> tuple[Ahead, Ahead]:
    """(prefill, decoding loop) of a strategy, split over the first config.mesh.tensor devices, weights in bfloat16 or
    int8; `kernels` and `cache` as of lsjax.load."""
    check_strategy(strategy, config.model.num_layers)
    ways = topology.size if config.mesh.tensor == -1 else config.mesh.tensor
    mesh = _mesh(MeshConfig(1, 1, ways), topology, ways)
    weights = _decoder_weights(config.model, mesh, in_int8)
    if getattr(strategy, "draft_weights", None):
        if in_int8:
            raise UserError("draft_weights: a model in int8 drafts with its own early layers")
        rounded = _decoder_weights(config.model, mesh, in_int8=True)
        weights |= {DRAFT: {"layers": rounded["layers"][: strategy.exit_layer], "lm_head": rounded["lm_head"]}}
    capacity = prompt_tokens + new_tokens + 64
    shape = DecodeShape(rows, prompt_tokens, capacity, new_tokens + 64, 1, cache=cache)
    chosen = choose_kernels(kernels, weights, config.model, strategy, shape, topology.chip.platform)
    shape = shape._replace(kernels=chosen.name)
    with jax.set_mesh(mesh):
        programs = lower_decoding(weights, config.model, strategy, shape, platform=_platform(topology))
    sizes = config.model, rows, capacity, cache_dtype(weights, cache), chosen.name
    caches = jax.tree.leaves(jax.eval_shape(lambda: init_cache(*sizes)))
    held = {"parameters": device_bytes(weights), "caches": sum(a.size * a.dtype.itemsize for a in caches) // ways}
    execution = choose_execution(config, topology.chip.platform)._replace(compute_dtype=jnp.dtype("bfloat16"))
    make = functools.partial(Ahead, mesh=mesh, execution=execution, held=held)
    prefilled, a_round = _decode_flops(config, strategy, prompt_tokens, capacity)
    share = rows / ways
    chunks = -(-prompt_tokens // PREFILL_CHUNK)
    return (
        make(
            f"prefill ({strategy.name})",
            lowered=programs[0],
            flops=prefilled,
            tokens=share * prompt_tokens,
            turns=chunks,
        ),
        make(strategy.name, lowered=programs[1], flops=a_round, tokens=share),
    )


def _decoder_weights(config: ModelConfig, mesh: Mesh, in_int8: bool):
    """Descriptions of them, with their shardings."""

    def make():
        params = init_params(jax.random.key(0), config)
        return decoder_weights(quantize_params(params) if in_int8 else params, jnp.bfloat16)

    weights = jax.eval_shape(make)
    return abstract_arrays(weights, decoder_shardings(weights, mesh))


def _decode_flops(config: Config, strategy: Strategy, prompt: int, capacity: int) -> tuple[dict, dict]:
    """Of a prompt's token, and of a row in a round."""
    c, layers = config.model, last_layer(config.model, strategy)
    forward = forward_flops(c, prompt)
    through = (forward.layers + forward.attention_causal) * layers / c.num_layers
    if strategy.name == "self_speculative":
        verified_from = 0 if strategy.draft_weights else strategy.exit_layer
        a_round = round_flops(c, capacity, strategy.exit_layer, strategy.num_speculations, verified_from)
    else:
        a_round = round_flops(c, capacity, layers, 1, None)
    return {"executed": through + forward.head / prompt}, {"executed": a_round}


def compile_ahead(program: Ahead) -> Outcome:
    """Compiles; a program that does not fit is an outcome, not an error."""
    began = time.monotonic()
    try:
        with jax.set_mesh(program.mesh):
            compiled = program.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Ran out of memory" not in str(error):
            raise
        return Outcome(time.monotonic() - began, problem=str(error))
    return Outcome(time.monotonic() - began, compiled.as_text(), compiled.memory_analysis())


def device_bytes(tree) -> int:
    """Bytes of one device's part of a tree of arrays, or descriptions of arrays with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _mesh(config: MeshConfig, topology: Topology, size: int) -> Mesh:
    devices = compile_only_devices(topology)
    if size > len(devices):
        raise UserError(f"config.mesh.tensor is {size}, but --topology={topology} has {len(devices)} devices")
    return make_mesh(config, devices[:size])


def _abstract_batch(config: Config, mesh: Mesh) -> Batch:
    t = config.training
    column = lambda dtype: jax.ShapeDtypeStruct(  # noqa: E731
        (t.batch_size, t.sequence_length), dtype, sharding=batch_sharding(mesh)
    )
    text = Batch(column(jnp.int32), column(jnp.int32), column(jnp.float32))
    if not config.data.separate_documents:
        return text
    return text._replace(positions=column(jnp.int32), segment_ids=column(jnp.int32))


def _platform(topology: Topology) -> str:
    return {"tpu": "tpu", "gpu": "cuda"}[topology.chip.platform]
