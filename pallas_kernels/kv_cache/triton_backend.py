"""Pallas' Triton backend, the only one that compiles for both A100 and H100. A later JAX may come without it."""

from typing import Any

import jax

try:
    from jax.experimental.pallas import triton
except ImportError:
    triton = None

_COMPUTE_CAPABILITIES = ("8.0", "9.0")  # A100; H100 and H200. Others have less shared memory, or are not NVIDIA's


def on_triton(num_warps: int, num_stages: int = 1) -> dict[str, Any]:
    """Returns the arguments of `pallas_call` that select Triton.

    Without them a GPU kernel goes to Mosaic, which aborts the process on an A100.
    """
    assert triton is not None  # whoever runs a kernel has asked unsupported_reason
    return {"compiler_params": triton.CompilerParams(num_warps=num_warps, num_stages=num_stages)}


def unsupported_reason() -> str | None:
    """Returns why this JAX, or this process's GPU if there is one, cannot run Triton kernels; None when it can."""
    if triton is None:
        return f"no GPU kernels in jax {jax.__version__}, which has no Pallas for Triton"
    if jax.default_backend() != "gpu":
        return None
    capability = str(jax.devices()[0].compute_capability)
    if capability in _COMPUTE_CAPABILITIES:
        return None
    return f"no GPU kernels for compute capability {capability}, only for {' and '.join(_COMPUTE_CAPABILITIES)}"
