"""Opening a model: a training workdir, a Hugging Face folder or a GGUF file."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lsjax.checkpoint import latest_step, load_params, load_part, stored_dtypes
from lsjax.config import MeshConfig, ModelConfig
from lsjax.data.tokenizer import Tokenizer, load_tokenizer
from lsjax.decoding.passes import CACHES, Weights, decoder_weights
from lsjax.decoding.weights import read_decoder_weights, stacked_params
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
            weights = decoder_weights(quantize_params(self._early(exit_layer)), default_dtype())
            self._drafting[exit_layer] = {key: weights[key] for key in ("layers", "lm_head")}
        return self._drafting[exit_layer]

    def _early(self, exit_layer: int) -> Params:
        return self.params | {"layers": jax.tree.map(lambda a: a[:exit_layer], self.params["layers"])}

    @functools.cached_property
    def _drafting(self) -> dict[int, Weights]:
        return {}

    @property
    def in_int8(self) -> bool:
        return is_quantized(self.params.get("lm_head"))


class DecodingModel(Model):
    """A model that holds its weights once, as decoding wants them; `params` are made of them each time."""

    @classmethod
    def holding(cls, weights: Weights, config: ModelConfig, *rest) -> "DecodingModel":
        """`rest`: what Model takes after `params`."""
        model = cls(config, None, *rest)
        del model.__dict__["params"]
        model.__dict__["decoder_weights"] = weights
        return model

    def __getattr__(self, name: str):
        if name != "params":
            raise AttributeError(name)
        return stacked_params(self.decoder_weights, abstract_params(self.config))

    def _early(self, exit_layer: int) -> Params:
        early = self.decoder_weights | {"layers": self.decoder_weights["layers"][:exit_layer]}
        return stacked_params(early, abstract_params(self.config))

    @property
    def in_int8(self) -> bool:
        return is_quantized(self.decoder_weights.get("lm_head"))


@dataclasses.dataclass(frozen=True)
class WorkdirSource:
    """The latest checkpoint of a training workdir."""

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer
    step: int

    def load_params(self, abstract: Params) -> Params:
        return load_params(self.path, abstract)[1]

    def load_rest(self, abstract: Params) -> Params:
        return load_part(self.path, self.step, abstract)

    def load_layers(self, name: str, abstract: jax.ShapeDtypeStruct) -> Iterator[jax.Array]:
        # In a checkpoint they are one array: it is read to the host.
        stacked = np.broadcast_to(np.zeros((), abstract.dtype), (self.config.num_layers, *abstract.shape))
        tree = functools.reduce(lambda tree, key: {key: tree}, reversed(name.split("/")), stacked)
        (stacked,) = jax.tree.leaves(load_part(self.path, self.step, tree))
        for layer in stacked:
            yield jax.device_put(layer, abstract.sharding)

    def stored_dtypes(self) -> Params:
        return stored_dtypes(self.path)


def quantize(model: Model) -> Model:
    """The model with int8 weights, a scale for each output channel; embedding, norms and activations are as they were.

    Another model, whose texts may differ. `generate`, `stream`, `tune` and `forward` take it as any other. A token
    reads half the bytes that it would in bfloat16 (TPU, GPU); on CPU it is slower than float32.
    """
    if model.in_int8:
        return model
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(Model)}
    return Model(**fields | {"params": quantize_params(fields["params"])})


def default_dtype() -> jnp.dtype:
    return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")


def load(
    path: str | Path,
    dtype: str | jnp.dtype | None = None,
    tensor: int = 1,
    kernels: str = "auto",
    for_decoding: bool = False,
    weights: str | None = None,
    cache: str = "auto",
) -> Model:
    """The model at a path: a training workdir (its latest checkpoint), a Hugging Face folder or a GGUF file.

    dtype: of the parameters; None is float32 on CPU and bfloat16 elsewhere, "stored" keeps what the files have.
    tensor: devices to split it over, by heads, feed-forward and vocabulary; each then computes its part of every
    token. kernels: whether Pallas kernels write and read the KV cache in decoding; "auto" is where they move fewer
    bytes, and what they cannot do plain JAX does. weights: "int8" is `quantize` of the model. cache: numbers of the KV
    cache; "auto" are those that are computed with, "int8" are rounded, with a float32 scale for each entry and KV head:
    a little more than half the bytes of bfloat16, and texts that may differ.

    for_decoding: holds the weights once, as decoding wants them, where `generate` otherwise makes a second copy of all;
    loading needs little more (in int8, little more than that). `params` are then a second copy, made each time they are
    asked for. Raises UserError that says what is missing, damaged or unknown, or does not divide; a model is
    loaded whole or not at all.
    """
    for name, value, known in (("kernels", kernels, SETTINGS), ("cache", cache, CACHES)):
        if value not in known:
            raise UserError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
    if weights not in (None, "int8"):
        raise UserError(f"weights is {weights!r}; it must be int8, or left away")
    if for_decoding and dtype is not None:
        raise UserError(f"dtype is {dtype!r}, but for_decoding holds weights in {default_dtype()} here: leave it away")
    source = open_model(path)
    abstract, mesh = abstract_params(source.config), _mesh(tensor)
    beside = source.tokenizer, str(path), source.step, kernels, cache
    if for_decoding:
        on_cpu = jax.default_backend() == "cpu"
        held = read_decoder_weights(source, abstract, default_dtype(), mesh, on_cpu, weights == "int8")
        return DecodingModel.holding(held, source.config, *beside)
    dtype = source.stored_dtypes() if dtype == "stored" else jnp.dtype(dtype or default_dtype())
    params = source.load_params(abstract_like(abstract, dtype, _placement(abstract, mesh)))
    model = Model(source.config, params, *beside)
    return quantize(model) if weights else model


def _mesh(tensor: int) -> Mesh | None:
    """Of the first `tensor` devices; None for one."""
    devices = jax.devices()
    if not 1 <= tensor <= len(devices):
        raise UserError(f"tensor is {tensor}, but there are {len(devices)} device(s) to split a model over")
    return make_mesh(MeshConfig(1, 1, tensor), devices[:tensor]) if tensor > 1 else None


def _placement(abstract: Params, mesh: Mesh | None):
    """Shardings of parameters: the first device, or the mesh."""
    if mesh:
        return tree_shardings(abstract, mesh)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda _: here, abstract)


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
