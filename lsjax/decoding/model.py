"""A model ready to decode: its weights, its tokenizer, and `load`, which brings both in from disk."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lsjax.config import MeshConfig, ModelConfig
from lsjax.data.tokenizer import Tokenizer
from lsjax.decoding.draft_vocabulary import draft_token_ids, trim_head
from lsjax.decoding.forward import CACHES, EXIT_ADAPTER, Weights, decoder_weights
from lsjax.decoding.strategies import DraftVocabulary
from lsjax.decoding.weights import read_decoder_weights, stack_params
from lsjax.errors import UserError, shown
from lsjax.io.open import open_model
from lsjax.io.source import ModelSource, abstract_like
from lsjax.model.execution import accelerator_dtype
from lsjax.model.exit_adapter import ExitAdapter
from lsjax.model.quantization import is_quantized, quantize_params
from lsjax.model.transformer import Params, abstract_params, count_params
from lsjax.model.weight_layout import LeftOperand, OutputMajor, outputs_first
from lsjax.notebook import html_table
from lsjax.parallel.sharding import make_mesh, mesh_of, replicated_like, tree_shardings
from pallas_kernels.kv_cache.interface import SETTINGS

# Names that people and other libraries use for the dtypes that parameters may have.
_DTYPE_NAMES = {
    "float32": "float32",
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
}


@dataclasses.dataclass(eq=False, repr=False)
class Model:
    """A Llama with its tokenizer.

    params: the parameters, layers stacked [L, ...] as in training; None for a model that was loaded for decoding only.
    path, step: where the model was loaded from, and the training step of that checkpoint.
    kernels: "auto", "on" or "off": whether Pallas kernels write and read the KV cache.
    cache: "auto" or "int8": the numbers of the KV cache.
    decode_only: the weights laid out for decoding, in place of `params`.
    adapter: where the LoRA adapter came from that `load` merged into the weights.
    exit_adapter: the adapter of an exit, which drafts and early exits at that exit use; None for a model without one.
    """

    config: ModelConfig
    params: Params | None
    tokenizer: Tokenizer
    path: str = ""
    step: int | None = None
    kernels: str = "auto"
    cache: str = "auto"
    decode_only: Weights | None = None
    adapter: str | None = None
    exit_adapter: ExitAdapter | None = None
    _laid_out: Weights | None = dataclasses.field(default=None, init=False)
    _int8_drafters: dict[int, Weights] = dataclasses.field(default_factory=dict, init=False)
    _laid_out_adapter: tuple[ExitAdapter, ExitAdapter] | None = dataclasses.field(default=None, init=False)
    _draft_heads: dict[Any, Weights] = dataclasses.field(default_factory=dict, init=False)

    def decoder_weights(self) -> Weights:
        """Returns the weights laid out for decoding, a second copy of all parameters, made at the first call.

        In the default dtype; on a CPU with outputs as rows.
        """
        if self.decode_only is not None:
            return self.decode_only
        if self._laid_out is None:
            on_cpu = jax.default_backend() == "cpu"
            self._laid_out = decoder_weights(self.stack_params(), default_dtype(), for_cpu=on_cpu)
        return self._laid_out

    def stack_params(self) -> Params:
        """Returns `params`; for a model loaded for decoding only, stacks a new copy of them at every call."""
        if self.params is not None:
            return self.params
        assert self.decode_only is not None
        return stack_params(self.decode_only, abstract_params(self.config))

    def draft_weights(self, exit_layer: int) -> Weights:
        """Returns the first `exit_layer` layers and the head in int8, for drafting alone; made at the first call.

        Raises UserError when the model is in int8 already.
        """
        self.check_int8_drafts()
        if exit_layer not in self._int8_drafters:
            on_cpu, early = jax.default_backend() == "cpu", self.stack_early(exit_layer)
            weights = decoder_weights(quantize_params(early), default_dtype(), for_cpu=on_cpu)
            self._int8_drafters[exit_layer] = {key: weights[key] for key in ("layers", "lm_head")}
        return self._int8_drafters[exit_layer]

    @contextlib.contextmanager
    def passing_draft_weights(self) -> Iterator[None]:
        """Forgets at its end the int8 copies that `draft_weights` made within it, of many layers maybe."""
        before = set(self._int8_drafters)
        try:
            yield
        finally:
            for exit_layer in set(self._int8_drafters) - before:
                del self._int8_drafters[exit_layer]

    def draft_head(self, vocabulary: DraftVocabulary, weights: Weights) -> Weights:
        """Returns the head's rows for a draft vocabulary, for drafting alone; made at the first call.

        vocabulary: as in SelfSpeculative. weights: those whose head it is, the model's own or with an int8 head.
        Raises UserError when the vocabulary is not one of this model.
        """
        key = vocabulary, is_quantized(weights.get("lm_head"))
        if key not in self._draft_heads:
            ids = draft_token_ids(vocabulary, self.tokenizer, self.config.vocab_size, self.path)
            self._draft_heads[key] = trim_head(weights, ids)
        return self._draft_heads[key]

    def adapter_weights(self, exit_layer: int) -> Weights:
        """Returns the adapter of an exit, laid out for decoding: {exit_adapter}; empty if that exit has none."""
        adapter, weights = self.exit_adapter, self.decoder_weights()
        if adapter is None or adapter.exit_layer != exit_layer:
            return {}
        if self._laid_out_adapter is None or self._laid_out_adapter[0] is not adapter:
            on_one_cpu = jax.default_backend() == "cpu" and mesh_of(weights["embed"]) is None
            layout = LeftOperand if on_one_cpu else OutputMajor
            kernel = jnp.asarray(adapter.kernel, weights["embed"].dtype)
            laid_out = dataclasses.replace(adapter, kernel=layout(outputs_first(kernel, 1)))
            self._laid_out_adapter = adapter, jax.device_put(laid_out, replicated_like(weights["embed"]))
        return {EXIT_ADAPTER: self._laid_out_adapter[1]}

    def check_int8_drafts(self) -> None:
        """Raises UserError when the model is in int8 already."""
        if self.in_int8:
            raise UserError("draft_weights: this model is in int8 already, and drafts with its own early layers")

    def stack_early(self, exit_layer: int) -> Params:
        """Returns a copy of the parameters with the first `exit_layer` layers alone."""
        if self.params is not None:
            return self.params | {"layers": jax.tree.map(lambda a: a[:exit_layer], self.params["layers"])}
        assert self.decode_only is not None
        early = self.decode_only | {"layers": self.decode_only["layers"][:exit_layer]}
        return stack_params(early, abstract_params(self.config))

    @property
    def in_int8(self) -> bool:
        """True if the weights are int8 with scales."""
        weights = self.params if self.params is not None else self.decode_only
        return is_quantized((weights or {}).get("lm_head"))

    def __repr__(self) -> str:
        weights = self.params if self.params is not None else self.decode_only
        dtype = "int8" if self.in_int8 else (weights or {})["embed"].dtype
        parts = [f"{self.config.num_layers} layers", f"{count_params(self.config):,} parameters", f"{dtype}"]
        parts += [f"path={self.path!r}"] if self.path else []
        parts += [f"adapter={self.adapter!r}"] if self.adapter else []
        parts += [f"step={self.step}"] if self.step is not None else []
        parts += [f"adapter of exit {self.exit_adapter.exit_layer}"] if self.exit_adapter else []
        return f"Model({', '.join(parts)})"

    def _repr_html_(self) -> str:
        """Returns the table that a notebook shows."""
        c = self.config
        rows = [
            ("layers, width, feed-forward width", f"{c.num_layers}, {c.width}, {c.feed_forward_width}"),
            ("heads, KV heads, head width", f"{c.num_heads}, {c.num_kv_heads}, {c.head_width}"),
            ("vocabulary, context", f"{c.vocab_size:,}, {c.context_length:,}"),
            ("special tokens", ", ".join(self.tokenizer.special_tokens)),
        ]
        return html_table(("", ""), rows, caption=repr(self))


def check_model_type(model: Any) -> None:
    """Raises UserError unless `model` is a Model."""
    if not isinstance(model, Model):
        raise UserError(f"model must be a model, such as lsjax.load returns, got {shown(model)}")


def quantize(model: Model) -> Model:
    """Returns the model with int8 weights, one scale per output channel; embedding, norms and activations stay.

    It is another model, whose texts may differ. `generate`, `stream`, `tune` and `forward` take it as any other. A
    token reads half the bytes that it would in bfloat16 (TPU, GPU), or a quarter of those in float32 (CPU). On a single
    CPU decoding also rounds the states that a weight multiplies, one scale per token; `forward` does not.
    """
    check_model_type(model)
    if model.in_int8:
        return model
    return dataclasses.replace(model, params=quantize_params(model.stack_params()), decode_only=None)


def default_dtype() -> jnp.dtype:
    """Returns the dtype that models are loaded in: float32 on CPUs and on GPUs before A100, bfloat16 elsewhere."""
    return jnp.dtype("float32") if jax.default_backend() == "cpu" else accelerator_dtype(jax.devices()[0])


def load(
    path: str | Path,
    dtype: str | jnp.dtype | None = None,
    tensor: int = 1,
    kernels: str = "auto",
    for_decoding: bool = False,
    weights: str | None = None,
    cache: str = "auto",
    adapter: str | Path | None = None,
) -> Model:
    """Loads a model: a training workdir (its latest checkpoint), a Hugging Face folder, a GGUF file or a Hub name.

    path: a path, or a name on the Hugging Face Hub, org/name[@revision] or org/name[@revision]:FILE.gguf. Its files go
      into huggingface_hub's cache. A path that exists takes precedence.
    dtype: dtype of the parameters. None is float32 on CPUs and on GPUs of compute capability below 8.0, and bfloat16
      elsewhere; "stored" keeps that of the files.
    tensor: number of devices to split the model over, by heads, feed-forward width and vocabulary. Each device computes
      its part of every token.
    kernels: whether Pallas kernels write and read the KV cache. "auto" uses them where they move fewer bytes. Plain JAX
      does what they cannot.
    for_decoding: holds the weights once, laid out for decoding. Otherwise `generate` makes a second copy of all of
      them. Loading needs little more memory than the result. `params` is then None; `stack_params()` makes a copy.
    weights: "int8" quantizes the model (`quantize`).
    cache: numbers of the KV cache. "auto" is the compute dtype. "int8" rounds, with one float32 scale per entry and KV
      head: a little more than half the bytes of bfloat16, and texts that may differ.
    adapter: a LoRA adapter to merge into the model: a folder in PEFT's layout, or the workdir of a run with LoRA. The
      workdir alone finds its base model itself.

    Raises UserError that says what is missing, damaged, unknown or not divisible; nothing is loaded then.
    """
    _check_choices(kernels=(kernels, SETTINGS), cache=(cache, CACHES))
    if weights is not None and not (isinstance(weights, str) and weights == "int8"):
        raise UserError(f"weights is {shown(weights)}; it must be int8, or left away")
    if not isinstance(for_decoding, bool):
        raise UserError(f"for_decoding is {shown(for_decoding)}; it must be True or False")
    if for_decoding and dtype is not None:
        raise UserError(f"dtype is {shown(dtype)}, but for_decoding holds weights in {default_dtype()}: leave it away")
    wanted = _parse_dtype(dtype)
    source = open_model(path, adapter)
    abstract, mesh = abstract_params(source.config), _mesh(tensor)
    model = Model(source.config, None, source.tokenizer, str(path), source.step, kernels, cache)
    model.adapter = None if adapter is None else str(adapter)
    model.exit_adapter = _load_exit_adapter(source, wanted, mesh)
    if for_decoding:
        on_cpu = jax.default_backend() == "cpu"
        model.decode_only = read_decoder_weights(source, abstract, default_dtype(), mesh, on_cpu, weights == "int8")
        return model
    dtypes = source.stored_dtypes() if wanted is None else wanted
    model.params = source.load_params(abstract_like(abstract, dtypes, _placement(abstract, mesh)))
    return quantize(model) if weights else model


def _check_choices(**values: tuple[str, Sequence[str]]) -> None:
    """Raises UserError that names the first argument whose value is not one of the known ones: name=(value, known)."""
    for name, (value, known) in values.items():
        if not isinstance(value, str) or value not in known:
            raise UserError(f"{name} is {shown(value)}; it must be one of {', '.join(known)}")


def _load_exit_adapter(source: ModelSource, dtype: jnp.dtype | None, mesh: Mesh | None) -> ExitAdapter | None:
    """Reads the adapter of an exit; every device holds all of it. dtype: None keeps that of the file."""
    adapter = source.load_exit_adapter()
    if adapter is None:
        return None
    everywhere = NamedSharding(mesh, PartitionSpec()) if mesh else jax.devices()[0]
    return dataclasses.replace(adapter, kernel=jax.device_put(np.asarray(adapter.kernel, dtype), everywhere))


def _parse_dtype(dtype: str | jnp.dtype | None) -> jnp.dtype | None:
    """Returns the dtype of parameters by its name; None for "stored". Raises UserError for a dtype they cannot have."""
    if dtype is None or (isinstance(dtype, str) and dtype == "auto"):
        return default_dtype()
    if isinstance(dtype, str) and dtype == "stored":
        return None
    try:
        if isinstance(dtype, jax.Array | np.ndarray | np.generic):
            raise TypeError  # a value, which JAX would convert to its dtype with a warning
        name = dtype.removeprefix("torch.") if isinstance(dtype, str) else jnp.dtype(dtype).name
    except Exception:  # TypeError, or what an object of the caller's own raises
        name = shown(dtype)
    if name == "int8":
        raise UserError(
            'dtype is int8, which would cut weights to whole numbers: load(..., weights="int8") quantizes them'
        )
    if name not in _DTYPE_NAMES:
        raise UserError(f'dtype is {shown(dtype)}; it must be "float32", "bfloat16", "float16" or "stored"')
    return jnp.dtype(_DTYPE_NAMES[name])


def _mesh(tensor: int) -> Mesh | None:
    """Returns a mesh of the first `tensor` devices; None for one device."""
    devices = jax.devices()
    if isinstance(tensor, bool) or not isinstance(tensor, int) or not 1 <= tensor <= len(devices):
        raise UserError(f"tensor is {shown(tensor)}, but there are {len(devices)} device(s) to split a model over")
    return make_mesh(MeshConfig(1, 1, tensor), devices[:tensor]) if tensor > 1 else None


def _placement(abstract: Params, mesh: Mesh | None) -> Params:
    """Returns shardings of the parameters: the first device, or the mesh."""
    if mesh:
        return tree_shardings(abstract, mesh)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda _: here, abstract)
