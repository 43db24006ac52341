"""The one exception for bad input."""

from typing import Any

LONGEST_SHOWN = 100  # characters of a value
_LONGEST, _HEAD, _TAIL = 1500, 1000, 400  # characters of a message


class UserError(Exception):
    """Bad input that a person can fix. The message is one line that names the key, flag or file, and the fix.

    Commands print it on standard error and exit with status 2. A message that quotes something with line breaks, or
    something very long, is put on one line and cut in its middle.
    """

    def __init__(self, message: str):
        line = " ".join(message.split())
        super().__init__(line if len(line) <= _LONGEST else f"{line[:_HEAD]} ... {line[-_TAIL:]}")


def shown(value: Any) -> str:
    """Returns a value as a message quotes it: on one line, cut where it is long."""
    try:
        text = repr(value)
    except Exception:  # an integer of thousands of digits, or an object whose own repr fails
        text = f"a very long {type(value).__name__}" if isinstance(value, int) else f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 4]} ..."
