"""Decoding loops compiled for TPUs and GPUs: no token copies a weight or a cache."""

import dataclasses
import functools
import math
import re

import pytest

import lsjax
from lsjax.aot import compile_only, hlo
from lsjax.aot.programs import compile_ahead, decode_programs
from lsjax.aot.traffic import _moved, _written, memory_traffic
from lsjax.costs.hardware import parse_topology
from pallas_kernels.kv_cache import gpu, gpu_attend, tpu
from pallas_kernels.kv_cache.reference import CacheUse
from tests.ahead_of_time.test_compile_ahead import shallow

compile_only.prepare()
pytest.importorskip("libtpu", reason="make test-ahead installs it")

# Three layers of Llama-7B's width. Sizes are bytes in bfloat16.
L, D, F, V, C = 3, 4096, 11008, 32000, 1024
PROMPT, NEW = 512, C - 512 - 64
QKV, OUTPUT, GATE_UP, DOWN = 2 * 3 * D * D, 2 * D * D, 2 * 2 * D * F, 2 * F * D
HEAD = 2 * D * V
DRAFTING = lsjax.SelfSpeculative(exit_layer=1, num_speculations=3)
COPYING = dataclasses.replace(DRAFTING, lookup=3)

# Instructions that write no memory, or whose called computations are counted instead.
_NO_WRITE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"}


def cache_array(rows: int) -> int:
    """Returns the bytes of the keys, or of the values, of one layer."""
    return 2 * rows * D * C


def activations(rows: int, strategy) -> int:
    """Returns bytes of float32 logits, q, k, v, gate and up of one pass, with contractions split into four parts."""
    tokens = rows * (1 + (strategy.settings()["num_speculations"] or 0))
    return 4 * tokens * (V + 3 * D + 2 * F) * 4


@functools.cache
def compiled(
    topology: str,
    strategy,
    rows: int,
    in_int8: bool = False,
    kernels: str = "off",
    ways: int = 1,
    cache: str = "auto",
):
    config = shallow(model={"num_layers": L}, mesh={"tensor": ways})
    c = config.model
    assert (c.width, c.num_kv_heads * c.head_width, c.feed_forward_width, c.vocab_size) == (D, D, F, V)
    _, loop = decode_programs(
        config,
        parse_topology(topology),
        strategy,
        rows,
        PROMPT,
        NEW,
        int8_weights=in_int8,
        kernels=kernels,
        cache=cache,
    )
    result = compile_ahead(loop)
    return hlo.parse(result.text), result.memory


def inside_loops(program: hlo.Program, computation: str, within: bool = False):
    """Yields (computation, instruction) for every instruction inside a loop."""
    for instruction in program.computations[computation].values():
        if within:
            yield computation, instruction
        if instruction.opcode == "while":
            body = re.search(r"body=%?([\w.\-]+)", instruction.attributes)[1]
            yield from inside_loops(program, body, within=True)
        elif instruction.opcode in ("conditional", "call", "async-start"):
            for name in instruction.called():
                yield from inside_loops(program, name, within)


def written(program: hlo.Program, computation: str, instruction: hlo.Instruction) -> int:
    """Returns the bytes of main memory that an instruction writes.

    An update in place counts the part that it replaces. A transfer into a TPU's fast memory and back is no copy.
    """
    operands = program.computations[computation]
    if instruction.opcode in _NO_WRITE or instruction.opcode.endswith("-start"):
        return 0
    if instruction.opcode == "copy-done":
        to, source = hlo.top_level(operands[instruction.operands[0]].shape)[:2]
        return min(hlo.size(shape, main_memory_only=True) for shape in (to, source))
    if instruction.opcode == "dynamic-update-slice":
        return hlo.size(operands[instruction.operands[1]].shape, main_memory_only=True)
    if instruction.opcode == "fusion":
        return int(_written(program, program.computations[instruction.called()[0]], instruction.shape))
    return hlo.size(instruction.shape, main_memory_only=True)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("strategy", [lsjax.Autoregressive(), DRAFTING], ids=lambda s: s.name)
