"""The benchmark of the kernels compares the right things, counts bytes right, and shows a wrong kernel."""

import itertools
import types

import jax
import pytest

from lsjax.benchmarks import kernels
from lsjax.benchmarks.kernels import (
    SHIPPED,
    SHIPPED_KERNEL,
    KernelCase,
    benchmark_kernels,
    implementations,
    measure,
    repeated_calls,
)
from lsjax.errors import UserError
from pallas_kernels.kv_cache import gpu
from tests.helpers.interpreted import simulated_gpu

CASE = KernelCase(
    batch_size=2, tokens=3, length=40, capacity=64, num_kv_heads=2, group=2, head_width=32, dtype="float32"
)


def test_every_implementation_gives_what_plain_jax_gives(monkeypatch):
    """The kernels are interpreted. A kernel that writes one place too far shows."""
    monkeypatch.setattr(kernels, "_CALLS", 4)
    found = list(implementations(CASE, "gpu"))
    names = [("write", "plain"), ("write", "gpu"), ("attend", "plain"), ("attend", "gpu"), ("attend", SHIPPED)]
    assert [(each.operation, each.by) for each in found] == names
    clock = itertools.count()
    monkeypatch.setattr(kernels, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    with simulated_gpu():
        measured = measure(CASE, found, repeats=2)
        assert [seconds for seconds, _ in measured] == [1 / 4] * 5  # two layers, two rounds
        assert all(difference < 1e-5 for _, difference in measured)
        write = gpu.gpu_write.write
        monkeypatch.setattr(gpu.gpu_write, "write", lambda *arrays: write(*arrays[:-1], arrays[-1] + 1))
        jax.clear_caches()
        assert measure(CASE, found[:2], repeats=1)[1][1] > 0.1


def test_a_cache_in_int8(monkeypatch):
    """The kernels equal plain JAX, and both are near the attention that JAX ships over exact keys and values."""
    monkeypatch.setattr(kernels, "_CALLS", 4)
    case = CASE._replace(dtype="int8")
    found = list(implementations(case, "gpu"))
    with simulated_gpu():
        differences = [difference for _, difference in measure(case, found, repeats=1)]
    assert differences[:4] == [0, 0, 0, pytest.approx(0, abs=1e-2)]
    assert 1e-3 < differences[4] < 0.05
    moved = {(each.operation, each.by): each.bytes_moved for each in found}
    entry = 2 * 2 * 2 * (32 + 4)
    assert (moved["attend", "plain"], moved["write", "gpu"]) == (64 * entry, 3 * entry)
    assert moved["attend", SHIPPED] == 64 * 2 * 2 * 2 * 32 * 2


def test_calls_follow_each_other():
    """Each call of a layer works on what the previous one returned."""
    implementation = next(implementations(CASE, "gpu"))._replace(run=lambda carry, constant: carry * constant)
    doubled, tripled = repeated_calls(implementation, rounds=3)((jax.numpy.ones(()), jax.numpy.ones(())), (2, 3))
    assert (doubled, tripled) == (8, 27)


def test_bytes_and_roofline_without_an_accelerator():
    """Counted by hand: keys and values of 2 sequences x 2 heads, 32 numbers of 4 bytes; one split for 2 queries."""
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


def test_unsupported_kernels_are_left_out():
    assert {each.by for each in implementations(CASE._replace(head_width=96), "gpu")} == {"plain", SHIPPED}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 65}, "length 65 must be 3 (tokens) to 64 (capacity)"),
        ({"batch_size": 0}, "sizes must be at least 1"),
        ({"dtype": "float16"}, "dtype is 'float16'; it must be one of bfloat16, float32, int8"),
    ],
)
def test_sizes_that_do_not_fit_together(change, message):
    with pytest.raises(UserError) as error:
        benchmark_kernels([CASE._replace(**change)])
    assert message in str(error.value)
