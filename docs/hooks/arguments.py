"""Lists the arguments that docstrings describe, in the built API pages.

lsjax's docstrings give each argument that is not obvious a block of its own, `name: meaning`. Markdown would join such
blocks into one paragraph. This extension of Griffe, which reads the sources for mkdocstrings, makes a list of them.
"""

import re

import griffe

_BLOCK = re.compile(r"(\w+(?:, \w+)*): (.*)")


class ArgumentLists(griffe.Extension):
    """Rewrites the docstring of every function and class that is loaded."""

    def on_function_instance(self, *, func: griffe.Function, **_) -> None:
        if func.docstring:
            names = {parameter.name for parameter in func.parameters}
            func.docstring.value = list_arguments(func.docstring.value, names)

    def on_class_members(self, *, cls: griffe.Class, **_) -> None:
        if cls.docstring:
            cls.docstring.value = list_arguments(cls.docstring.value, set(cls.attributes))


def list_arguments(text: str, names: set[str]) -> str:
    """Returns a docstring in Markdown where each block `name: meaning` is a list item.

    names: the arguments that exist; a line that starts with another word is text.
    """
    lines: list[str] = []
    in_list = False
    for line in text.splitlines():
        block = _BLOCK.fullmatch(line)
        goes_on = bool(lines) and bool(lines[-1]) and not lines[-1].endswith(".")  # inside a sentence
        if block and not goes_on and set(block.group(1).split(", ")) <= names:
            label = ", ".join(f"`{name}`" for name in block.group(1).split(", "))
            lines += ([] if in_list else [""]) + [f"- {label}: {block.group(2)}"]
            in_list = True
        elif in_list and line.strip() and (goes_on or line.startswith(" ")):
            lines.append(f"    {line.strip()}")
        else:
            lines += [""] if in_list and line.strip() else []
            lines.append(line)
            in_list = False
    return "\n".join(lines)
