"""Flash attention: JAX's splash kernels on TPU, cuDNN's on GPU, and the choice between them and plain JAX.

Start at `choose_attention`, which the training step calls through execution.py. attention.py has the plain version and
the interface, `AttentionFunction`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P

from lsjax.errors import UserError
from lsjax.model.attention import AttentionFunction, plain_attention
from lsjax.parallel.sharding import free_axes, free_spec

_LANES = 128  # the width of a TPU's vector registers; splash attention's blocks are multiples of it
_LARGEST_BLOCK = 1024
RESIDUALS = "attention"  # the name by which a rematerialisation policy (rematerialize.py) keeps the kernel's output


class AttentionChoice(NamedTuple):
    """The attention function that a step runs, with its name and the reason for the choice (both for the log)."""

    name: str
    attend: AttentionFunction
    reason: str


def choose_attention(wanted: str, platform: str, dtype: jnp.dtype, head_width: int, length: int) -> AttentionChoice:
    """Chooses flash attention where the platform has it for these shapes, and plain JAX elsewhere.

    wanted: "auto" falls back to plain attention and gives the reason, "flash" raises UserError instead of falling
        back, "plain" always takes plain attention.
    platform: "tpu", "gpu" or "cpu".
    length: tokens per sequence.
    """
    if wanted == "plain":
        return AttentionChoice("plain", plain_attention, "config.training.attention is plain")
    problem = _why_not(platform, dtype, head_width, length)
    if not problem:
        name, attend = {"tpu": ("splash", splash_attention), "gpu": ("cudnn", cudnn_attention)}[platform]
        return AttentionChoice(name, attend, f"flash attention on {platform}")
    if wanted == "flash":
        raise UserError(f"config.training.attention is flash, but {problem}")
    return AttentionChoice("plain", plain_attention, problem)


def _why_not(platform: str, dtype: jnp.dtype, head_width: int, length: int) -> str:
    """Returns what keeps flash attention from running; an empty text when nothing does."""
    if platform == "tpu":
        return f"splash attention needs a multiple of {_LANES} tokens, not {length}" if length % _LANES else ""
    if platform == "gpu":
        if jnp.dtype(dtype) != jnp.bfloat16:
            return f"cuDNN attention needs bfloat16, not {dtype}"
        return _cudnn_problem(head_width)
    return f"there is no flash attention for {platform}"


@functools.cache
def _cudnn_problem(head_width: int) -> str:
    """Returns why JAX cannot lower cuDNN attention here; an empty text when it can.

    Lowering asks the cuDNN library for its version, so it fails where the library is missing.
    """
    q = jax.ShapeDtypeStruct((1, 128, 1, 1, head_width), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 128, 1, head_width), jnp.bfloat16)
    try:
        jax.jit(cudnn_attention).trace(q, k, k).lower(lowering_platforms=("cuda",))
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f"cuDNN is not available ({str(error).strip().splitlines()[0][:200]})"
    return ""


def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Computes attention with cuDNN's fused kernels on GPU; shapes as in AttentionFunction.

    Segments cost memory: cuDNN needs them as a mask [B,1,S,S].
    """
    B, S, K, G, H = q.shape
    mask = None if segment_ids is None else (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    mixed = jax.nn.dot_product_attention(
        q.reshape(B, S, K * G, H), k, v, mask=mask, is_causal=True, implementation="cudnn"
    )
    return mixed.reshape(q.shape)


def splash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None = None, *, interpret: bool = False
) -> jax.Array:
    """Computes attention with JAX's splash kernels (Pallas, for TPU); shapes as in AttentionFunction.

    interpret: runs the kernels in Pallas's interpreter, for tests on CPU.
    """
    run = functools.partial(_splash, interpret=interpret)
    if jax.sharding.get_abstract_mesh().empty:
        return run(q, k, v, segment_ids)
    # The partitioner cannot split a kernel, so each device runs it on its own sequences and heads.
    queries = free_spec("batch", None, "kv_heads", None, None)
    keys, ids = P(*queries[:4]), P(queries[0])
    return jax.shard_map(
        run,
        in_specs=(queries, keys, keys, ids),
        out_specs=queries,
        axis_names=free_axes(),
        check_vma=False,
    )(q, k, v, segment_ids)


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, interpret: bool) -> jax.Array:
    """Runs the splash kernel on the sequences and heads of one device."""
    S, G, H = q.shape[1], q.shape[3], q.shape[4]
    kernel = splash.make_splash_mqa_single_device(
        masks.MultiHeadMask([masks.CausalMask((S, S))] * G),
        block_sizes=_block_sizes(S),
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )
    ids = None if segment_ids is None else splash.SegmentIds(q=segment_ids, kv=segment_ids)
    heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    queries = (q * H**-0.5).astype(q.dtype).transpose(0, 2, 3, 1, 4)
    keys, values = (a.transpose(0, 2, 1, 3) for a in (k, v))
    mixed = jax.vmap(heads, in_axes=(0, 0, 0, None if ids is None else 0))(queries, keys, values, ids)
    assert isinstance(mixed, jax.Array)  # a pair only where the kernel saves its residuals
    return mixed.transpose(0, 3, 1, 2, 4).astype(q.dtype)


def _block_sizes(length: int) -> splash.BlockSizes:
    """Returns the largest blocks up to 1,024 tokens that divide the sequence."""
    block = next(size for size in range(min(length, _LARGEST_BLOCK), 0, -_LANES) if length % size == 0)
    return splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )
