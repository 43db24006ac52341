"""Measures the KV cache's kernels by themselves, against plain JAX and against the attention that JAX ships.

Without an accelerator nothing is measured. The report then holds the bytes that each implementation moves, and the time
that these take at a chip's bandwidth.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lsjax.costs.hardware import CHIPS, Chip, chip_of
from lsjax.errors import UserError
from pallas_kernels.kv_cache import interface as kv_cache

SHIPPED = "jax.nn"  # jax.nn.dot_product_attention, compiled by XLA
SHIPPED_KERNEL = "jax Pallas"  # jax.experimental.pallas.ops gpu.decode_attention or tpu.paged_attention; only for T = 1
DTYPES = ("bfloat16", "float32", "int8")
_PAGE = 16  # entries per page of paged_attention, the fewest that it supports
_CALLS = 64  # calls per timed program, about
_COLD_BYTES = 256 << 20  # more than any chip's own memory holds

Carry = Any  # what a call replaces: the cache when writing, the queries when attending
Constants = tuple[Any, ...]  # what a call only reads


class KernelCase(NamedTuple):
    """The sizes of one measurement: T tokens per sequence are written to, or attend to, the caches of B sequences.

    batch_size, tokens, capacity, num_kv_heads, group, head_width: B, T, C, K, G and H.
    length: filled entries per sequence. dtype: of the cache and the computation; "int8" is of the cache alone, which
        is then computed with in bfloat16.
    """

    batch_size: int
    tokens: int
    length: int
    capacity: int
    num_kv_heads: int
    group: int
    head_width: int
    dtype: str

    @property
    def compute_dtype(self) -> str:
        """The dtype of queries and of new keys and values."""
        return "bfloat16" if self.dtype == "int8" else self.dtype

    @property
    def use(self) -> kv_cache.CacheUse:
        """The same sizes, as kernels are chosen by them."""
        return kv_cache.CacheUse(
            batch_size=self.batch_size,
            num_kv_heads=self.num_kv_heads,
            head_width=self.head_width,
            capacity=self.capacity,
            mean_length=self.length,
            tokens=self.tokens,
            dtype=jnp.dtype(self.dtype),
            group=self.group,
        )


class Arrays(NamedTuple):
    """Inputs of all implementations, in one layout.

    k, v: contents of a cache [B, C, K, H]. new_k, new_v: new tokens [B, T, K, H]. q: queries [B, T, K, G, H].
    positions: the entry of the first new token [B].
    """

    k: jax.Array
    v: jax.Array
    new_k: jax.Array
    new_v: jax.Array
    q: jax.Array
    positions: jax.Array


class Implementation(NamedTuple):
    """An implementation of one operation on the cache.

    operation: "write" or "attend". by: plain JAX, our kernels, or what JAX ships.
    prepare: converts the inputs to its own layout. run: the operation; called again on what it returned.
    bytes_moved: bytes that one call reads and writes in memory.
    """

    operation: str
    by: str
    prepare: Callable[[Arrays], tuple[Carry, Constants]]
    run: Callable[[Carry, Constants], Carry]
    bytes_moved: int


def benchmark_kernels(
    cases: Sequence[KernelCase],
    chip: str | None = None,
    repeats: int = 5,
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measures every implementation of writing and attending for every case: {device, chip, measured, runs}.

    chip: a name of CHIPS whose bandwidth is the peak; None takes this device's, or an H100's without an accelerator.
    repeats: measurements of each implementation, which take turns. note: receives lines of progress.

    A program makes many calls in succession, on the caches of several layers, as a model would. Times are medians over
    the repeats. `largest_difference` compares with plain JAX's result.
    """
    for case in cases:
        _check(case)
    if chip and chip not in CHIPS:
        raise UserError(f"chip is {chip!r}; it must be one of {', '.join(CHIPS)}")
    if repeats < 1:
        raise UserError(f"repeats must be at least 1, got {repeats}")
    platform, device = jax.default_backend(), jax.devices()[0].device_kind
    measured = platform != "cpu"
    known = CHIPS[chip] if chip else chip_of(device) if measured else CHIPS["gpu:h100"]
    runs = []
    for index, case in enumerate(cases, 1):
        note(f"{'measuring' if measured else 'counting'} {index}/{len(cases)}: {case}")
        found = list(implementations(case, platform if measured or known is None else known.platform))
        times = measure(case, found, repeats) if measured else [(None, None)] * len(found)
        for implementation, (seconds, difference) in zip(found, times, strict=True):
            runs.append(_run_report(case, implementation, known, seconds, difference))
    return {
        "device": f"{device} ({platform})",
        "chip": known.name if known else None,
        "jax_version": jax.__version__,
        "measured": measured,
        "runs": runs,
    }


