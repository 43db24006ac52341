"""Values that do not belong in an argument, and what the few that do belong there mean."""

import decimal
import fractions
import functools
import math
import operator
import random
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

_PER_ARGUMENT = 12

ODD: dict[str, Any] = {
    "None": None, "True": True, "text 7": "7", "empty text": "", "bytes": b"7", "1.5": 1.5, "2.0": 2.0, "nan": math.nan,
    "inf": math.inf, "-inf": -math.inf, "-1": -1, "-0.5": -0.5, "0": 0, "2**31": 2**31, "2**32": 2**32, "2**63": 2**63,
    "2**64": 2**64, "-2**63": -(2**63), "10**40": 10**40, "10**400": 10**400, "1e-300": 1e-300, "1e300": 1e300,
    "empty list": [], "[1]": [1], "[[1]]": [[1]], "[None]": [None], "dict": {}, "dict of ids": {1: 2}, "set": {1},
    "object": object(), "1j": 1j, "np.float32 2": np.float32(2), "np.float64 nan": np.float64("nan"),
    "np.int64 2": np.int64(2), "np.uint8 2": np.uint8(2), "np.bool_": np.True_, "array of one number": np.array(2),
    "array [2]": np.array([2]), "empty array": np.zeros(0, np.int32), "array of texts": np.array(["a"]),
    "array of objects": np.array([object()]), "Decimal": decimal.Decimal(2), "Fraction": fractions.Fraction(3, 2),
    "function": print, "class": int, "range": range(1, 4), "generator": lambda: (i for i in (1, 2)), "slice": slice(1),
    "surrogate": "\ud800", "null character": "a\0b", "Ellipsis": ...,
    "nested 80 deep": functools.reduce(lambda inner, _: [inner], range(80), []),
    "a long text": "x" * 10_000, "jax number": lambda: jnp.int32(2), "jax array": lambda: jnp.arange(3.0),
}  # fmt: skip


class NotGood(Exception):  # noqa: N818 (an answer, not an error)
    """Says that a value has no good meaning for an argument, so that it must be refused."""


def whole(least: float, most: float = math.inf) -> Callable[[Any], int]:
    """Returns what turns a value into the whole number that it means, in least..most."""

    def meaning(value: Any) -> int:
        if isinstance(value, bool | np.bool_):
            raise NotGood
        try:
            number = operator.index(value)
        except TypeError:
            raise NotGood from None
        if not least <= number <= most:
            raise NotGood
        return number

    return meaning


def real(least: float, most: float) -> Callable[[Any], float]:
    """Returns what turns a value into the number that it means, in [least, most]."""

    def meaning(value: Any) -> float:
        try:
            number = math.nan if isinstance(value, bool | np.bool_ | str | bytes) else float(value)
        except (TypeError, ValueError, OverflowError):
            raise NotGood from None
        if np.ndim(value) or not least <= number <= most:
            raise NotGood
        return number

    return meaning


def each(meaning: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns what also accepts a list with one value per prompt, for one prompt."""

    def of_list(value: Any) -> Any:
        is_list = isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 1
        if not is_list or len(value) != 1:
            raise NotGood
        return meaning(value.tolist()[0] if hasattr(value, "tolist") else value[0])

    return either(meaning, of_list)


def one_of(*choices: Any) -> Callable[[Any], Any]:
    """Returns what accepts some values and nothing else."""

    def meaning(value: Any) -> Any:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise NotGood
        return value

    return meaning


def texts_of(value: Any) -> Any:
    """Accepts a text that is not empty, or a list of such texts; no texts at all mean no stop."""
    if isinstance(value, str) and value and value != "\ud800":
        return [value]
    if isinstance(value, list | tuple | set | np.ndarray) and len(value) == 0:
        return []
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind == "U":
        return value.tolist()
    raise NotGood


def ids_of(value: Any) -> list[int]:
    """Accepts a sequence of token ids of the tiny model."""
    if isinstance(value, str | bytes | dict) or not hasattr(value, "__len__") or np.ndim(list(value)) != 1:
        raise NotGood
    return [whole(0, 287)(token) for token in value]


def prompts_of(value: Any) -> list:
    """Accepts one text, or a list of texts and token lists."""
    if isinstance(value, str):
        if value == "\ud800" or len(value) > 100:
            raise NotGood
        return [value]
    if isinstance(value, bytes | dict | set) or not hasattr(value, "__len__") or len(value) == 0:
        raise NotGood
    return [prompt if isinstance(prompt, str) else ids_of(prompt) or never() for prompt in value]


def never(*_) -> Any:
    raise NotGood


def is_none(value: Any) -> None:
    if value is not None:
        raise NotGood


def either(*meanings: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns what accepts a value that one of some kinds accepts."""

    def meaning(value: Any) -> Any:
        for one in meanings:
            try:
                return one(value)
            except NotGood:
                continue
        raise NotGood

    return meaning


GENERATE: dict[str, Callable[[Any], Any]] = {
    "prompts": prompts_of,
    "max_new_tokens": each(whole(1, 100)),
    "strategy": never,
    "sampling": never,
    "seed": whole(0, 2**64 - 1),
    "stop": texts_of,
    "stop_tokens": each(ids_of),
    "batch_size": either(is_none, whole(1)),
}
SAMPLING = {
    "temperature": each(real(1e-6, 3e38)),
    "top_k": each(whole(0)),
    "top_p": each(real(1e-30, 1.0)),
    "coupled": one_of(False, True),
}
EARLY_EXIT = {"exit_layer": whole(1, 3)}
SPECULATIVE = {
    "exit_layer": either(one_of("auto"), whole(1, 3)),
    "num_speculations": either(one_of("auto"), whole(1, 64)),
    "draft_weights": either(is_none, one_of("int8")),
    "lookup": whole(0, 64),
    "draft_vocabulary": either(is_none, ids_of),
}
LOAD = {
    "path": never,
    "dtype": either(is_none),
    "tensor": whole(1, 1),
    "kernels": one_of("auto", "on", "off"),
    "for_decoding": either(one_of(False, True)),
    "weights": either(is_none, one_of("int8")),
    "cache": one_of("auto", "int8"),
}


def odd_values(rng: random.Random) -> list[tuple[str, Any]]:
    """Returns some odd values, always others, in the order of their table."""
    chosen = set(rng.sample(sorted(ODD), _PER_ARGUMENT))
    return [(name, value) for name, value in ODD.items() if name in chosen]


def value_of(value: Any) -> Any:
    """Returns an odd value; those of JAX are made late, so that listing the cases does not start it."""
    return value() if callable(value) and getattr(value, "__name__", "") == "<lambda>" else value
