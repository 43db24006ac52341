"""The kernels as Mosaic compiles them for TPUs and Triton for GPUs.

Tiles and DMAs are legal, blocks fit into on-chip memory, caches are updated in place, and nothing moves needlessly.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lsjax.aot import compile_only
from lsjax.benchmarks.kernels import KernelCase, implementations, make_arrays, repeated_calls, single_call
from lsjax.costs.hardware import parse_topology
from pallas_kernels.kv_cache import gpu_attend, gpu_write, tpu_attend, tpu_write
from pallas_kernels.kv_cache.int8 import Int8

compile_only.prepare()
pytest.importorskip("libtpu", reason="make test-ahead installs it")

GPUS = ["gpu:a100-80:1x1", "gpu:h100:1x1"]
TARGETS = ["tpu:v5e:1x1", "tpu:v5p:1x1x1", "tpu:v6e:1x1"]


def compiled(topology: str, function, *shapes, donate=()):
    mesh = Mesh(np.array(compile_only.compile_only_devices(parse_topology(topology))[:1]), ("one",))
    here = NamedSharding(mesh, PartitionSpec())
    shapes = [jax.ShapeDtypeStruct(shape, dtype, sharding=here) for shape, dtype in shapes]
    platform = {"tpu": "tpu", "gpu": "cuda"}[topology.partition(":")[0]]
    with jax.set_mesh(mesh):  # pl.multiple_of asks which TPU it is for
        return jax.jit(function, donate_argnums=donate).trace(*shapes).lower(lowering_platforms=(platform,)).compile()


def copies(text: str, size: int) -> list[str]:
    """Returns the shapes of HLO copies with at least `size` elements."""
    found = re.findall(r"= \S*?\[([\d,]+)\]\S* copy(?:-start)?\(.*", text)
    return [shape for shape in found if np.prod([int(n) for n in shape.split(",")]) >= size]


def write_for_a_while(cache, new, positions, until):
    """Calls the kernel inside a loop: XLA:TPU refuses an array pinned to HBM as the output of a whole program."""

    def step(carry):
        count, cache = carry
        return count + 1, tpu_write.write(cache, new, positions + count)

    return jax.lax.while_loop(lambda carry: carry[0] < until, step, (0, cache))


# Sequences, KV heads, capacity, head width, tokens. The last two cases use the most semaphores and the most VMEM.
WRITES = [
    (4, 8, 4096, 128, 1),
    (1, 32, 4096, 128, 5),
    (3, 1, 1024, 64, 16),
    (8, 3, 1024, 64, 2),
    (512, 1, 512, 64, 1),
    (64, 32, 512, 128, 1),
]


@pytest.mark.parametrize("shape", WRITES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("topology", TARGETS)
def test_write_moves_no_cache(topology, dtype, shape):
    rows, heads, capacity, width, tokens = shape
    cache = (rows, heads, capacity, 2 * width)
    new = (rows, heads, tokens, 2 * width)
    arrays = [(cache, dtype), (new, dtype), ((rows,), "int32"), ((), "int32")]
    program = compiled(topology, write_for_a_while, *arrays, donate=0)
    memory, size = program.memory_analysis(), np.prod(cache) * jnp.dtype(dtype).itemsize
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < min(size, 4 << 20)
    assert not copies(program.as_text(), np.prod(cache))
    assert "kv_write" in program.as_text()


# Sequences, KV heads, queries per KV head, capacity, head width, tokens. The last case uses the most VMEM.
ATTENDS = [
    (4, 8, 4, 4096, 128, 1),
    (1, 32, 1, 1024 + 96, 128, 5),
    (3, 1, 3, 256, 64, 16),
    (2, 3, 3, 1024, 64, 2),
    (1, 32, 8, 1024, 128, 16),
]


@pytest.mark.parametrize("shape", ATTENDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("topology", TARGETS)
def test_attend_moves_no_cache(topology, dtype, shape):
    """The kernel needs memory only for its queries and results, padded to whole tiles, beside the cache."""
    rows, heads, group, capacity, width, tokens = shape
    cache = (rows, heads, capacity, 2 * width)
    arrays = [((rows, tokens, heads, group, width), dtype), (cache, dtype), ((rows,), "int32")]
    program = compiled(topology, tpu_attend.attend, *arrays)
    queries = rows * heads * (tokens * group + 15) * 128 * jnp.dtype(dtype).itemsize
    assert program.memory_analysis().temp_size_in_bytes < max(2 * queries, 1 << 19)
    assert not copies(program.as_text(), np.prod(cache))
    assert "decode_attend" in program.as_text()


@pytest.mark.parametrize(("rows", "heads", "capacity", "width", "tokens"), [(4, 8, 4096, 128, 1), (3, 1, 1000, 32, 16)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("topology", GPUS)
def test_a_gpu_writes_in_place(topology, dtype, rows, heads, capacity, width, tokens):
    cache, new = ((rows, heads, capacity, width), dtype), ((rows, tokens, heads, width), dtype)
    program = compiled(topology, gpu_write.write, cache, cache, new, new, ((rows,), "int32"), donate=(0, 1))
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == 2 * np.prod(cache[0]) * jnp.dtype(dtype).itemsize
    assert memory.temp_size_in_bytes == 0
    assert not copies(program.as_text(), np.prod(cache[0]))
    assert "kv_write" in program.as_text()


# Same columns as ATTENDS. The last two cases have the most and the widest queries that shared memory must hold.
GPU_ATTENDS = [(4, 8, 4, 4096, 128, 1), (2, 3, 3, 1000, 64, 2), (1, 8, 8, 1024, 128, 16), (1, 2, 128, 300, 128, 1)]


@pytest.mark.parametrize("shape", GPU_ATTENDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("topology", GPUS)
def test_attention_on_gpu_fits_and_moves_no_cache(topology, dtype, shape):
    """The program is two kernels. Between them it stores a float32 result per split and padded query."""
    rows, heads, group, capacity, width, tokens = shape
    cache = ((rows, heads, capacity, width), dtype)
    arrays = [((rows, tokens, heads, group, width), dtype), cache, cache, ((rows,), "int32")]
    program = compiled(topology, gpu_attend.attend, *arrays)
    splits, queries = -(-capacity // gpu_attend.SPLIT), np.prod(gpu_attend.padded_queries(tokens, group))
    partials = rows * heads * splits * queries * (width + 2) * 4
    assert program.memory_analysis().temp_size_in_bytes <= partials + 1024
    entry = program.as_text().partition("ENTRY")[2]
    assert re.findall(r"custom-call.*/(\w+)/pallas_call", entry) == ["decode_attend", "decode_combine"]
    assert not re.search(r" (fusion|copy|transpose)\(", entry)


def int8(*sizes, scale):
    """Returns values and scales, each as (shape, dtype)."""
    return (sizes, "int8"), (scale, "float32")


def write_in_int8_for_a_while(values, scale, new, new_scale, positions, until):
    return write_for_a_while(Int8(values, scale), Int8(new, new_scale), positions, until)


# Same columns as WRITES. TPUs other than v5e compile the first case only.
INT8_WRITES = [("tpu:v5e:1x1", shape) for shape in (*WRITES[:4], WRITES[5])]
INT8_WRITES += [(topology, WRITES[0]) for topology in TARGETS[1:]]


@pytest.mark.parametrize(("topology", "shape"), INT8_WRITES)
def test_write_in_int8_moves_neither_values_nor_scales(topology, shape):
    rows, heads, capacity, width, tokens = shape
    cache = int8(rows, heads, capacity, 2 * width, scale=(rows, heads, 2, capacity))
    new = int8(rows, heads, tokens, 2 * width, scale=(rows, heads, 2, tokens))
    arrays = [*cache, *new, ((rows,), "int32"), ((), "int32")]
    program = compiled(topology, write_in_int8_for_a_while, *arrays, donate=(0, 1))
    memory, entries = program.memory_analysis(), rows * heads * capacity
    assert memory.alias_size_in_bytes == entries * 2 * (width + 4)
    assert memory.temp_size_in_bytes < entries * 2 * 4
    assert not copies(program.as_text(), entries * 2)
    assert "kv_write" in program.as_text()


def attend_in_int8_on_tpu(q, values, scale, positions):
    return tpu_attend.attend(q, Int8(values, scale), positions)


INT8_ATTENDS = [("tpu:v5e:1x1", (1, 32, 1, 1024 + 128, 128, 5)), *(("tpu:v5e:1x1", shape) for shape in ATTENDS[2:])]
INT8_ATTENDS += [(topology, ATTENDS[3]) for topology in TARGETS[1:]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("topology", "shape"), INT8_ATTENDS)
def test_attend_in_int8_converts_no_cache(topology, shape, dtype):
    rows, heads, group, capacity, width, tokens = shape
    cache = int8(rows, heads, capacity, 2 * width, scale=(rows, heads, 2, capacity))
    arrays = [((rows, tokens, heads, group, width), dtype), *cache, ((rows,), "int32")]
    program = compiled(topology, attend_in_int8_on_tpu, *arrays)
    queries = rows * heads * (tokens * group + 15) * 128 * jnp.dtype(dtype).itemsize
    assert program.memory_analysis().temp_size_in_bytes < max(2 * queries, 1 << 19)
    assert f"{rows},{heads},2,{capacity}" not in copies(program.as_text(), rows * heads * 2 * capacity)
    assert not copies(program.as_text(), rows * heads * capacity * 2 * width)
    assert "decode_attend" in program.as_text()


def write_in_int8_on_gpu(k, k_scale, v, v_scale, *others):
    return gpu_write.write(Int8(k, k_scale), Int8(v, v_scale), *others)


def attend_in_int8_on_gpu(q, k, k_scale, v, v_scale, positions):
    return gpu_attend.attend(q, Int8(k, k_scale), Int8(v, v_scale), positions)


@pytest.mark.parametrize(("dtype", "shape"), [("bfloat16", GPU_ATTENDS[1]), ("float32", GPU_ATTENDS[3])])
@pytest.mark.parametrize("topology", GPUS)
def test_int8_on_gpu_is_written_in_place_and_fits(topology, dtype, shape):
    """Writing is one kernel, which rounds what it stores. Attention is two kernels. Nothing else runs."""
    rows, heads, group, capacity, width, tokens = shape
    side = int8(rows, heads, capacity, width, scale=(rows, heads, capacity))
    new = ((rows, min(tokens, 16), heads, width), dtype)
    writing = compiled(topology, write_in_int8_on_gpu, *side, *side, new, new, ((rows,), "int32"), donate=(0, 1, 2, 3))
    assert writing.memory_analysis().alias_size_in_bytes == 2 * rows * heads * capacity * (width + 4)
    attending = compiled(
        topology, attend_in_int8_on_gpu, ((rows, tokens, heads, group, width), dtype), *side, *side, ((rows,), "int32")
    )
    kernels = []
    for program in (writing, attending):
        entry = program.as_text().partition("ENTRY")[2]
        kernels += re.findall(r"custom-call.*/(\w+)/pallas_call", entry)
        assert not re.search(r" (fusion|copy|transpose)\(", entry)
    assert kernels == ["kv_write", "decode_attend", "decode_combine"]
    assert writing.memory_analysis().temp_size_in_bytes == 0


def run_flat(program, tree, *leaves):
    return program(*tree.unflatten(leaves))


@pytest.mark.parametrize("topology", [*GPUS, "tpu:v5e:1x1"])
def test_what_the_benchmark_runs_compiles(topology):
    """Every implementation, including the plain JAX ones, compiles for the cache of one layer and for those of two."""
    case = KernelCase(
        batch_size=2, tokens=1, length=300, capacity=512, num_kv_heads=8, group=4, head_width=128, dtype="bfloat16"
    )
    found = list(implementations(case, topology.partition(":")[0]))
    assert len(found) == 6
    arrays = jax.eval_shape(lambda: make_arrays(case))
    for each in found:
        one = jax.eval_shape(each.prepare, arrays)
        for program, arguments in ((single_call(each), one), (repeated_calls(each, 2), [(a, a) for a in one])):
            inputs, tree = jax.tree.flatten(tuple(arguments))
            shapes = [(a.shape, a.dtype) for a in inputs]
            text = compiled(topology, functools.partial(run_flat, program, tree), *shapes).as_text()
            if each.by in ("gpu", "tpu"):
                assert {"write": "kv_write", "attend": "decode_attend"}[each.operation] in text