def _check(case: KernelCase) -> None:
    if case.dtype not in DTYPES:
        raise UserError(f"dtype is {case.dtype!r}; it must be one of {', '.join(DTYPES)}")
    if min(case[:-1]) < 1:
        raise UserError(f"sizes must be at least 1, got {case}")
    if not case.tokens <= case.length <= case.capacity:
        raise UserError(f"length {case.length} must be {case.tokens} (tokens) to {case.capacity} (capacity)")


def implementations(case: KernelCase, platform: str) -> Iterator[Implementation]:
    """Lists the implementations of writing, then of attending. Plain JAX comes first, and others are compared with it.

    What JAX ships cannot read int8, and so reads the cache in the compute dtype.
    """
    kernels = kv_cache.choose("on", platform, case.use).name
    for index, (operation, run) in enumerate((("write", _write), ("attend", _attend))):
        for name in dict.fromkeys((kv_cache.PLAIN, kernels)):
            moved = kv_cache.KERNELS[name].bytes_moved(case.use)[index]
            yield Implementation(operation, name, functools.partial(_prepare, case, name, operation), run, moved)
    unquantized = case.use._replace(dtype=case.compute_dtype)
    whole = kv_cache.KERNELS[kv_cache.PLAIN].bytes_moved(unquantized)[1]
    yield Implementation("attend", SHIPPED, _prepare_for_xla, _attend_by_xla, whole)
    if case.tokens != 1 or case.capacity % 256:
        return
    moved = unquantized.cache_bytes(case.length)
    if platform == "gpu":
        yield Implementation("attend", SHIPPED_KERNEL, _prepare_by_head, _attend_by_decode_attention, moved)
    if platform == "tpu":
        yield Implementation("attend", SHIPPED_KERNEL, _prepare_by_page, _attend_by_paged_attention, moved)


def make_arrays(case: KernelCase) -> Arrays:
    """Returns random inputs. The new tokens are the last `tokens` of the filled entries."""
    entries = (case.batch_size, case.capacity, case.num_kv_heads, case.head_width)
    new = (case.batch_size, case.tokens, case.num_kv_heads, case.head_width)
    shapes = entries, entries, new, new, (*new[:3], case.group, case.head_width)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    k, v, new_k, new_v, q = (
        jax.random.normal(key, shape, case.compute_dtype) for key, shape in zip(keys, shapes, strict=True)
    )
    return Arrays(k, v, new_k, new_v, q, positions=jnp.full(case.batch_size, case.length - case.tokens, jnp.int32))


def _prepare(case: KernelCase, kernels: str, operation: str, arrays: Arrays) -> tuple[Carry, Constants]:
    empty = kv_cache.init_layer_cache(
        case.batch_size, case.num_kv_heads, case.capacity, case.head_width, case.dtype, kernels
    )
    cache = kv_cache.fill(empty, arrays.k, arrays.v)
    if operation == "attend":
        return arrays.q, (cache, arrays.positions)
    return cache, (arrays.new_k, arrays.new_v, arrays.positions)


def _write(cache: Carry, constants: Constants) -> Carry:
    k, v, positions = constants
    return kv_cache.write(cache, k, v, positions)


def _attend(q: Carry, constants: Constants) -> Carry:
    cache, positions = constants
    return kv_cache.attend(q, cache, positions)


def _prepare_for_xla(arrays: Arrays) -> tuple[Carry, Constants]:
    return arrays.q, (arrays.k, arrays.v, arrays.positions)


def _attend_by_xla(q: Carry, constants: Constants) -> Carry:
    k, v, positions = constants
    batch, tokens, heads, group, width = q.shape
    seen = positions[:, None] + jnp.arange(tokens)
    mask = (jnp.arange(k.shape[1]) <= seen[..., None])[:, None]
    mixed = jax.nn.dot_product_attention(q.reshape(batch, tokens, heads * group, width), k, v, mask=mask)
    return mixed.reshape(q.shape)


def _prepare_by_head(arrays: Arrays) -> tuple[Carry, Constants]:
    k, v = (a.swapaxes(1, 2).reshape(-1, a.shape[1], a.shape[3]) for a in (arrays.k, arrays.v))
    return arrays.q, (k, v, arrays.positions)


def _attend_by_decode_attention(q: Carry, constants: Constants) -> Carry:
    from jax.experimental.pallas.ops.gpu.decode_attention import mqa

    k, v, positions = constants
    batch, _, heads, group, width = q.shape
    lengths = jnp.repeat(positions + 1, heads)
    mixed = mqa(q.reshape(batch * heads, group, width), k, v, kv_seq_len=lengths)
    return mixed.reshape(q.shape).astype(q.dtype)


