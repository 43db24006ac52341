"""Lowers and compiles the programs of training, evaluation and decoding for hardware that is not attached."""

import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lsjax.aot.compile_only import compile_only_devices
from lsjax.config import Config, MeshConfig, ModelConfig
from lsjax.costs.flops import evaluation_flops, forward_flops, round_flops, step_flops
from lsjax.costs.hardware import Topology
from lsjax.data.batch import Batch
from lsjax.decoding.forward import DRAFT, EXIT_ADAPTER, PREFILL_CHUNK, Weights, cache_dtype, decoder_weights, init_cache
from lsjax.decoding.lowering import DecodeShape, choose_kernels, lower_decoding
from lsjax.decoding.shardings import decoder_weight_shardings
from lsjax.decoding.strategies import SelfSpeculative, Strategy, check_strategy
from lsjax.errors import UserError
from lsjax.evaluation.exits import evaluate_batch, evaluated_exits
from lsjax.model.execution import Execution, choose_execution
from lsjax.model.exit_adapter import ExitAdapter
from lsjax.model.quantization import quantize_params
from lsjax.model.transformer import init_params
from lsjax.model.weight_layout import OutputMajor
from lsjax.parallel.sharding import abstract_arrays, batch_sharding, check_batch, make_mesh, tree_shardings
from lsjax.training.step import (
    TrainState,
    check_microbatch,
    init_state,
    make_train_step,
    microbatch_residuals,
    model_params,
    state_shardings,
)


class LoweredProgram(NamedTuple):
    """A program lowered for a mesh of compile-only devices.

    input_bytes: {kind: bytes of the inputs on one device}.
    flops: FLOPs per token by kind; the kind `executed` is always present. For a decoding loop: per sequence and round.
    tokens: tokens that one device processes per run. For a decoding loop: its share of the sequences.
    residual_bytes: bytes on one device of the activations kept for the backward pass.
    trip_count: iterations to assume for a loop that ends on values.
    """

    name: str
    mesh: Mesh
    execution: Execution
    lowered: jax.stages.Lowered
    input_bytes: dict[str, int]
    flops: dict[str, float]
    tokens: float
    residual_bytes: int = 0
    trip_count: int = 1


class CompileResult(NamedTuple):
    """The result of compiling a program.

    seconds: time the compiler took.
    text: the compiled program as HLO.
    memory: the compiler's memory analysis; None when the program needs more memory than the device has.
    problem: the compiler's message in that case, otherwise empty.
    """

    seconds: float
    text: str = ""
    memory: Any = None
    problem: str = ""


def train_mesh(config: Config, topology: Topology) -> Mesh:
    """Returns the mesh of `config.mesh` over all devices of the topology."""
    return _mesh(config.mesh, topology, topology.size)


def train_program(config: Config, topology: Topology) -> LoweredProgram:
    """Lowers the training step of launch/train.py. Raises UserError when mesh and batch do not divide evenly."""
    mesh, t = train_mesh(config, topology), config.training
    check_microbatch(config, mesh)
    execution = choose_execution(config, topology.chip.platform)
    state, batch = _abstract_state(config, mesh, execution), _abstract_batch(config, mesh)
    with jax.set_mesh(mesh):
        traced = make_train_step(config, mesh).trace(state, batch)
        lowered = traced.lower(lowering_platforms=(_platform(topology),))
        residual_bytes = microbatch_residuals(config, execution)
    flops = step_flops(config)
    return LoweredProgram(
        name="train",
        mesh=mesh,
        execution=execution,
        lowered=lowered,
        input_bytes={
            "parameters": device_bytes((state.params, state.base, state.exit_adapter)),
            "optimizer": device_bytes(state.optimizer),
            "batch": device_bytes(batch),
        },
        flops=flops._asdict() | {"executed": flops.executed},
        tokens=t.batch_size * t.sequence_length / mesh.size,
        residual_bytes=residual_bytes // (mesh.shape["data"] * mesh.shape["fsdp"]),
    )


