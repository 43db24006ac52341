"""How a step runs on a platform: number type, attention, compiler options. The mathematics stays the same."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lsjax.config import Config
from lsjax.model.flash import Attention, choose_attention


class Execution(NamedTuple):
    compute_dtype: jnp.dtype
    attention: Attention

    def __str__(self) -> str:
        reason = "" if self.attention.name != "plain" else f" ({self.attention.reason})"
        return f"{self.compute_dtype}, {self.attention.name} attention{reason}"


def choose_execution(config: Config, platform: str | None = None) -> Execution:
    """For the platform ("cpu", "gpu", "tpu") that the step will run on; None is that of this process.

    "auto" is float32 on CPU, where bfloat16 is slow, and bfloat16 elsewhere, with float32 master weights.
    """
    platform = platform or jax.default_backend()
    name = config.training.compute_dtype
    if name == "auto":
        name = "float32" if platform == "cpu" else "bfloat16"
    dtype = jnp.dtype(name)
    attention = choose_attention(
        config.training.attention, platform, dtype, config.model.head_width, config.training.sequence_length
    )
    return Execution(dtype, attention)


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
