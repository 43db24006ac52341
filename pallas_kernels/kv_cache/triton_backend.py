"""Pallas' Triton backend, the one that compiles for A100 and H100 alike; a later JAX may come without it."""

from typing import Any

import jax

try:
    from jax.experimental.pallas import triton
except ImportError:
    triton = None

_COMPILED_FOR = ("8.0", "9.0")  # A100; H100 and H200. Others have less shared memory, or are not NVIDIA's


def on_triton(num_warps: int, num_stages: int = 1) -> dict[str, Any]:
    """Arguments of a pallas_call. Without them a kernel for GPU goes to Mosaic, which aborts the process on an A100."""
    return {"compiler_params": triton.CompilerParams(num_warps=num_warps, num_stages=num_stages)}


def why_not() -> str | None:
    """What keeps this JAX, and the GPU of this process if it has one, from such kernels; None when nothing."""
    if triton is None:
        return f"no GPU kernels in jax {jax.__version__}, which has no Pallas for Triton"
    if jax.default_backend() != "gpu":
        return None
    capability = str(jax.devices()[0].compute_capability)
    if capability in _COMPILED_FOR:
        return None
    return f"no GPU kernels for compute capability {capability}, only {' and '.join(_COMPILED_FOR)}"
