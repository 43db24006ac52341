"""Conversations in a model's own chat template, the Jinja program that Hugging Face models carry."""

import datetime
import functools
import json
from collections.abc import Sequence
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lsjax.errors import UserError


def render_chat(template: Any, messages: Sequence[dict[str, str]], special_tokens: dict[str, Any]) -> str:
    """The text of a conversation up to where the model answers. Templates run sandboxed, with the functions that
    transformers gives them."""
    if isinstance(template, list):  # several templates, by name
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    if not template or not isinstance(template, str):
        raise UserError("this model has no chat template; prompt it with plain text")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now}
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    given = {"messages": list(messages), "tools": None, "documents": None, "add_generation_prompt": True}
    try:
        return environment.from_string(template).render(**given, **special_tokens)
    except Exception as error:  # a template is a program: it may fail in any way
        raise UserError(f"the model's chat template does not take this conversation: {error}") from None


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)
