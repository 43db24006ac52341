"""Describes a model that is still in its files, and reads its parameters."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import jax

from lsjax.config import ModelConfig
from lsjax.data.tokenizer import Tokenizer
from lsjax.errors import UserError
from lsjax.io.exit_adapter import read_exit_adapter
from lsjax.io.tensors import Tensors, check_tensors, place_layers, place_params, stored_dtypes
from lsjax.model.exit_adapter import ExitAdapter
from lsjax.model.transformer import Params


class ModelSource(Protocol):
    """An opened model: its config, tokenizer and tensors are checked, its parameters are not read yet.

    step: the training step of the checkpoint; None for a model that is not a workdir.
    """

    @property
    def config(self) -> ModelConfig: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def step(self) -> int | None: ...

    def load_params(self, abstract: Params) -> Params:
        """Reads all parameters with the shapes, dtypes and shardings of `abstract`."""
        ...

    def load_rest(self, abstract: Params) -> Params:
        """Reads the parameters that belong to no layer, as `load_params` does."""
        ...

    def load_layers(self, name: str, abstract: jax.ShapeDtypeStruct) -> Iterator[jax.Array]:
        """Reads the parameter `name`, such as layers/attention/qkv, one layer at a time.

        abstract: the shape, dtype and sharding of one layer's parameter.
        """
        ...

    def load_exit_adapter(self) -> ExitAdapter | None:
        """Reads the adapter of an exit, as a numpy array; None for a model without one."""
        ...

    def stored_dtypes(self) -> Params:
        """Returns the dtype that each parameter is stored in, as a tree of parameters."""
        ...


@dataclasses.dataclass(frozen=True)
class FileSource:
    """A model whose tensors are in files under their Hugging Face names.

    exit_adapter: where its exit's adapter may lie.
    """

    where: str
    config: ModelConfig
    tokenizer: Tokenizer
    tensors: Tensors
    exit_adapter: Path
    step: int | None = None

    def __post_init__(self):
        check_tensors(self.tensors, self.config, self.where)
        self.tokenizer.restrict_to(self.config.vocab_size, self.where)

    def load_params(self, abstract: Params) -> Params:
        with self._reading():
            return place_params(self.tensors, self.config, abstract)

    load_rest = load_params

    def load_layers(self, name: str, abstract: jax.ShapeDtypeStruct) -> Iterator[jax.Array]:
        with self._reading():
            yield from place_layers(self.tensors, self.config, name, abstract)

    def load_exit_adapter(self) -> ExitAdapter | None:
        return read_exit_adapter(self.exit_adapter, self.config)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.where} cannot be read: {error}") from None
        except UserError as error:  # about a tensor
            raise UserError(f"{self.where}: {error}") from None

    def stored_dtypes(self) -> Params:
        return stored_dtypes(self.tensors, self.config)


def abstract_like(shapes: Params, dtype: Any, shardings: Params) -> Params:
    """Returns abstract parameters with the shapes of `shapes`.

    dtype: one dtype for all parameters, or a tree with one for each.
    shardings: a tree with the sharding of each parameter.
    """
    dtypes = dtype if isinstance(dtype, dict) else jax.tree.map(lambda _: dtype, shapes)

    def describe(array, dtype, sharding):
        return jax.ShapeDtypeStruct(array.shape, dtype, sharding=sharding)

    return jax.tree.map(describe, shapes, dtypes, shardings)