@pytest.mark.parametrize("topology", ["gpu:h100:1x1", "gpu:a100-80:1x1", "tpu:v5e:1x1"])
def test_a_loop_copies_no_weight_and_no_cache(topology, strategy, rows):
    """The loop writes nothing as large as the smallest weight or cache, and holds no second cache."""
    program, memory = compiled(topology, strategy, rows)
    smallest = min(cache_array(rows), OUTPUT)
    work = list(inside_loops(program, program.entry))
    # Proves that the loop itself was examined: it holds every layer's cache updates.
    updates = [i for c, i in work if hlo.size(i.shape) >= cache_array(rows) and written(program, c, i) < smallest]
    assert len(updates) >= 2 * L
    large = [(i.opcode, i.shape, i.operation) for c, i in work if written(program, c, i) >= smallest]
    assert not large
    assert memory.alias_size_in_bytes >= 2 * L * cache_array(rows)
    allowed = activations(rows, strategy)
    assert allowed < smallest  # or a copy would go unseen
    if topology.startswith("tpu"):
        # XLA:TPU converts caches to layouts of its own once per call.
        allowed += 2 * L * cache_array(rows)
    elif strategy is DRAFTING and rows == 1:
        # XLA:GPU converts the caches of the drafting layers to another layout once per call.
        allowed += 2 * strategy.exit_layer * cache_array(rows)
    assert memory.temp_size_in_bytes < allowed


@pytest.mark.parametrize("topology", ["gpu:h100:1x1", "tpu:v5e:1x1"])
def test_with_prompt_lookup_the_caches_of_the_drafting_layers_alone_are_copied(topology):
    """XLA converts their keys between the layouts that drafting rounds and copying rounds use."""
    program, memory = compiled(topology, COPYING, 1)
    work = list(inside_loops(program, program.entry))
    large = [hlo.size(i.shape) for c, i in work if written(program, c, i) >= min(cache_array(1), OUTPUT)]
    assert 0 < len(large) <= 2 * COPYING.exit_layer
    assert {*large} == {cache_array(1)}
    assert memory.alias_size_in_bytes >= 2 * L * cache_array(1)


KERNELS = ("kv_write", "decode_attend", "decode_combine")  # the last on GPU alone


def kernels_in_place(
    program: hlo.Program, memory, rows: int, ways: int = 1, caches: int | None = None
) -> tuple[dict[str, int], list[hlo.Instruction]]:
    """Returns the number of kernels in the loop by name, and the instructions of those that write.

    Fails if anything else in the loop writes as much as a device's part of a cache or weight, or if a cache is held
    twice.
    """
    work = [(c, i) for c, i in inside_loops(program, program.entry) if not i.opcode.endswith("-done")]
    smallest = min(cache_array(rows), OUTPUT) // ways
    rest = [(c, i) for c, i in work if not is_kernel(i, "kv_write")]
    assert not [(i.opcode, i.shape, i.operation) for c, i in rest if written(program, c, i) >= smallest]
    caches = caches or 2 * L * cache_array(rows) // ways
    assert caches <= memory.alias_size_in_bytes < caches + 2**20
    counts = {name: sum(is_kernel(i, name) for _, i in work) for name in KERNELS}
    return counts, [i for _, i in work if is_kernel(i, "kv_write")]


IN_INT8_CACHE = [
    ("tpu:v5e:1x1", lsjax.Autoregressive(), 1),
    ("gpu:h100:1x1", lsjax.Autoregressive(), 1),
    ("gpu:a100-80:1x1", DRAFTING, 1),
]


