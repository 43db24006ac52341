"""The KV cache's kernels measured by themselves: against plain JAX, and against what JAX ships.

Where there is no accelerator nothing is measured: the report holds the bytes that each moves, and the time that these
take at a chip's bandwidth.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lsjax.errors import UserError
from lsjax.scale.hardware import CHIPS, Chip, chip_of
from pallas_kernels.kv_cache import interface as kv_cache

SHIPPED = "jax.nn"  # dot_product_attention, compiled by XLA
SHIPPED_KERNEL = "jax Pallas"  # of jax.experimental.pallas.ops, gpu.decode_attention or tpu.paged_attention: T = 1
DTYPES = ("bfloat16", "float32", "int8")
_PAGE = 16  # entries of a page, the least that a block of them may have
_CALLS = 64  # in one program, about
_COLD_BYTES = 256 << 20


class Case(NamedTuple):
    """T tokens a row written to, or attending to, the caches of B rows that hold `length` of C entries. `dtype`: of the
    cache and of what is computed with; "int8": of the cache alone, beside bfloat16."""

    rows: int
    tokens: int
    length: int
    capacity: int
    num_kv_heads: int
    group: int
    head_width: int
    dtype: str

    @property
    def compute_dtype(self) -> str:
        return "bfloat16" if self.dtype == "int8" else self.dtype

    @property
    def use(self) -> kv_cache.Use:
        sizes = self.rows, self.num_kv_heads, self.head_width, self.capacity, self.length, self.tokens
        return kv_cache.Use(*sizes, dtype=jnp.dtype(self.dtype), group=self.group)


class Way(NamedTuple):
    """One way to do it: `run` (carry, constants) -> carry, again and again, from `make` (Arrays) -> (carry, constants).
    `moved`: bytes of memory, a call."""

    operation: str
    by: str
    make: Callable
    run: Callable
    moved: int


class Arrays(NamedTuple):
    """A cache's contents [B, C, K, H] each, new tokens [B, T, K, H] each, queries [B, T, K, G, H], positions [B]."""

    k: jax.Array
    v: jax.Array
    new_k: jax.Array
    new_v: jax.Array
    q: jax.Array
    positions: jax.Array


