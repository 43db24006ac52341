"""lsjax: LayerSkip in JAX. Train a Llama whose early layers can already predict, then decode faster with it."""

from lsjax.config import Config, ModelConfig, default_config
from lsjax.decoding.generate import GenerateResult, Piece, generate, stream
from lsjax.decoding.settings import Tuning
from lsjax.decoding.strategies import Autoregressive, EarlyExit, Sampling, SelfSpeculative
from lsjax.decoding.tuning import tune
from lsjax.errors import UserError
from lsjax.layerskip.dropout import layer_dropout_rates
from lsjax.layerskip.exits import exit_curriculum, exit_weights
from lsjax.loading import Model, load, quantize, read_model_config
from lsjax.model.transformer import forward, hidden_states
from lsjax.training.loop import train

__all__ = [
    "Autoregressive",
    "Config",
    "EarlyExit",
    "GenerateResult",
    "Model",
    "ModelConfig",
    "Piece",
    "Sampling",
    "SelfSpeculative",
    "Tuning",
    "UserError",
    "default_config",
    "exit_curriculum",
    "exit_weights",
    "forward",
    "generate",
    "hidden_states",
    "layer_dropout_rates",
    "load",
    "quantize",
    "read_model_config",
    "stream",
    "train",
    "tune",
]
