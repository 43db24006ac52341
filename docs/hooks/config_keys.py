"""Writes the tables of configuration keys into the built pages, from the source of lsjax/config.py.

A page asks for a section with the comment `<!-- config keys: layerskip -->`. `mkdocs.yml` runs this file as a hook. It
reads the source without importing it: keys and defaults from the dataclass fields, meanings from the string under
each field.
"""

import ast
import re
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).parents[2] / "lsjax" / "config.py"
_MARK = re.compile(r"<!-- config keys: (\w+) -->")


class Key(NamedTuple):
    """One configuration key.

    name: below `config.`. type: as source text. default: as written on a command line. meaning: in Markdown.
    """

    name: str
    type: str
    default: str
    meaning: str


def on_page_markdown(markdown: str, **_) -> str:
    """Replaces each mark of a page by the table of its section (an event of MkDocs)."""
    if not _MARK.search(markdown):
        return markdown
    sections = config_sections(SOURCE.read_text(encoding="utf-8"))
    return _MARK.sub(lambda mark: table(sections[mark.group(1)]), markdown)


def config_sections(source: str) -> dict[str, list[Key]]:
    """Returns the keys of every section, and under "top" those that belong to no section.

    source: the text of lsjax/config.py.
    """
    module = ast.parse(source).body
    classes = {node.name: node for node in module if isinstance(node, ast.ClassDef)}
    aliases = {ast.unparse(node.targets[0]): ast.unparse(node.value) for node in module if isinstance(node, ast.Assign)}
    sections: dict[str, list[Key]] = {"top": []}
    for key in _fields(classes["Config"]):
        if key.type in classes:
            sections[key.name] = _section(classes, key.type, key.name)
        else:
            sections["top"].append(key)
    return {
        name: [key._replace(type=aliases.get(key.type, key.type)) for key in keys] for name, keys in sections.items()
    }


def table(keys: list[Key]) -> str:
    """Returns a Markdown table with one row per key."""
    lines = ["| key | default | meaning |", "| --- | --- | --- |"]
    for key in keys:
        choices = re.fullmatch(r"Literal\[(.*)\]", key.type)
        meaning = f"One of {_code(choices.group(1))}. {key.meaning}" if choices else key.meaning
        default = f"`{key.default}`" if key.default else "empty"
        lines.append(f"| `{key.name}` | {default} | {meaning.strip().replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def _section(classes: dict[str, ast.ClassDef], name: str, prefix: str) -> list[Key]:
    keys = []
    for key in _fields(classes[name]):
        if key.type in classes:
            keys += _section(classes, key.type, f"{prefix}.{key.name}")
        else:
            keys.append(key._replace(name=f"{prefix}.{key.name}"))
    return keys


def _fields(node: ast.ClassDef) -> list[Key]:
    keys = []
    for field, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign):
            continue
        default = ast.unparse(field.value).strip("'") if field.value else ""
        keys.append(Key(ast.unparse(field.target), ast.unparse(field.annotation), default, _text(after)))
    return keys


def _text(node: ast.stmt | None) -> str:
    """Returns the string that stands alone in a statement, on one line; "" for another statement."""
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return " ".join(node.value.value.split()) if is_text else ""


def _code(choices: str) -> str:
    return ", ".join(f"`{choice}`" for choice in ast.literal_eval(f"({choices},)"))
