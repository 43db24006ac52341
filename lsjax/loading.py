"""Opening a model: a training workdir, a Hugging Face folder or a GGUF file."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp

from lsjax.checkpoint import latest_step, load_params, stored_dtypes
from lsjax.config import MeshConfig, ModelConfig
from lsjax.data.tokenizer import Tokenizer, load_tokenizer
from lsjax.decoding.passes import CACHES, Weights, decoder_weights
from lsjax.errors import UserError
from lsjax.files import read_json
from lsjax.interop.gguf import is_gguf, open_gguf, read_gguf_config
from lsjax.interop.huggingface import is_huggingface_config, open_huggingface, read_huggingface_config
from lsjax.interop.source import ModelSource, abstract_like, check_vocabulary
from lsjax.interop.tensors import abstract_params
from lsjax.model.quantized import is_quantized, quantize_params
from lsjax.model.transformer import Params
from lsjax.scale.sharding import make_mesh, tree_shardings
from lsjax.training import workdir as workdirs
from pallas_kernels.kv_cache.interface import SETTINGS


@dataclasses.dataclass(frozen=True)
class Model:
    """A model and what reads and writes its tokens. `params` are stacked [L, ...], as in training."""

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    path: str = ""
    step: int | None = None
    kernels: str = "auto"  # "on", "off": whether kernels write and read the KV cache in decoding
    cache: str = "auto"  # "int8": what numbers the KV cache holds

    @functools.cached_property
    def decoder_weights(self) -> Weights:
        """The parameters laid out for decoding: float32 on CPU, with outputs as rows; bfloat16 elsewhere."""
        return decoder_weights(self.params, default_dtype(), for_cpu=jax.default_backend() == "cpu")

    def draft_weights(self, exit_layer: int) -> Weights:
        """The first layers and the head in int8, for drafting alone. Raises UserError when the model is in int8."""
        if self.in_int8:
            raise UserError("draft_weights: this model is in int8 already, and drafts with its own early layers")
        if exit_layer not in self._drafting:
            early = jax.tree.map(lambda a: a[:exit_layer], self.params["layers"])
            weights = decoder_weights(quantize_params(self.params | {"layers": early}), default_dtype())
            self._drafting[exit_layer] = {key: weights[key] for key in ("layers", "lm_head")}
        return self._drafting[exit_layer]

    @functools.cached_property
    def _drafting(self) -> dict[int, Weights]:
        return {}

    @property
    def in_int8(self) -> bool:
        return is_quantized(self.params.get("lm_head"))


@dataclasses.dataclass(frozen=True)
class WorkdirSource:
    """The latest checkpoint of a training workdir."""

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer
    step: int

    def load_params(self, abstract: Params) -> Params:
        return load_params(self.path, abstract)[1]

    def stored_dtypes(self) -> Params:
        return stored_dtypes(self.path)


def quantize(model: Model) -> Model:
    """The model with int8 weights, a scale for each output channel; embedding, norms and activations are as they were.

    Another model, whose texts may differ. `generate`, `stream`, `tune` and `forward` take it as any other. A token
    reads half the bytes that it would in bfloat16 (TPU, GPU); on CPU it is slower than float32.
    """
    return model if model.in_int8 else dataclasses.replace(model, params=quantize_params(model.params))


def default_dtype() -> jnp.dtype:
    return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")


def load(
    path: str | Path,
    dtype: str | jnp.dtype | None = None,
    tensor: int = 1,
    kernels: str = "auto",
    cache: str = "auto",
) -> Model:
    """The model at a path: a training workdir (its latest checkpoint), a Hugging Face folder or a GGUF file.

    dtype: of the parameters; None is float32 on CPU and bfloat16 elsewhere, "stored" keeps what the files have.
    tensor: devices to split it over, by heads, feed-forward and vocabulary; each then computes its part of every
    token. kernels: whether Pallas kernels write and read the KV cache in decoding; "auto" is where they move fewer
    bytes, and what they cannot do plain JAX does. cache: numbers of the KV cache; "auto" are those that are computed
    with, "int8" are rounded, with a float32 scale for each entry and KV head: a little more than half the bytes of
    bfloat16, and texts that may differ. Raises UserError that says what is missing, damaged or unknown, or does not
    divide; a model is loaded whole or not at all.
    """
    for name, value, known in (("kernels", kernels, SETTINGS), ("cache", cache, CACHES)):
        if value not in known:
            raise UserError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
    source = open_model(path)
    dtype = source.stored_dtypes() if dtype == "stored" else jnp.dtype(dtype or default_dtype())
    abstract = abstract_params(source.config)
    params = source.load_params(abstract_like(abstract, dtype, _placement(abstract, tensor)))
    return Model(source.config, params, source.tokenizer, str(path), source.step, kernels, cache)


def _placement(abstract: Params, tensor: int):
    """Shardings of parameters: the first device, or the first `tensor` of them."""
    devices = jax.devices()
    if not 1 <= tensor <= len(devices):
        raise UserError(f"tensor is {tensor}, but there are {len(devices)} device(s) to split a model over")
    if tensor == 1:
        here = jax.sharding.SingleDeviceSharding(devices[0])
        return jax.tree.map(lambda _: here, abstract)
    return tree_shardings(abstract, make_mesh(MeshConfig(1, 1, tensor), devices[:tensor]))


def open_model(path: str | Path) -> ModelSource:
    """Finds out what lies at a path and checks it, without reading parameters."""
    path = Path(path)
    kind = _kind(path)
    if kind == "gguf":
        return open_gguf(path)
    if kind == "huggingface":
        return open_huggingface(path)
    config, tokenizer = workdirs.read_model_config(path), load_tokenizer(path)
    check_vocabulary(tokenizer, config, str(path))
    return WorkdirSource(path, config, tokenizer, latest_step(path))


def read_model_config(path: str | Path) -> ModelConfig:
    """The shape of the model at a path, such as for `config.model` of a run that starts from it."""
    path = Path(path)
    readers = {
        "gguf": read_gguf_config,
        "huggingface": read_huggingface_config,
        "workdir": workdirs.read_model_config,
    }
    return readers[_kind(path)](path)


def _kind(path: Path) -> str:
    """ "gguf", "huggingface" or "workdir"."""
    if not path.exists():
        raise UserError(f"no model at {path}: it does not exist")
    if path.is_file():
        if not is_gguf(path):
            raise UserError(f"{path} is a file, but not GGUF; give a GGUF file, a Hugging Face folder or a workdir")
        return "gguf"
    config = path / workdirs.CONFIG
    if not config.is_file():
        raise UserError(f"no model at {path}: it has no {workdirs.CONFIG}")
    return "huggingface" if is_huggingface_config(read_json(config)) else "workdir"