def evaluation_program(config: Config, topology: Topology) -> LoweredProgram:
    """Lowers the evaluation of one held-out batch between training steps; the optimizer state stays in memory."""
    mesh = train_mesh(config, topology)
    check_batch(config.training.batch_size, mesh, "config.training.batch_size")
    execution = choose_execution(config, topology.chip.platform)
    state, batch = _abstract_state(config, mesh, execution), _abstract_batch(config, mesh)
    adapter = state.adapter(config)
    exits = evaluated_exits(config.model.num_layers, config.evaluation.exit_stride, adapter)
    with jax.set_mesh(mesh):
        params = jax.eval_shape(lambda state: model_params(state, config), state)
        params = abstract_arrays(params, tree_shardings(params, mesh))
        traced = evaluate_batch.trace(params, batch, config.model, exits, execution, exit_adapter=adapter)
        lowered = traced.lower(lowering_platforms=(_platform(topology),))
    return LoweredProgram(
        name="evaluation",
        mesh=mesh,
        execution=execution,
        lowered=lowered,
        input_bytes={
            "parameters": device_bytes((state.params, state.base, state.exit_adapter)),
            "batch": device_bytes(batch),
            "optimizer, waiting": device_bytes(state.optimizer),
        },
        flops={"executed": evaluation_flops(config)},
        tokens=config.training.batch_size * config.training.sequence_length / mesh.size,
    )


