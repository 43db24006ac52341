"""Checks of values that people give. Each failure is a UserError of one line that names the key."""

import dataclasses
import difflib
import itertools
import math
import typing
from typing import Any, TypeVar

from lsjax.errors import LONGEST_SHOWN, UserError, shown

T = TypeVar("T")

MAX_SEED = 2**32 - 1  # seeds that differ by a multiple of 2**32 would draw the same numbers
MAX_FLOAT = 3.4e38  # numbers reach the device as float32
MAX_INTEGER = 2**31 - 1  # steps, sizes and counts reach the device as int32


def require(condition: bool, message: str) -> None:
    """Raises UserError with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def check_positive(section: str, values: Any, *names: str) -> None:
    """Raises UserError that names the first attribute of `values` that is not positive, or is infinite."""
    for name in names:
        value = getattr(values, name)
        require(0 < value < math.inf, f"config.{section}.{name} must be positive, got {value}")


def check_seed(seed: Any, name: str) -> int:
    """Returns `seed`. Raises UserError, with `name` in it, unless it is an integer from 0 to 2**32 - 1."""
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise UserError(f"{name} must be an integer, got {shown(seed)} ({type(seed).__name__})")
    require(seed >= 0, f"{name} must not be negative, got {shown(seed)}")
    require(seed <= MAX_SEED, f"{name} must be at most {MAX_SEED} (2**32 - 1), got {shown(seed)}")
    return seed


def attribute_of(value: Any, attribute: str, default: Any = None) -> Any:
    """Returns an attribute of any object, or `default` where it has none, or fails to look for it."""
    try:
        return getattr(value, attribute, default)
    except Exception:  # of a class of the caller's own
        return default


def length_of(values: Any, name: str) -> int:
    """Returns the length of a list, or of an object of any class. Raises UserError, with `name` in it, for none."""
    try:
        return len(values)
    except Exception as error:  # of a class of the caller's own
        raise UserError(f"{name} cannot be read: {shown(error)}") from error


def entries_of(values: Any, name: str) -> list[Any]:
    """Returns the entries of a list, an array (as Python's own values), or an object of any class, read once.

    Raises UserError, with `name` in it, when they cannot be read, or when there are not as many as its length says.
    """
    try:
        values = values.tolist() if attribute_of(values, "tolist") else values
        count = len(values)
        found = list(itertools.islice(values, count + 1))
    except Exception as error:  # of a class of the caller's own
        raise UserError(f"{name} cannot be read: {shown(error)}") from error
    require(len(found) == count, f"{name} cannot be read: its length is {count}, but it has other entries")
    return found


def build_dataclass(cls: type[T], tree: Any, path: str) -> T:
    """Builds a dataclass, and those nested in it, from a dict of plain values.

    Raises UserError that names the first unknown key or wrong type. path: the name of this section in messages.
    """
    if not isinstance(tree, dict):
        raise UserError(f"{path} must be a section of keys, got {shown(tree)}")
    types = typing.get_type_hints(cls)
    for key in tree:
        if not isinstance(key, str) or key not in types:
            name = key[:LONGEST_SHOWN] if isinstance(key, str) else shown(key)
            close = difflib.get_close_matches(name, types, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; known keys: {', '.join(types)}"
            raise UserError(f"unknown config key {path}.{name}{hint}")
    return cls(**{key: _convert(types[key], value, f"{path}.{key}") for key, value in tree.items()})


def _convert(kind: Any, value: Any, path: str) -> Any:
    """Returns `value` as the type of a field: a dataclass, a Literal of texts, or int, float, bool or str."""
    if dataclasses.is_dataclass(kind):
        return build_dataclass(typing.cast(type, kind), value, path)
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        require(
            isinstance(value, str) and value in choices,
            f"{path} is {shown(value)}; choose one of {', '.join(choices)}",
        )
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        require(abs(value) <= 2**53, f"{path} must be a float, got the integer {shown(value)}")
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"{path} must be {kind.__name__}, got {shown(value)} ({type(value).__name__})")
    if kind is float:
        require(math.isfinite(value), f"{path} must be a finite number, got {value}")
        require(abs(value) <= MAX_FLOAT, f"{path} must be at most {MAX_FLOAT}, got {value}")
    if kind is int and not path.endswith(".seed"):  # check_seed has its own limit
        require(abs(value) <= MAX_INTEGER, f"{path} must be at most {MAX_INTEGER}, got {shown(value)}")
    return value


def first_difference(a: Any, b: Any, path: str) -> tuple[str, Any, Any] | None:
    """Returns (path, value in a, value in b) of the first key in which two nested dicts differ, or None."""
    return next(iter(differences(a, b, path)), None)


def differences(a: Any, b: Any, path: str) -> list[tuple[str, Any, Any]]:
    """Returns (path, value in a, value in b) for every key in which two nested dicts differ."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return [] if a == b else [(path, a, b)]
    return [found for key in {**b, **a} for found in differences(a.get(key), b.get(key), f"{path}.{key}")]
