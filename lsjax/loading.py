"""Opening a trained model."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp

from lsjax.checkpoint import load_params
from lsjax.config import ModelConfig
from lsjax.data.tokenizer import Tokenizer, load_tokenizer
from lsjax.decoding.passes import Weights, decoder_weights
from lsjax.errors import UserError
from lsjax.model.transformer import Params, init_params
from lsjax.training import workdir as workdirs


@dataclasses.dataclass(frozen=True)
class Model:
    """A model and what reads and writes its tokens. `params` are stacked [L, ...], as in training."""

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    path: str = ""
    step: int | None = None

    @functools.cached_property
    def decoder_weights(self) -> Weights:
        """The parameters laid out for decoding: float32 on CPU, bfloat16 elsewhere."""
        return decoder_weights(self.params, default_dtype())


def default_dtype() -> jnp.dtype:
    return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")


def load(path: str | Path) -> Model:
    """The latest checkpoint of a training workdir. Raises UserError that says what is missing or damaged."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"no model at {path}: it does not exist")
    config = workdirs.read_config(path).model
    tokenizer = load_tokenizer(path / workdirs.TOKENIZER)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{path / workdirs.TOKENIZER} has {tokenizer.vocab_size} tokens, the model's embedding {config.vocab_size}"
        )
    # Whatever mesh it was saved from, here it lies whole on one device.
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), shapes)
    step, params = load_params(path, abstract)
    return Model(config, params, tokenizer, str(path), step)
