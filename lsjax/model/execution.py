"""How a training step runs on a platform: number type, attention, compiler options. The mathematics is the same."""

import functools
import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lsjax.config import Config
from lsjax.model.flash import AttentionChoice, choose_attention

CPU_INFO = Path("/proc/cpuinfo")  # Linux only


class Execution(NamedTuple):
    """The number type and the attention of a step.

    compute_dtype: the dtype of parameters and states.
    rounds_products: whether products with weights round their float32 factors to bfloat16 (`rounding_products` in
        matmul.py).
    """

    compute_dtype: jnp.dtype
    attention: AttentionChoice
    rounds_products: bool = False

    def __str__(self) -> str:
        products = " with products of bfloat16" if self.rounds_products else ""
        reason = "" if self.attention.name != "plain" else f" ({self.attention.reason})"
        return f"{self.compute_dtype}{products}, {self.attention.name} attention{reason}"


def choose_execution(config: Config, target: Any = None) -> Execution:
    """Chooses how to run the step of `config`.

    target: the jax.Device that will run it, or a platform, "cpu", "gpu" (one with bfloat16) or "tpu". None means the
        first device of this process.

    The compute dtype "auto" is bfloat16 with float32 master weights, except on a CPU without bfloat16 instructions and
    on GPUs before A100, where it is float32. On a CPU, bfloat16 applies to the factors of products with weights only:
    states stay float32, since XLA:CPU would convert them to float32 for every operation.
    """
    device = jax.devices()[0] if target is None else target
    platform = device if isinstance(device, str) else device.platform
    name = config.training.compute_dtype
    if name == "auto" and platform == "cpu":
        name = "bfloat16" if cpu_multiplies_bfloat16() else "float32"
    elif name == "auto":
        name = accelerator_dtype(device).name
    dtype = jnp.dtype("float32" if platform == "cpu" else name)
    attention = choose_attention(
        config.training.attention, platform, dtype, config.model.head_width, config.training.sequence_length
    )
    return Execution(dtype, attention, rounds_products=name != dtype)


def accelerator_dtype(device: Any) -> jnp.dtype:
    """Returns the default dtype on a GPU or TPU: bfloat16, or float32 on an NVIDIA GPU without bfloat16 units.

    device: a jax.Device, or the name of a platform, which stands for its devices with bfloat16.

    Logs one line for such a GPU: one of compute capability below 8.0, such as a T4. The device itself is asked, since
    libraries also say yes where bfloat16 is emulated.
    """
    capability = str(getattr(device, "compute_capability", ""))  # such as "7.5"; AMD's are like "gfx942"
    major, dot, _ = capability.partition(".")
    if not (dot and major.isdecimal() and int(major) < 8):
        return jnp.dtype("bfloat16")
    _say_once(
        f"{device.device_kind} (compute capability {capability}, below 8.0) has no bfloat16: computing "
        "in float32, without Pallas kernels"
    )
    return jnp.dtype("float32")


@functools.cache
def _say_once(message: str) -> None:
    logging.warning(message)


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Returns whether this machine's x86 processor multiplies bfloat16 faster than float32.

    AMX does. So do AVX-512's bfloat16 products of AMD, which have twice the rate of float32; those of Intel have the
    same rate, and the conversions then make a training step slower.
    """
    try:
        description = CPU_INFO.read_text()
    except OSError:  # not Linux
        return False
    return "amx_bf16" in description or ("avx512_bf16" in description and "AuthenticAMD" in description)


# XLA options per platform, beyond the compiler's defaults. docs/accelerators.md gives the reason for each.
COMPILER_OPTIONS: dict[str, dict[str, bool | int | str]] = {
    "cpu": {},
    "gpu": {
        "xla_gpu_enable_pipelined_all_gather": True,
        "xla_gpu_enable_pipelined_all_reduce": True,
        "xla_gpu_enable_pipelined_reduce_scatter": True,
    },
    "tpu": {
        "xla_enable_async_all_gather": True,
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
        "xla_tpu_overlap_compute_collective_tc": True,
    },
}
