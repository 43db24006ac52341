"""Compile-only devices: XLA compiles for them on any machine, but nothing can run on them.

They need the extra `ahead`: libtpu for TPU, and JAX's CUDA plugin (without CUDA itself) for GPU.
"""

import os
from typing import NamedTuple

import jax
from jax.experimental import topologies

from lsjax.costs.hardware import Chip, Topology
from lsjax.errors import UserError
from lsjax.parallel.sharding import Device


class _GpuDetails(NamedTuple):
    """Figures of a GPU that XLA:GPU's cost models and tilings need; sizes are in bytes."""

    multiprocessors: int
    l2_cache: int
    clock_ghz: float
    shared_memory: int
    compute_capability: tuple[int, int]


_A100 = _GpuDetails(108, 41_943_040, 1.41, 163_840 + 4_096, (8, 0))
_H100 = _GpuDetails(132, 52_428_800, 1.98, 233_472, (9, 0))
_GPU_DETAILS = {"gpu:a100-40": _A100, "gpu:a100-80": _A100, "gpu:h100": _H100, "gpu:h200": _H100}


def prepare() -> None:
    """Keeps libtpu from looking for a TPU, and JAX from using anything but the CPU to run on.

    Call it before anything else touches JAX's devices.
    """
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    os.environ.setdefault(
        "ALLOW_MULTIPLE_LIBTPU_LOAD", "1"
    )  # no chip is opened, so several processes may compile at once
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")


def compile_only_devices(topology: Topology) -> list[Device]:
    """Returns the topology's devices, for which programs can be compiled.

    Raises UserError when the extra `ahead` is missing or no such slice exists.
    """
    make = {"tpu": _tpu, "gpu": _gpu}[topology.chip.platform]
    try:
        return make(topology)
    except (RuntimeError, ValueError, NotImplementedError, FileNotFoundError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        missing = "not installed" in reason or "not implemented for cuda" in reason
        fix = "; install the compilers with `make ahead`, or pip install 'lsjax[ahead]'" if missing else ""
        raise UserError(f"cannot describe --topology={topology}: {reason}{fix}") from None


def _tpu(topology: Topology) -> list[Device]:
    name = f"{topology.chip.name.removeprefix('tpu:')}:{'x'.join(map(str, topology.shape))}"
    options: dict[str, tuple[int, int, int] | str] = {"chips_per_host_bounds": (1, 1, 1)} if topology.size == 1 else {}
    if topology.chip.name == "tpu:v4":  # otherwise each of its two cores would be a device
        options["chip_config_name"] = "megacore"
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices


def _gpu(topology: Topology) -> list[Device]:
    hosts, gpus = topology.shape
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=topology.chip.device_kind,
        target_config=_gpu_target(topology.chip),
        topology=f"1x{hosts}x{gpus}",
    ).devices


def _gpu_target(chip: Chip) -> str:
    """Returns XLA's GpuTargetConfigProto as text."""
    details = _GPU_DETAILS[chip.name]
    major, minor = details.compute_capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {details.shared_memory}
  threads_per_core_limit: 2048
  core_count: {details.multiprocessors}
  fpus_per_core: {64 if major == 8 else 128}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.memory_bandwidth)}
  l2_cache_size: {details.l2_cache}
  clock_rate_ghz: {details.clock_ghz}
  device_memory_size: {chip.memory_bytes}
  shared_memory_per_block_optin: {details.shared_memory - 1024}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{chip.device_kind}"
"""
