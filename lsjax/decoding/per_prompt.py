"""Settings of a request: one value for all prompts, or a list with one value per prompt."""

from typing import Any

from lsjax.checks import attribute_of, entries_of
from lsjax.errors import UserError


def is_per_prompt(value: Any) -> bool:
    """Returns whether a setting has a value per prompt: a list, a tuple or an array of one axis."""
    is_array = attribute_of(value, "tolist") is not None
    return isinstance(value, list | tuple) or (is_array and attribute_of(value, "ndim", 0) == 1)


def is_list_per_prompt(value: Any) -> bool:
    """Returns whether a setting that is itself a list has a list per prompt."""
    return is_per_prompt(value) and len(value) > 0 and all(is_per_prompt(part) for part in value)


def freeze(name: str, value: Any) -> Any:
    """Returns the values per prompt as a tuple; a value for all prompts as it is. name: the setting's, for errors."""
    return tuple(entries_of(value, name)) if is_per_prompt(value) else value


def named_values(name: str, value: Any) -> list[tuple[str, Any]]:
    """Returns [(name, value)]; with a value per prompt [("name[0]", value of prompt 0), ...]."""
    if not is_per_prompt(value):
        return [(name, value)]
    return [(f"{name}[{index}]", part) for index, part in enumerate(value)]


def one_per_prompt(name: str, value: Any, count: int, is_list: bool = False) -> list[Any]:
    """Returns the values of `count` prompts. is_list: the setting of a single prompt is a list.

    Raises UserError when there is a value per prompt, but of another number of prompts.
    """
    if not (is_list_per_prompt(value) if is_list else is_per_prompt(value)):
        return [value] * count
    if len(value) != count:
        one = "one list for all" if is_list else "one value for all"
        raise UserError(f"{name} has {len(value)} values for {count} prompt(s): give {one}, or one per prompt")
    return list(value)
