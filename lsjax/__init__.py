"""lsjax: LayerSkip in JAX. Trains a Llama whose early layers can already predict, then decodes faster with it.

Public names load at first use, so that `import lsjax` is quick and prints nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lsjax.config import Config as Config
    from lsjax.config import ModelConfig as ModelConfig
    from lsjax.config import default_config as default_config
    from lsjax.decoding.model import Model as Model
    from lsjax.decoding.model import load as load
    from lsjax.decoding.model import quantize as quantize
    from lsjax.decoding.program_cache import PROGRAM_CACHE as PROGRAM_CACHE
    from lsjax.decoding.results import GenerateResult as GenerateResult
    from lsjax.decoding.strategies import Autoregressive as Autoregressive
    from lsjax.decoding.strategies import EarlyExit as EarlyExit
    from lsjax.decoding.strategies import Sampling as Sampling
    from lsjax.decoding.strategies import SelfSpeculative as SelfSpeculative
    from lsjax.errors import UserError as UserError
    from lsjax.explain import layer_predictions as layer_predictions
    from lsjax.generation import Piece as Piece
    from lsjax.generation import generate as generate
    from lsjax.generation import stream as stream
    from lsjax.io.open import read_model_config as read_model_config
    from lsjax.layerskip.dropout import layer_dropout_rates as layer_dropout_rates
    from lsjax.layerskip.exits import exit_curriculum as exit_curriculum
    from lsjax.layerskip.exits import exit_weights as exit_weights
    from lsjax.model.transformer import forward as forward
    from lsjax.model.transformer import hidden_states as hidden_states
    from lsjax.reports.layer_predictions import LayerPredictions as LayerPredictions
    from lsjax.training.loop import train as train
    from lsjax.tuning.cost_model import Tuning as Tuning
    from lsjax.tuning.tune import tune as tune
    from lsjax.tuning.tune import tune_table as tune_table
    from lsjax.tuning.tuned_settings import TunedSetting as TunedSetting
    from lsjax.tuning.tuned_settings import TunedSettings as TunedSettings

    __version__: str

_MODULE_OF = {
    "Autoregressive": "decoding.strategies",
    "Config": "config",
    "EarlyExit": "decoding.strategies",
    "GenerateResult": "decoding.results",
    "LayerPredictions": "reports.layer_predictions",
    "Model": "decoding.model",
    "ModelConfig": "config",
    "PROGRAM_CACHE": "decoding.program_cache",
    "Piece": "generation",
    "Sampling": "decoding.strategies",
    "SelfSpeculative": "decoding.strategies",
    "TunedSetting": "tuning.tuned_settings",
    "TunedSettings": "tuning.tuned_settings",
    "Tuning": "tuning.cost_model",
    "UserError": "errors",
    "default_config": "config",
    "exit_curriculum": "layerskip.exits",
    "exit_weights": "layerskip.exits",
    "forward": "model.transformer",
    "generate": "generation",
    "hidden_states": "model.transformer",
    "layer_dropout_rates": "layerskip.dropout",
    "layer_predictions": "explain",
    "load": "decoding.model",
    "quantize": "decoding.model",
    "read_model_config": "io.open",
    "stream": "generation",
    "train": "training.loop",
    "tune": "tuning.tune",
    "tune_table": "tuning.tune",
}

# Written out, because type checkers read this list from the text. It holds the keys of _MODULE_OF.
__all__ = [
    "PROGRAM_CACHE",
    "Autoregressive",
    "Config",
    "EarlyExit",
    "GenerateResult",
    "LayerPredictions",
    "Model",
    "ModelConfig",
    "Piece",
    "Sampling",
    "SelfSpeculative",
    "TunedSetting",
    "TunedSettings",
    "Tuning",
    "UserError",
    "__version__",
    "default_config",
    "exit_curriculum",
    "exit_weights",
    "forward",
    "generate",
    "hidden_states",
    "layer_dropout_rates",
    "layer_predictions",
    "load",
    "quantize",
    "read_model_config",
    "stream",
    "train",
    "tune",
    "tune_table",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("lsjax")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'lsjax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lsjax.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
