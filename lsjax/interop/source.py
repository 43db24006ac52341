"""A model that is still in its files: what it is, and how to bring its parameters in."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Protocol

import jax

from lsjax.config import ModelConfig
from lsjax.data.tokenizer import Tokenizer
from lsjax.errors import UserError
from lsjax.interop.tensors import Tensors, check_tensors, place_layers, place_params, stored_dtypes
from lsjax.model.transformer import Params


class ModelSource(Protocol):
    """Everything about it was checked when it was opened; only then are parameters read."""

    config: ModelConfig
    tokenizer: Tokenizer
    step: int | None

    def load_params(self, abstract: Params) -> Params:
        """Parameters laid out as `abstract` says: shape, dtype and sharding of each."""

    def load_rest(self, abstract: Params) -> Params:
        """The same of parameters that belong to no layer."""

    def load_layers(self, name: str, abstract: jax.ShapeDtypeStruct) -> Iterator[jax.Array]:
        """The parameter `name` (layers/attention/qkv) of one layer after the other, each as `abstract` says."""

    def stored_dtypes(self) -> Params:
        """The dtype that each parameter is stored in, as a tree of parameters."""


@dataclasses.dataclass(frozen=True)
class FileSource:
    """A model whose tensors lie in files by their Hugging Face names."""

    where: str
    config: ModelConfig
    tokenizer: Tokenizer
    tensors: Tensors
    step: int | None = None

    def __post_init__(self):
        check_tensors(self.tensors, self.config, self.where)
        check_vocabulary(self.tokenizer, self.config, self.where)

    def load_params(self, abstract: Params) -> Params:
        with self._reading():
            return place_params(self.tensors, self.config, abstract)

    load_rest = load_params

    def load_layers(self, name: str, abstract: jax.ShapeDtypeStruct) -> Iterator[jax.Array]:
        with self._reading():
            yield from place_layers(self.tensors, self.config, name, abstract)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.where} cannot be read: {error}") from None

    def stored_dtypes(self) -> Params:
        return stored_dtypes(self.tensors, self.config)


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, where: str) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{where}: its tokenizer has {tokenizer.vocab_size} tokens, its embedding {config.vocab_size}")


def abstract_like(shapes: Params, dtype, shardings: Params) -> Params:
    """The same shapes in one dtype, or a tree of them, laid out by a tree of shardings."""
    dtypes = dtype if isinstance(dtype, dict) else jax.tree.map(lambda _: dtype, shapes)
    describe = lambda a, d, s: jax.ShapeDtypeStruct(a.shape, d, sharding=s)  # noqa: E731
    return jax.tree.map(describe, shapes, dtypes, shardings)