def _prepare_by_page(arrays: Arrays) -> tuple[Carry, Constants]:
    batch, capacity, heads, width = arrays.k.shape
    k, v = (a.transpose(2, 0, 1, 3).reshape(heads, -1, _PAGE, width) for a in (arrays.k, arrays.v))
    pages = jnp.arange(batch * capacity // _PAGE).reshape(batch, -1)
    return arrays.q, (k, v, pages, arrays.positions)


def _attend_by_paged_attention(q: Carry, constants: Constants) -> Carry:
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    k, v, pages, positions = constants
    batch, _, heads, group, width = q.shape
    scaled = q.reshape(batch, heads * group, width) * width**-0.5
    return paged_attention(scaled, k, v, positions + 1, pages, pages_per_compute_block=256 // _PAGE).reshape(q.shape)


def measure(case: KernelCase, implementations: Sequence[Implementation], repeats: int) -> list[tuple[float, float]]:
    """Returns (seconds per call, largest difference to plain JAX) of each implementation."""
    arrays, layers = make_arrays(case), _layers(case)
    rounds = max(2, _CALLS // layers)
    results = []
    for each in implementations:
        carry, constants = each.prepare(arrays)
        results.append(single_call(each)(carry, constants))
    programs = [repeated_calls(each, rounds) for each in implementations]
    times: list[list[float]] = [[] for _ in implementations]
    for repeat in range(repeats + 1):
        for each, program, seconds in zip(implementations, programs, times, strict=True):
            inputs = jax.block_until_ready(jax.tree.map(jnp.copy, [each.prepare(arrays) for _ in range(layers)]))
            carries, constants = zip(*inputs, strict=True)
            began = time.perf_counter()
            jax.block_until_ready(program(carries, constants))
            if repeat:  # the first run compiles
                seconds.append((time.perf_counter() - began) / (rounds * layers))
    named = list(zip(implementations, results, strict=True))
    plain = {each.operation: result for each, result in named if each.by == kv_cache.PLAIN}
    differences = [_difference(result, plain[each.operation], case) for each, result in named]
    return list(zip(map(statistics.median, times), differences, strict=True))


def _layers(case: KernelCase) -> int:
    """Returns how many caches, used in turn, are together too large for any chip's own memory."""
    return min(-(-_COLD_BYTES // case.use.cache_bytes(case.capacity)), _CALLS // 2)


def single_call(implementation: Implementation) -> Callable[[Carry, Constants], Carry]:
    """Returns the compiled function (carry, constants) -> carry of one call."""
    if implementation.operation == "attend":
        return jax.jit(implementation.run)
    # Alone in a program, XLA:TPU refuses a result that is pinned to HBM. Writing the same entries twice is harmless.
    return jax.jit(lambda carry, constants: repeated_calls(implementation, 2)((carry,), (constants,))[0])


def repeated_calls(implementation: Implementation, rounds: int) -> Callable[..., tuple[Carry, ...]]:
    """Returns the compiled function (carries, constants), with one entry per layer, -> carries after all rounds.

    A round calls the implementation once for each layer, on what it returned for that layer before.
    The carries are donated.
    """

    def program(carries, constants):
        def one_round(_, carries):
            return tuple(map(implementation.run, carries, constants))

        return jax.lax.fori_loop(0, rounds, one_round, carries)

    return jax.jit(program, donate_argnums=0)


def _difference(result: Carry, plain: Carry, case: KernelCase) -> float:
    """Returns the largest difference of two results of attention, or of two caches up to the capacity."""

    def numbers(a):
        if isinstance(a, jax.Array):
            return a.astype(jnp.float32)
        return jnp.stack(kv_cache.numbers(a))[..., : case.capacity, :]

    return float(jnp.max(jnp.abs(numbers(result) - numbers(plain))))


def _run_report(
    case: KernelCase,
    implementation: Implementation,
    chip: Chip | None,
    seconds: float | None,
    difference: float | None,
) -> dict[str, Any]:
    bound = implementation.bytes_moved / chip.memory_bandwidth if chip else None
    return case._asdict() | {
        "operation": implementation.operation,
        "by": implementation.by,
        "bytes": implementation.bytes_moved,
        "roofline_microseconds": bound and 1e6 * bound,
        "microseconds": seconds and 1e6 * seconds,
        "gigabytes_per_second": seconds and implementation.bytes_moved / seconds / 1e9,
        "share_of_peak": bound / seconds if bound and seconds else None,
        "largest_difference": difference,
    }
