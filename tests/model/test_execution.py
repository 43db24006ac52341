"""What a step computes in, by platform and by what the processor can do."""

import dataclasses

import jax.numpy as jnp
import pytest

from lsjax.config import Config
from lsjax.model import execution


@pytest.mark.parametrize(
    ("platform", "capable", "asked", "compute", "rounds"),
    [
        ("cpu", True, "auto", "float32", True),
        ("cpu", False, "auto", "float32", False),
        ("cpu", False, "bfloat16", "float32", True),
        ("cpu", True, "float32", "float32", False),
        ("tpu", False, "auto", "bfloat16", False),
        ("gpu", True, "bfloat16", "bfloat16", False),
        ("tpu", True, "float32", "float32", False),
    ],
)
def test_number_types_are_the_platforms(platform, capable, asked, compute, rounds, monkeypatch):
    monkeypatch.setattr(execution, "cpu_multiplies_bfloat16", lambda: capable)
    config = Config(training=dataclasses.replace(Config().training, compute_dtype=asked))
    chosen = execution.choose_execution(config, platform)
    assert (chosen.compute_dtype, chosen.rounds_products) == (jnp.dtype(compute), rounds)
    assert ("products of bfloat16" in str(chosen)) == rounds


@pytest.mark.parametrize(("flags", "capable"), [("avx512f avx512_bf16", True), ("avx512f avx2", False), (None, False)])
def test_the_processor_is_asked(flags, capable, monkeypatch, tmp_path):
    path = tmp_path / "cpuinfo"
    if flags is not None:
        path.write_text(f"flags : fpu {flags}\n")
    monkeypatch.setattr(execution, "CPU_INFO", path)
    execution.cpu_multiplies_bfloat16.cache_clear()
    assert execution.cpu_multiplies_bfloat16() == capable
    execution.cpu_multiplies_bfloat16.cache_clear()
