"""Checks of the arrays and numbers that a caller passes to the functions of the Python API.

Each failure is a UserError of one line that names the argument and the fix (lsjax/checks.py checks configurations).
Shapes and dtypes are checked everywhere, also in a trace, where they are known. Values are checked only where they are
concrete: a traced call adds no computation and no host sync.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from lsjax.checks import MAX_INTEGER, attribute_of
from lsjax.config import ModelConfig
from lsjax.errors import UserError, shown
from lsjax.model.quantization import is_quantized


def concrete(value: Any) -> np.ndarray | None:
    """Returns the value as a numpy array; None when it is traced or spread over other hosts' devices."""
    if isinstance(value, Tracer) or (isinstance(value, jax.Array) and not value.is_fully_addressable):
        return None
    return np.asarray(value)


def check_integer(name: str, value: Any, least: int, most: int = MAX_INTEGER) -> None:
    """Raises UserError unless the value is an integer in least..most. A traced value passes."""
    found = _scalar(value)
    if found is None:
        return
    if found.dtype.kind not in "iu" or not least <= int(found) <= most:
        limits = f"of at least {least}" if most == MAX_INTEGER else f"in {least}..{most}"
        raise UserError(f"{name} must be an integer {limits}, got {describe(value)}")


def check_number(name: str, value: Any, least: float, most: float) -> None:
    """Raises UserError unless the value is a number in [least, most]. A traced value passes."""
    found = _scalar(value)
    if found is None:
        return
    if not is_numeric(found.dtype) or not least <= float(found) <= most:
        raise UserError(f"{name} must be a number in [{least:g}, {most:g}], got {describe(value)}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises UserError unless the value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{name} is {describe(value)}; choose one of {', '.join(choices)}")


def check_params(params: Any, config: Any, shapes: Callable[[ModelConfig], Any]) -> None:
    """Raises UserError unless `params` are the stacked parameters of a model of this shape.

    shapes: returns the tree of parameters, as abstract arrays, that a config has. Weights in int8 have their own layout
      and are not compared.
    """
    if not isinstance(config, ModelConfig):
        raise UserError(f"config must be a ModelConfig, such as model.config, got {describe(config)}")
    if not isinstance(params, dict) or not {"embed", "layers", "final_norm"} <= params.keys():
        raise UserError(
            f"params must be a dict of embed, layers and final_norm, such as model.params, got {describe(params)}"
        )
    shape = attribute_of(params["embed"], "shape", ())
    if len(shape) != 2 or shape[1] != config.width:
        raise UserError(
            f"params: embed has the shape {list(shape)}, but config.width is {config.width}; pass the model's own"
        )
    layers = {attribute_of(leaf, "shape", ())[:1] for leaf in jax.tree.leaves(params["layers"])}
    if layers != {(config.num_layers,)}:
        raise UserError(
            f"params: the layers are not stacked as [{config.num_layers}, ...], but config.num_layers is "
            f"{config.num_layers}; pass the model's own"
        )
    for path, wanted in jax.tree_util.tree_leaves_with_path(shapes(config)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found: Any = params
        for key in path:
            if not isinstance(found, dict) or key.key not in found:
                raise UserError(f"params must hold {name}, as model.params does")
            found = found[key.key]
        if not is_quantized(found):
            _check_weight(name, found, wanted.shape)
    head = params.get("lm_head")
    if head is not None and not is_quantized(head):
        _check_weight("lm_head", head, (config.width, config.vocab_size))


def _check_weight(name: str, weight: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(weight, (jax.Array, np.ndarray)) or not jax.numpy.issubdtype(weight.dtype, jax.numpy.floating):
        raise UserError(f"params: {name} must be an array of floating-point numbers, got {describe(weight)}")
    if weight.shape != shape:
        raise UserError(
            f"params: {name} has the shape {list(weight.shape)}, but config says {list(shape)}; pass the model's own"
        )


def check_tokens(tokens: Any, vocab_size: int) -> None:
    """Raises UserError unless `tokens` are ids [B,S] in 0..vocab_size - 1, with at least one of them."""
    rows = as_array("tokens", tokens)
    if rows.ndim != 2 or 0 in rows.shape:
        raise UserError(f"tokens must be ids [B,S] with B and S of at least 1, got {describe(tokens)}")
    if not jax.numpy.issubdtype(rows.dtype, jax.numpy.integer):
        raise UserError(f"tokens must be integers, got {describe(tokens)}")
    ids = concrete(rows)
    if ids is not None and not 0 <= ids.min() <= ids.max() < vocab_size:
        wrong = int(ids.min() if ids.min() < 0 else ids.max())
        raise UserError(f"tokens has the id {wrong}; ids of this model are 0..{vocab_size - 1}")


def check_layer_mask(layer_mask: Any, num_layers: int, batch: int) -> None:
    """Raises UserError unless the mask is numbers [L] or [L,B]."""
    mask = as_array("layer_mask", layer_mask)
    if mask.shape not in ((num_layers,), (num_layers, batch)) or not (is_numeric(mask.dtype) or mask.dtype == bool):
        raise UserError(
            f"layer_mask must be numbers [{num_layers}] or [{num_layers}, {batch}] (layers, sequences), "
            f"got {describe(layer_mask)}"
        )
    values = concrete(mask)
    if values is not None and not np.isfinite(values.astype(np.float32)).all():
        raise UserError("layer_mask must be finite, got inf or NaN")


def is_numeric(dtype: Any) -> bool:
    """Returns whether the dtype is that of real numbers, without bool."""
    return jax.numpy.issubdtype(dtype, jax.numpy.integer) or jax.numpy.issubdtype(dtype, jax.numpy.floating)


def describe(value: Any) -> str:
    """Describes a value in a few words on one line: plain values themselves, arrays by dtype and shape."""
    if isinstance(value, Tracer) or (isinstance(value, (jax.Array, np.ndarray)) and value.ndim):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, (jax.Array, np.ndarray)):
        return f"{value} ({value.dtype})"
    if not isinstance(value, (bool, int, float, str, bytes, list, tuple, type(None), np.generic)):
        return f"a {type(value).__name__}"
    text = shown(value)
    return text if len(text) <= 60 else f"{text[:50]} ..."


def as_array(name: str, value: Any) -> Any:
    """Returns an array as it is and anything else as a numpy array. Raises UserError for ragged lists."""
    if isinstance(value, (jax.Array, np.ndarray)):
        return value
    try:
        return np.asarray(value)
    except Exception:  # rows of different lengths, a range of more entries than memory, an object's own errors
        raise UserError(f"{name} must be an array with rows of equal length, got {describe(value)}") from None


def _scalar(value: Any) -> np.ndarray | None:
    """Returns a single value as a numpy array, of dtype object when it is none; None when it is traced."""
    if attribute_of(value, "__len__") is not None and attribute_of(value, "dtype") is None:
        return np.asarray(None)
    try:
        found = concrete(value)
    except Exception:  # an object's own errors
        return np.asarray(None)
    return found if found is None or found.ndim == 0 else np.asarray(None)