def benchmark_kernels(
    cases: Sequence[Case],
    chip: str | None = None,
    repeats: int = 5,
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Every way to write and to attend, for every case: {device, chip, measured, runs}. `chip` (a name of CHIPS): whose
    bandwidth they are held against; None: the device's own, an H100's where there is no accelerator.

    Times are medians over repeats that take turns, of calls that follow each other inside one program, on the caches of
    several layers as a model would make them. `largest_difference` is to plain JAX's result.
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
        candidates = list(ways(case, platform if measured else known.platform))
        times = measure(case, candidates, repeats) if measured else [(None, None)] * len(candidates)
        runs += [_run(case, way, known, *found) for way, found in zip(candidates, times, strict=True)]
    return {
        "device": f"{device} ({platform})",
        "chip": known.name if known else None,
        "jax_version": jax.__version__,
        "measured": measured,
        "runs": runs,
    }


def _check(case: Case) -> None:
    if case.dtype not in DTYPES:
        raise UserError(f"dtype is {case.dtype!r}; it must be one of {', '.join(DTYPES)}")
    if min(case[:-1]) < 1:
        raise UserError(f"sizes must be at least 1, got {case}")
    if not case.tokens <= case.length <= case.capacity:
        raise UserError(f"length {case.length} must be {case.tokens} (tokens) to {case.capacity} (capacity)")


def ways(case: Case, platform: str) -> Iterator[Way]:
    """Writing, then attending: plain JAX first, which the others are compared with. What JAX ships reads no int8."""
    kernels = kv_cache.choose("on", platform, case.use).name
    for index, (operation, run) in enumerate((("write", _write), ("attend", _attend))):
        for name in dict.fromkeys((kv_cache.PLAIN, kernels)):
            moved = kv_cache.KERNELS[name].bytes_moved(case.use)[index]
            yield Way(operation, name, functools.partial(_make, case, name, operation), run, moved)
    shipped = case.use._replace(dtype=case.compute_dtype)
    whole = kv_cache.KERNELS[kv_cache.PLAIN].bytes_moved(shipped)[1]
    yield Way(
        "attend", SHIPPED, lambda arrays: (arrays.q, (arrays.k, arrays.v, arrays.positions)), _attend_by_xla, whole
    )
    kernel = {"gpu": (_by_head, _attend_by_decode_attention), "tpu": (_by_page, _attend_by_paged_attention)}
    if platform in kernel and case.tokens == 1 and case.capacity % 256 == 0:
        yield Way("attend", SHIPPED_KERNEL, *kernel[platform], shipped.bytes_of(case.length))


def make_arrays(case: Case) -> Arrays:
    """Random; the tokens that attend are the row's last."""
    entries = (case.rows, case.capacity, case.num_kv_heads, case.head_width)
    new = (case.rows, case.tokens, case.num_kv_heads, case.head_width)
    shapes = entries, entries, new, new, (*new[:3], case.group, case.head_width)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = (jax.random.normal(key, shape, case.compute_dtype) for key, shape in zip(keys, shapes, strict=True))
    return Arrays(*arrays, jnp.full(case.rows, case.length - case.tokens, jnp.int32))


def _make(case: Case, name: str, operation: str, arrays: Arrays):
    sizes = case.rows, case.num_kv_heads, case.capacity, case.head_width
    cache = kv_cache.fill(kv_cache.init_layer_cache(*sizes, case.dtype, name), arrays.k, arrays.v)
    if operation == "attend":
        return arrays.q, (cache, arrays.positions)
    return cache, (arrays.new_k, arrays.new_v, arrays.positions)


def _write(cache, constants):
    return kv_cache.write(cache, *constants)


def _attend(q, constants):
    return kv_cache.attend(q, *constants)


def _token_major(arrays: Arrays):
    return arrays.q, (arrays.k, arrays.v, arrays.positions)


def _attend_by_xla(q, constants):
    k, v, positions = constants
    batch, tokens, heads, group, width = q.shape
    seen = positions[:, None] + jnp.arange(tokens)
    mask = (jnp.arange(k.shape[1]) <= seen[..., None])[:, None]
    mixed = jax.nn.dot_product_attention(q.reshape(batch, tokens, heads * group, width), k, v, mask=mask)
    return mixed.reshape(q.shape)


def _by_head(arrays: Arrays):
    k, v = (a.swapaxes(1, 2).reshape(-1, a.shape[1], a.shape[3]) for a in (arrays.k, arrays.v))
    return arrays.q, (k, v, arrays.positions)


def _attend_by_decode_attention(q, constants):
    from jax.experimental.pallas.ops.gpu.decode_attention import mqa

    k, v, positions = constants
    batch, _, heads, group, width = q.shape
    lengths = jnp.repeat(positions + 1, heads)
    mixed = mqa(q.reshape(batch * heads, group, width), k, v, kv_seq_len=lengths)
    return mixed.reshape(q.shape).astype(q.dtype)


def _by_page(arrays: Arrays):
    batch, capacity, heads, width = arrays.k.shape
    k, v = (a.transpose(2, 0, 1, 3).reshape(heads, -1, _PAGE, width) for a in (arrays.k, arrays.v))
    pages = jnp.arange(batch * capacity // _PAGE).reshape(batch, -1)
    return arrays.q, (k, v, pages, arrays.positions)


def _attend_by_paged_attention(q, constants):
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    k, v, pages, positions = constants
    batch, _, heads, group, width = q.shape
    scaled = q.reshape(batch, heads * group, width) * width**-0.5
    return paged_attention(scaled, k, v, positions + 1, pages, pages_per_compute_block=256 // _PAGE).reshape(q.shape)


def measure(case: Case, candidates: Sequence[Way], repeats: int) -> list[tuple[float, float]]:
    """Of each way (seconds a call, largest difference to plain JAX)."""
    arrays, layers = make_arrays(case), _layers(case)
    turns = max(2, _CALLS // layers)
    results = [once(way)(*way.make(arrays)) for way in candidates]
    programs = [again_and_again(way, turns) for way in candidates]
    times = [[] for _ in candidates]
    for repeat in range(repeats + 1):
        for way, program, seconds in zip(candidates, programs, times, strict=True):
            inputs = jax.block_until_ready(jax.tree.map(jnp.copy, [way.make(arrays) for _ in range(layers)]))
            began = time.perf_counter()
            jax.block_until_ready(program(*zip(*inputs, strict=True)))
            if repeat:  # the first time it is compiled
                seconds.append((time.perf_counter() - began) / (turns * layers))
    plain = {way.operation: result for way, result in zip(candidates, results, strict=True) if way.by == kv_cache.PLAIN}
    differences = [_difference(r, plain[way.operation], case) for way, r in zip(candidates, results, strict=True)]
    return list(zip(map(statistics.median, times), differences, strict=True))


def _layers(case: Case) -> int:
    """As many caches, taken in turn, as together lie in no chip's own memory."""
    return min(-(-_COLD_BYTES // case.use.bytes_of(case.capacity)), _CALLS // 2)


def once(way: Way):
    """The program (carry, constants) -> carry."""
    if way.operation == "attend":
        return jax.jit(way.run)
    # Twice is the same; alone in a program, XLA:TPU refuses a result that is pinned to HBM.
    return jax.jit(lambda carry, constants: again_and_again(way, 2)((carry,), (constants,))[0])


def again_and_again(way: Way, turns: int):
    """The program (carries, constants of every layer) -> carries, the former donated."""

    def program(carries, constants):
        a_turn = lambda _, carries: tuple(map(way.run, carries, constants))  # noqa: E731
        return jax.lax.fori_loop(0, turns, a_turn, carries)

    return jax.jit(program, donate_argnums=0)


def _difference(result, plain, case: Case) -> float:
    """Of what queries got, or of written caches, whatever lies past the capacity."""

    def numbers(a):
        if isinstance(a, jax.Array):
            return a.astype(jnp.float32)
        return jnp.stack(kv_cache.numbers(a))[..., : case.capacity, :]

    return float(jnp.max(jnp.abs(numbers(result) - numbers(plain))))


def _run(case: Case, way: Way, chip: Chip | None, seconds: float | None, difference: float | None) -> dict[str, Any]:
    bound = way.moved / chip.memory_bandwidth if chip else None
    return case._asdict() | {
        "operation": way.operation,
        "by": way.by,
        "bytes": way.moved,
        "roofline_microseconds": bound and 1e6 * bound,
        "microseconds": seconds and 1e6 * seconds,
        "gigabytes_per_second": seconds and way.moved / seconds / 1e9,
        "share_of_peak": bound / seconds if bound and seconds else None,
        "largest_difference": difference,
    }
