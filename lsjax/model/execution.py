"""How a step runs on a platform: number type, attention, compiler options. The mathematics stays the same."""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lsjax.config import Config
from lsjax.model.flash import Attention, choose_attention

CPU_INFO = Path("/proc/cpuinfo")  # of Linux


class Execution(NamedTuple):
    """`compute_dtype`: of parameters and states; `rounds_products`: whether products with weights are of bfloat16 all
    the same (lsjax/model/matmul.py, `rounding_products`)."""

    compute_dtype: jnp.dtype
    attention: Attention
    rounds_products: bool = False

    def __str__(self) -> str:
        products = " with products of bfloat16" if self.rounds_products else ""
        reason = "" if self.attention.name != "plain" else f" ({self.attention.reason})"
        return f"{self.compute_dtype}{products}, {self.attention.name} attention{reason}"


def choose_execution(config: Config, platform: str | None = None) -> Execution:
    """For the platform ("cpu", "gpu", "tpu") that the step will run on; None is that of this process.

    "auto" is bfloat16, with float32 master weights, but on a CPU without instructions for it: there it is float32. On a
    CPU bfloat16 means the factors of products with weights; states, which XLA:CPU would turn into float32 for every
    operation, stay float32.
    """
    platform = platform or jax.default_backend()
    name = config.training.compute_dtype
    if name == "auto":
        name = "float32" if platform == "cpu" and not cpu_multiplies_bfloat16() else "bfloat16"
    dtype = jnp.dtype("float32" if platform == "cpu" else name)
    attention = choose_attention(
        config.training.attention, platform, dtype, config.model.head_width, config.training.sequence_length
    )
    return Execution(dtype, attention, rounds_products=name != dtype)


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this machine's x86 processor has AVX-512's products of bfloat16, twice as fast as float32's."""
    try:
        flags = CPU_INFO.read_text()
    except OSError:  # no Linux
        return False
    return "avx512_bf16" in flags


# What the compiler is told beyond its defaults, by platform: docs/accelerators.md says why, one by one.
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