def decode_programs(
    config: Config,
    topology: Topology,
    strategy: Strategy,
    batch_size: int,
    prompt_tokens: int,
    new_tokens: int,
    *,
    int8_weights: bool = False,
    kernels: str = "auto",
    cache: str = "auto",
) -> tuple[LoweredProgram, LoweredProgram]:
    """Lowers (prefill, decoding loop) of a strategy, split over the first `config.mesh.tensor` devices.

    prompt_tokens, new_tokens: per sequence. int8_weights: weights in int8 instead of bfloat16. kernels, cache: as for
    lsjax.load.
    """
    check_strategy(strategy, config.model.num_layers)
    ways = topology.size if config.mesh.tensor == -1 else config.mesh.tensor
    mesh = _mesh(MeshConfig(1, 1, ways), topology, ways)
    weights = _strategy_weights(config, strategy, mesh, int8_weights)
    capacity, buffer_size = prompt_tokens + new_tokens + 64, new_tokens + 64
    shape = DecodeShape(batch_size, prompt_tokens, capacity, buffer_size, num_stop_tokens=1, cache=cache)
    chosen = choose_kernels(kernels, weights, config.model, strategy, shape, topology.chip.platform)
    shape = shape._replace(kernels=chosen.name)
    with jax.set_mesh(mesh):
        prefill, loop = lower_decoding(weights, config.model, strategy, shape, platform=_platform(topology))
    execution = choose_execution(config, topology.chip.platform)._replace(compute_dtype=jnp.dtype("bfloat16"))
    prefill_flops, round_flops_per_sequence = _decode_flops(config, strategy, prompt_tokens, capacity)
    decoding = LoweredProgram(
        name=strategy.name,
        mesh=mesh,
        execution=execution,
        lowered=loop,
        input_bytes={"parameters": device_bytes(weights), "caches": _cache_bytes(config.model, shape, weights) // ways},
        flops=round_flops_per_sequence,
        tokens=batch_size / ways,
    )
    prefilling = decoding._replace(
        name=f"prefill ({strategy.name})",
        lowered=prefill,
        flops=prefill_flops,
        tokens=batch_size * prompt_tokens / ways,
        trip_count=-(-prompt_tokens // PREFILL_CHUNK),
    )
    return prefilling, decoding


def _strategy_weights(config: Config, strategy: Strategy, mesh: Mesh, int8_weights: bool) -> Weights:
    """Describes the weights that a strategy decodes with, as `DecodeProgram.weights` puts them together.

    Those that only draft are int8 copies of the early layers and the head, and the adapter of the exit.
    """
    weights = _decoder_weights(config.model, mesh, int8_weights)
    drafter = _exit_adapter(config, strategy, mesh)
    if not isinstance(strategy, SelfSpeculative):
        return weights | drafter
    if strategy.draft_weights:
        if int8_weights:
            raise UserError(
                "--draft_weights=int8 with --weights=int8: a model in int8 already drafts with int8 layers; "
                "leave --draft_weights out"
            )
        rounded = _decoder_weights(config.model, mesh, int8_weights=True)
        drafter |= {"layers": rounded["layers"][: int(strategy.exit_layer)], "lm_head": rounded["lm_head"]}
    return weights | {DRAFT: drafter} if drafter else weights


def _exit_adapter(config: Config, strategy: Strategy, mesh: Mesh) -> Weights:
    """Describes the adapter of a strategy's exit, laid out for decoding; empty if that exit has none."""
    if not _has_adapter(config, strategy):
        return {}

    def make() -> ExitAdapter:
        kernel = jnp.zeros((config.model.width, config.model.width), jnp.bfloat16)
        return ExitAdapter(config.layerskip.draft_exit, OutputMajor(kernel))

    adapter = jax.eval_shape(make)
    return {EXIT_ADAPTER: abstract_arrays(adapter, jax.tree.map(lambda _: NamedSharding(mesh, P()), adapter))}


def _has_adapter(config: Config, strategy: Strategy) -> bool:
    """Returns whether `config` trains an adapter for the exit of a strategy."""
    section = config.layerskip
    return section.exit_adapter != "none" and strategy.settings()["exit_layer"] == section.draft_exit


def _decoder_weights(config: ModelConfig, mesh: Mesh, int8_weights: bool) -> Weights:
    """Describes the decoding weights of a model, with their shardings."""

    def make() -> Weights:
        params = init_params(jax.random.key(0), config)
        return decoder_weights(quantize_params(params) if int8_weights else params, jnp.bfloat16)

    weights = jax.eval_shape(make)
    return abstract_arrays(weights, decoder_weight_shardings(weights, mesh))


def _cache_bytes(config: ModelConfig, shape: DecodeShape, weights: Weights) -> int:
    """Returns the bytes of the KV cache over all devices."""

    def make():
        dtype = cache_dtype(weights, shape.cache)
        return init_cache(config, shape.batch_size, shape.capacity, dtype, shape.kernels)

    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(jax.eval_shape(make)))


def _decode_flops(
    config: Config, strategy: Strategy, prompt_tokens: int, capacity: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the FLOPs (per prompt token of prefill, per sequence and round of the loop), each by kind."""
    c, layers = config.model, strategy.layers_run(config.model.num_layers)
    forward = forward_flops(c, prompt_tokens)
    adapter = 2 * c.width**2 if _has_adapter(config, strategy) else 0
    through_layers = (forward.layers + forward.attention_causal) * layers / c.num_layers
    if isinstance(strategy, SelfSpeculative):
        exit_layer = int(strategy.exit_layer)
        verified_from = 0 if strategy.draft_weights else exit_layer
        drafted = int(strategy.num_speculations)
        per_round = round_flops(c, capacity, exit_layer, drafted, verified_from) + drafted * adapter
        after_prompt = forward.head
    else:
        per_round = round_flops(c, capacity, layers, 1, None) + adapter
        after_prompt = forward.head + adapter
    return {"executed": through_layers + after_prompt / prompt_tokens}, {"executed": per_round}


def compile_ahead(program: LoweredProgram) -> CompileResult:
    """Compiles a program. Reports a lack of memory in the result's `problem` instead of raising."""
    began = time.monotonic()
    try:
        with jax.set_mesh(program.mesh):
            compiled = program.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Ran out of memory" not in str(error):
            raise
        return CompileResult(time.monotonic() - began, problem=str(error))
    text = compiled.as_text()
    assert text is not None  # XLA's executables have one
    return CompileResult(time.monotonic() - began, text, compiled.memory_analysis())


def device_bytes(tree) -> int:
    """Returns the bytes of one device's part of a tree of arrays, or of descriptions of arrays with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _mesh(config: MeshConfig, topology: Topology, size: int) -> Mesh:
    devices = compile_only_devices(topology)
    if size > len(devices):
        raise UserError(f"config.mesh.tensor is {size}, but --topology={topology} has {len(devices)} devices")
    return make_mesh(config, devices[:size])


def _abstract_state(config: Config, mesh: Mesh, execution: Execution) -> TrainState:
    return abstract_arrays(jax.eval_shape(lambda: init_state(config, execution)), state_shardings(config, mesh))


def _abstract_batch(config: Config, mesh: Mesh) -> Batch[jax.ShapeDtypeStruct]:
    t = config.training

    def column(dtype):
        return jax.ShapeDtypeStruct((t.batch_size, t.sequence_length), dtype, sharding=batch_sharding(mesh))

    text = Batch(column(jnp.int32), column(jnp.int32), column(jnp.float32))
    if not config.data.separate_documents:
        return text
    return text._replace(positions=column(jnp.int32), segment_ids=column(jnp.int32))


def _platform(topology: Topology) -> str:
    """Returns JAX's name of the topology's platform."""
    return {"tpu": "tpu", "gpu": "cuda"}[topology.chip.platform]
