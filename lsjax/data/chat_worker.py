"""Renders chat templates in a process of its own. `lsjax.data.chat` starts it; it imports nothing of lsjax.

It reads one JSON object per line from standard input (template, messages, special_tokens, max_characters, turns) and
answers each with one line: {"text": ...} or {"error": ...}, with turns also {"spans": [[start, end], ...]}.
"""

import datetime
import functools
import json
import re
import secrets
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

sys.path.append(sys.argv[1])

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MEMORY = 2 << 30  # bytes
_SECONDS = 60  # of one request: the end of a process that nobody stops because its parent was killed
_MARK = secrets.token_hex(16)  # stands at both ends of what the model is trained to say; no text can contain it
_GENERATION = re.compile(r"\{%-?\s*generation\b")


class GenerationTag(Extension):
    """Renders the body of {% generation %}, with which templates mark what the model is trained to say."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> nodes.Scope:
        """Parses one block. Its assignments stay inside it, as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        if getattr(self.environment, "marks_turns", False):
            mark = nodes.Output([nodes.TemplateData(_MARK)])
            body = [mark, *body, mark]
        return nodes.Scope(body, lineno=line)


def refuse(message: str) -> None:
    """Fails the rendering: templates call this as raise_exception."""
    raise jinja2.TemplateError(message)


def strftime_now(layout: str) -> str:
    """Returns the current local time in a layout of strftime."""
    return datetime.datetime.now().strftime(layout)


def to_json(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
    """Returns a value as JSON without escaping HTML, unlike Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **layout)


def render(
    template: str,
    messages: list,
    special_tokens: dict[str, str],
    max_characters: int,
    *,
    add_generation_prompt: bool = True,
    marks_turns: bool = False,
) -> str:
    """Returns the text of a conversation, with the functions and variables that transformers gives a template."""
    given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
    parts = _compiled(template, marks_turns).generate(given | special_tokens)
    return "".join(_limited(parts, max_characters))


def render_turns(
    template: str, messages: list, special_tokens: dict[str, str], max_characters: int
) -> tuple[str, list[tuple[int, int]]]:
    """Returns the text of a whole conversation and the characters, from start to end, of each of the assistant's turns.

    They are what {% generation %} marks. In a template without it, a turn is what its message adds to the text up to
    where the model answers.
    """
    whole = functools.partial(
        render, template, special_tokens=special_tokens, max_characters=max_characters, add_generation_prompt=False
    )
    if _GENERATION.search(template):
        return _split_at_marks(whole(messages=messages, marks_turns=True))
    text, spans = whole(messages=messages), []
    for index, message in enumerate(messages):
        if message.get("role") == "assistant":
            before = whole(messages=messages[:index], add_generation_prompt=True) if index else ""
            through = whole(messages=messages[: index + 1])
            if not (text.startswith(through) and through.startswith(before)):
                raise jinja2.TemplateError(
                    "it does not only add text for each message, so the assistant's turns cannot be found; mark them "
                    "with {% generation %} and {% endgeneration %} in the template"
                )
            spans.append((len(before), len(through)))
    return text, spans


def _split_at_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    text, spans = "", []
    for index, part in enumerate(marked.split(_MARK)):
        if index % 2:
            spans.append((len(text), len(text) + len(part)))
        text += part
    return text, spans


@functools.lru_cache(maxsize=4)
def _compiled(template: str, marks_turns: bool) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag]
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": strftime_now}
    environment.filters["tojson"] = to_json
    environment.extend(marks_turns=marks_turns)
    return environment.from_string(template)


def _limited(parts: Iterable[str], max_characters: int) -> Iterator[str]:
    written = 0
    for part in parts:
        written += len(part)
        if written > max_characters:
            raise jinja2.TemplateError(f"it writes more than {max_characters:,} characters")
        yield part


def main() -> None:
    """Answers requests until standard input ends."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    except (ImportError, OSError, ValueError):
        pass  # no such limit on this system
    print("ready", flush=True)
    for line in sys.stdin:
        _end_after(_SECONDS)
        try:
            request = json.loads(line)
            if request.pop("turns", False):
                text, spans = render_turns(**request)
                answer = {"text": text, "spans": spans}
            else:
                answer = {"text": render(**request)}
        except MemoryError:
            answer = {"error": f"it needs more than {_MEMORY >> 30} GiB of memory"}
        except Exception as error:  # a template is a program and may fail in any way
            answer = {"error": str(error) or type(error).__name__}
        print(json.dumps(answer), flush=True)
        _end_after(0)


def _end_after(seconds: int) -> None:
    """Lets a signal end this process after some seconds; 0 takes that back."""
    if hasattr(signal, "alarm"):
        signal.alarm(seconds)


if __name__ == "__main__":
    main()
