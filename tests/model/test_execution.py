"""The number types of a step, by platform and by the processor's instructions."""

import dataclasses
import logging
import types

import jax
import jax.numpy as jnp
import pytest

from lsjax.config import Config
from lsjax.decoding import model as decoding_model
from lsjax.model import execution

# What JAX says of real devices. An AMD GPU names its architecture in place of a number.
DEVICES = {
    "Tesla P100": ("gpu", "6.0", "float32"),
    "Tesla T4": ("gpu", "7.5", "float32"),
    "NVIDIA A100-SXM4-40GB": ("gpu", "8.0", "bfloat16"),
    "NVIDIA L4": ("gpu", "8.9", "bfloat16"),
    "NVIDIA B200": ("gpu", "10.0", "bfloat16"),
    "AMD Instinct MI300X": ("gpu", "gfx942", "bfloat16"),
    "TPU v5e": ("tpu", None, "bfloat16"),
    "cpu": ("cpu", None, "float32"),
}


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


@pytest.mark.parametrize(
    ("vendor", "flags", "capable"),
    [
        ("AuthenticAMD", "avx512f avx512_bf16", True),
        ("GenuineIntel", "avx512f avx512_bf16", False),
        ("GenuineIntel", "avx512f avx512_bf16 amx_bf16", True),
        ("AuthenticAMD", "avx512f avx2", False),
        (None, None, False),
    ],
)
def test_the_processor_is_asked(vendor, flags, capable, monkeypatch, tmp_path):
    path = tmp_path / "cpuinfo"
    if flags is not None:
        path.write_text(f"vendor_id : {vendor}\nflags : fpu {flags}\n")
    monkeypatch.setattr(execution, "CPU_INFO", path)
    execution.cpu_multiplies_bfloat16.cache_clear()
    assert execution.cpu_multiplies_bfloat16() == capable
    execution.cpu_multiplies_bfloat16.cache_clear()


@pytest.fixture(params=DEVICES)
def device(request):
    platform, capability, dtype = DEVICES[request.param]
    more = {"compute_capability": capability} if capability else {}
    execution._say_once.cache_clear()
    yield types.SimpleNamespace(platform=platform, device_kind=request.param, dtype=dtype, **more)
    execution._say_once.cache_clear()


def test_the_default_dtype_is_what_the_device_multiplies(device, monkeypatch, caplog):
    monkeypatch.setattr(jax, "default_backend", lambda: device.platform)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(execution, "cpu_multiplies_bfloat16", lambda: False)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert decoding_model.default_dtype() == jnp.dtype(device.dtype)
            assert execution.choose_execution(Config(), device).compute_dtype == jnp.dtype(device.dtype)
            assert execution.choose_execution(Config()).compute_dtype == jnp.dtype(device.dtype)
    said = [record.getMessage() for record in caplog.records]
    slow = device.platform == "gpu" and device.dtype == "float32"
    assert said == slow * [
        f"{device.device_kind} (compute capability {getattr(device, 'compute_capability', '')}, below 8.0) has no "
        "bfloat16: computing in float32, without Pallas kernels"
    ]


def test_a_dtype_that_was_asked_for_stays(caplog):
    device = types.SimpleNamespace(platform="gpu", device_kind="Tesla T4", compute_capability="7.5")
    config = Config(training=dataclasses.replace(Config().training, compute_dtype="bfloat16"))
    assert execution.choose_execution(config, device).compute_dtype == jnp.bfloat16
    assert not caplog.records
