"""Measuring the kernels: what is compared, what is counted, and that a wrong kernel would show."""

import itertools
import types

import jax
import pytest

from lsjax.decoding import kernel_benchmark
from lsjax.decoding.kernel_benchmark import (
    SHIPPED,
    SHIPPED_KERNEL,
    Case,
    again_and_again,
    benchmark_kernels,
    measure,
    ways,
)
from lsjax.errors import UserError
from pallas_kernels.kv_cache import gpu
from tests.kernels.interpreted import simulated_gpu

CASE = Case(rows=2, tokens=3, length=40, capacity=64, num_kv_heads=2, group=2, head_width=32, dtype="float32")


def test_every_way_gives_what_plain_jax_gives(monkeypatch):
    """With the kernels interpreted; and a kernel that writes one place too far is seen."""
    monkeypatch.setattr(kernel_benchmark, "_CALLS", 4)
    candidates = list(ways(CASE, "gpu"))
    names = [("write", "plain"), ("write", "gpu"), ("attend", "plain"), ("attend", "gpu"), ("attend", SHIPPED)]
    assert [(way.operation, way.by) for way in candidates] == names
    clock = itertools.count()
    monkeypatch.setattr(kernel_benchmark, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    with simulated_gpu():
        found = measure(CASE, candidates, repeats=2)
        assert [seconds for seconds, _ in found] == [1 / 4] * 5  # two layers, two turns
        assert all(difference < 1e-5 for _, difference in found)
        write = gpu.gpu_write.write
        monkeypatch.setattr(gpu.gpu_write, "write", lambda *arrays: write(*arrays[:-1], arrays[-1] + 1))
        jax.clear_caches()
        assert measure(CASE, candidates[:2], repeats=1)[1][1] > 0.1


def test_a_cache_in_int8(monkeypatch):
    """Is what plain JAX makes of it, and near to what JAX ships has over exact keys and values, in their bytes."""
    monkeypatch.setattr(kernel_benchmark, "_CALLS", 4)
    case = CASE._replace(dtype="int8")
    candidates = list(ways(case, "gpu"))
    with simulated_gpu():
        differences = [difference for _, difference in measure(case, candidates, repeats=1)]
    assert differences[:4] == [0, 0, 0, pytest.approx(0, abs=1e-2)]
    assert 1e-3 < differences[4] < 0.05
    moved = {(way.operation, way.by): way.moved for way in candidates}
    entry = 2 * 2 * 2 * (32 + 4)
    assert (moved["attend", "plain"], moved["write", "gpu"]) == (64 * entry, 3 * entry)
    assert moved["attend", SHIPPED] == 64 * 2 * 2 * 2 * 32 * 2


def test_calls_follow_each_other():
    """Each of a layer's on what the one before gave."""
    way = next(ways(CASE, "gpu"))._replace(run=lambda carry, constant: carry * constant)
    doubled, tripled = again_and_again(way, turns=3)((jax.numpy.ones(()), jax.numpy.ones(())), (2, 3))
    assert (doubled, tripled) == (8, 27)


def test_bytes_and_roofline_without_an_accelerator():
    """By hand: keys and values of 2 rows x 2 heads, 32 numbers of 4 bytes each; one split of a row for 2 queries."""
    case = CASE._replace(capacity=256, tokens=1)
    report = benchmark_kernels([case], chip="gpu:a100-80")
    assert not report["measured"]
    runs = {(run["operation"], run["by"]): run for run in report["runs"]}
    entry = 2 * 2 * 2 * 32 * 4
    assert runs["attend", "plain"]["bytes"] == runs["attend", SHIPPED]["bytes"] == 256 * entry
    assert runs["attend", SHIPPED_KERNEL]["bytes"] == 40 * entry
    assert runs["attend", "gpu"]["bytes"] == 40 * entry + 2 * 2 * 2 * 2 * (32 + 2) * 4
    assert runs["write", "gpu"]["bytes"] == entry
    assert runs["attend", "plain"]["roofline_microseconds"] == pytest.approx(256 * entry / 2.039e6)
    assert runs["attend", "plain"]["microseconds"] is None


def test_kernels_that_cannot_be_are_not_there():
    assert {way.by for way in ways(CASE._replace(head_width=96), "gpu")} == {"plain", SHIPPED}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 65}, "length 65 must be 3 (tokens) to 64 (capacity)"),
        ({"rows": 0}, "sizes must be at least 1"),
        ({"dtype": "float16"}, "dtype is 'float16'; it must be one of bfloat16, float32, int8"),
    ],
)
def test_what_does_not_go_together(change, message):
    with pytest.raises(UserError) as error:
        benchmark_kernels([CASE._replace(**change)])
    assert message in str(error.value)