@pytest.mark.parametrize(("topology", "strategy", "rows"), IN_INT8_CACHE, ids=str)
def test_a_loop_with_kernels_and_a_cache_in_int8(topology, strategy, rows):
    """Values and scales are updated in place and held once, with 132 bytes per entry instead of 256.

    The rest of the program moves as many bytes as it does with a bfloat16 cache.
    """
    program, memory = compiled(topology, strategy, rows, kernels="on", cache="int8")
    counts, writes = kernels_in_place(program, memory, rows, caches=2 * L * rows * 32 * C * (128 + 4))
    assert counts["kv_write"] == counts["decode_attend"] == passes(strategy)
    arrays = 2 if topology.startswith("tpu") else 4
    aliases = ", ".join(f"{{{index}}}: ({3 + index}, {{}})" for index in range(arrays))
    assert all(f"output_to_operand_aliasing={{{aliases}}}" in i.attributes for i in writes)
    of_cache = [f"[{rows},32,{C},256]", f"[{rows},32,{C},128]", f"[{rows},32,2,{C}]", f"[{rows},32,{C}]"]
    made = [i for c in program.computations.values() for i in c.values() if any(of in i.shape for of in of_cache)]
    assert {i.opcode for i in made} <= _NO_WRITE | {"custom-call"}
    exact, _ = compiled(topology, strategy, rows, kernels="on")
    assert abs(beside_kernels(program) - beside_kernels(exact)) < 1e6
    module = tpu if topology.startswith("tpu") else gpu
    use = CacheUse(rows, 32, 128, C, PROMPT + NEW // 2, 1, "int8")
    assert sum(module.bytes_moved(use)) < 0.56 * sum(module.bytes_moved(use._replace(dtype="bfloat16")))


def beside_kernels(program: hlo.Program) -> float:
    """Returns the bytes that everything except the kernels moves."""
    rest, owners = memory_traffic(program), {id(i): c for c in program.computations.values() for i in c.values()}
    for instruction, times in program.runs():
        if any(is_kernel(instruction, name) for name in KERNELS):
            rest -= times * _moved(program, owners[id(instruction)], instruction)
    return rest


def test_plain_jax_reads_a_cache_in_int8_as_it_is():
    """XLA:GPU never writes a cache as floating-point numbers, and our kernels start no more kernels than it does."""
    program, _ = compiled("gpu:h100:1x1", lsjax.Autoregressive(), 1, cache="int8")
    caches = 2 * L * 32 * C * (128 + 4)
    once = L * (QKV + OUTPUT + GATE_UP + DOWN) + HEAD + caches
    assert once < memory_traffic(program) < 1.03 * once
    work = list(inside_loops(program, program.entry))
    assert not [(i.opcode, i.shape) for c, i in work if written(program, c, i) >= cache_array(1) // 4]
    kernels, _ = compiled("gpu:h100:1x1", lsjax.Autoregressive(), 1, kernels="on", cache="int8")
    use = CacheUse(1, 32, 128, C, PROMPT, 1, "int8")
    assert starts(kernels) - starts(program) <= passes(lsjax.Autoregressive()) * gpu.extra_kernels(use) == 0


def is_kernel(instruction: hlo.Instruction, name: str) -> bool:
    return instruction.opcode == "custom-call" and instruction.operation.endswith(f"{name}/pallas_call")


def passes(strategy) -> int:
    """Counts the passes through a layer that are written in the program.

    The loop over drafts and the pass for the last draft each hold the early layers once; verification holds the others.
    """
    return L if strategy == lsjax.Autoregressive() else 2 * strategy.exit_layer + L - strategy.exit_layer


@pytest.mark.parametrize(
    ("topology", "strategy", "rows"),
    [
        ("tpu:v5e:1x1", lsjax.Autoregressive(), 1),
        ("tpu:v5e:1x1", DRAFTING, 4),
        ("tpu:v5p:1x1x1", DRAFTING, 1),
        ("tpu:v6e:1x1", DRAFTING, 1),
    ],
    ids=str,
)
def test_a_loop_with_kernels_copies_no_weight_and_no_cache(topology, strategy, rows):
    """Only kernels update the cache, in place. It is held once and not moved before or after the loop either."""
    program, memory = compiled(topology, strategy, rows, kernels="on")
    counts, writes = kernels_in_place(program, memory, rows)
    assert counts["kv_write"] == counts["decode_attend"] == passes(strategy)
    assert all("output_to_operand_aliasing={{}: (2, {})}" in i.attributes for i in writes)
    packed = f"bf16[{rows},32,{C},256]"
    makers = {i.opcode for c in program.computations.values() for i in c.values() if i.shape.startswith(packed)}
    assert makers <= {"parameter", "get-tuple-element", "bitcast", "custom-call"}
    assert memory.temp_size_in_bytes < 3 * activations(rows, strategy)


ON_GPU = [
    ("gpu:h100:1x1", lsjax.Autoregressive(), 1),
    ("gpu:h100:1x1", DRAFTING, 4),
    ("gpu:a100-80:1x1", DRAFTING, 1),
]


@pytest.mark.parametrize(("topology", "strategy", "rows"), ON_GPU, ids=str)
def test_a_loop_with_gpu_kernels_copies_no_weight_and_no_cache(topology, strategy, rows):
    """A drafting loop also converts no cache to another layout, which plain JAX does."""
    program, memory = compiled(topology, strategy, rows, kernels="on")
    counts, writes = kernels_in_place(program, memory, rows)
    assert counts == dict.fromkeys(KERNELS, passes(strategy))
    assert all("output_to_operand_aliasing={{0}: (3, {}), {1}: (4, {})}" in i.attributes for i in writes)
    one = f"bf16[{rows},32,{C},128]"
    makers = {i.opcode for c in program.computations.values() for i in c.values() if i.shape.startswith(one)}
    assert makers <= {"parameter", "get-tuple-element", "bitcast"}  # the kernels return pairs
    queries = math.prod(gpu_attend.padded_queries(1 + (strategy.settings()["num_speculations"] or 0), 1))
    partials = rows * 32 * (C // gpu_attend.SPLIT) * queries * (128 + 2) * 4
    assert memory.temp_size_in_bytes < activations(rows, strategy) + partials < min(cache_array(rows), OUTPUT)


@pytest.mark.parametrize("topology", ["gpu:h100:1x1", "gpu:a100-80:1x1"])
def test_with_prompt_lookup_gpu_kernels_copy_no_cache_either(topology):
    """Kernels fix the layout of the caches, so drafting rounds and copying rounds share it."""
    program, _ = compiled(topology, COPYING, 1, kernels="on")
    work = [(c, i) for c, i in inside_loops(program, program.entry) if not is_kernel(i, "kv_write")]
    assert not [(i.opcode, i.shape) for c, i in work if written(program, c, i) >= min(cache_array(1), OUTPUT)]


@pytest.mark.parametrize(("topology", "strategy", "rows"), ON_GPU, ids=str)
def test_a_loop_with_gpu_kernels_moves_fewer_bytes(topology, strategy, rows):
    """The whole program moves fewer bytes than plain JAX, and starts no more kernels than the choice assumes.

    Bytes of the kernels are their own estimates for sequences of average length; the rest is counted in the program.
    """
    program, _ = compiled(topology, strategy, rows, kernels="on")
    plain, _ = compiled(topology, strategy, rows)
    rest, owners = memory_traffic(program), {id(i): c for c in program.computations.values() for i in c.values()}
    for instruction, times in program.runs():
        if any(is_kernel(instruction, name) for name in KERNELS):
            rest -= times * _moved(program, owners[id(instruction)], instruction)
    use = CacheUse(rows, 32, 128, C, PROMPT + NEW // 2, 1, "bfloat16")
    drafts, early = (strategy.settings()["num_speculations"] or 0), (strategy.settings()["exit_layer"] or 0)
    by_one, verifying = sum(gpu.bytes_moved(use)), sum(gpu.bytes_moved(use._replace(tokens=1 + drafts)))
    kernels = (drafts + 1) * early * by_one + (L - early) * verifying
    assert rest + kernels < memory_traffic(plain)
    assert starts(program) - starts(plain) <= passes(strategy) * gpu.extra_kernels(use)


def starts(program: hlo.Program) -> int:
    """Counts kernel launches in one iteration of every loop."""
    work = (i.opcode for _, i in inside_loops(program, program.entry))
    return len([opcode for opcode in work if opcode not in _NO_WRITE and not opcode.endswith("-done")])


def test_a_loop_with_kernels_moves_fewer_bytes():
    """The kernels fetch less than plain JAX, which reads whole caches; the rest of both programs moves the same.

    Bytes of the kernels are what their DMAs fetch for a sequence of average length.
    """
    rows, tokens = 1, 1
    plain, _ = compiled("tpu:v5e:1x1", lsjax.Autoregressive(), rows)
    program, _ = compiled("tpu:v5e:1x1", lsjax.Autoregressive(), rows, kernels="on")
    rest = memory_traffic(program)
    for computation, instruction in inside_loops(program, program.entry):
        if is_kernel(instruction, "kv_write") or is_kernel(instruction, "decode_attend"):
            rest -= _moved(program, program.computations[computation], instruction)
    kernels = L * sum(tpu.bytes_moved(CacheUse(rows, 32, 128, C, PROMPT + NEW // 2, tokens, "bfloat16")))
    weights = L * (QKV + OUTPUT + GATE_UP + DOWN) + HEAD
    assert weights < rest < 1.01 * weights
    caches = 2 * L * cache_array(rows)
    assert kernels < 0.8 * caches
    assert rest + caches < memory_traffic(plain)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("topology", ["gpu:h100:1x1", "gpu:a100-80:1x1"])
def test_a_token_reads_each_weight_and_each_cache_once(topology, rows):
    program, _ = compiled(topology, lsjax.Autoregressive(), rows)
    once = L * (QKV + OUTPUT + GATE_UP + DOWN + 2 * cache_array(rows)) + HEAD
    assert once < memory_traffic(program) < 1.03 * once


IN_INT8 = [(lsjax.Autoregressive(), True), (dataclasses.replace(DRAFTING, draft_weights="int8"), False)]


@pytest.mark.parametrize(("strategy", "in_int8"), IN_INT8, ids=["int8_model", "int8_drafts"])
@pytest.mark.parametrize("topology", ["gpu:h100:1x1", "gpu:a100-80:1x1", "tpu:v5e:1x1"])
def test_int8_weights_are_read_as_they_are(topology, strategy, in_int8):
    """int8 weights are converted inside the matmul: the loop never writes their floating-point values."""
    program, _ = compiled(topology, strategy, 1, in_int8)
    work = list(inside_loops(program, program.entry))
    quarter = D * D // 4  # entries in a quarter of the smallest weight, which a TPU may process in four parts
    if in_int8:
        made = [(i.shape, i.operation) for c, i in work if i.opcode not in _NO_WRITE and makes_floats(i, quarter)]
        assert not [found for found in made if f"[1,32,{C},128]" not in found[0]]  # caches are no weights
    assert not [i.shape for c, i in work if written(program, c, i) >= D * D]
    read = [i for c, i in work for name in i.operands if "s8[" in shape_of(program, c, name)]
    layers = L if in_int8 else strategy.exit_layer
    assert len(read) >= 4 * layers + 1


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("topology", ["gpu:h100:1x1", "gpu:a100-80:1x1"])
def test_int8_weights_are_half_the_bytes(topology, rows):
    """Counts the bytes of an int8 model, and of int8 drafts beside a verifying pass that reads bfloat16 weights."""
    layer, head = (QKV + OUTPUT + GATE_UP + DOWN) // 2, HEAD // 2
    caches = 2 * cache_array(rows)

    def int8_pass(layers: int) -> int:
        return layers * (layer + caches) + head

    moved = memory_traffic(compiled(topology, lsjax.Autoregressive(), rows, in_int8=True)[0])
    assert int8_pass(L) < moved < 1.05 * int8_pass(L)
    strategy = IN_INT8[1][0]
    once = strategy.num_speculations * int8_pass(strategy.exit_layer) + L * (2 * layer + caches) + 2 * head
    assert once < memory_traffic(compiled(topology, strategy, rows)[0]) < 1.08 * once


def makes_floats(instruction: hlo.Instruction, entries: int) -> bool:
    return any(
        dtype in ("bf16", "f32") and math.prod(sizes) >= entries for dtype, sizes, _ in hlo.arrays(instruction.shape)
    )


def shape_of(program: hlo.Program, computation: str, name: str) -> str:
    found = program.computations[computation].get(name)
    return found.shape if found else ""
