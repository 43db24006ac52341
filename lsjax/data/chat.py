"""Renders conversations with a model's chat template, the Jinja program that comes with Hugging Face models.

A template comes from a stranger. It runs in Jinja's sandbox, which keeps it from the machine, and in a process of its
own, which can be stopped: a sandbox alone bounds neither time nor memory (two nested ranges loop for minutes).
"""

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from lsjax.errors import UserError

_MAX_SECONDS = 10.0  # for one conversation; real templates take milliseconds
_START_SECONDS = 120.0  # for the process to come up on a busy machine
_MAX_CHARACTERS = 10_000_000


def render_chat(template: Any, messages: Sequence[dict[str, Any]], special_tokens: dict[str, str]) -> str:
    """Returns the text of a conversation, up to where the model answers.

    template: chat_template of tokenizer_config.json, as found there.
    special_tokens: texts that the template may use, such as bos_token.

    Raises UserError when the model has no template, and when the template fails, takes longer than 10 seconds, or
    writes more than 10 million characters.
    """
    return _ask(template, messages, special_tokens)["text"]


def render_turns(
    template: Any, messages: Sequence[dict[str, Any]], special_tokens: dict[str, str]
) -> tuple[str, list[tuple[int, int]]]:
    """Returns the text of a whole conversation and the characters, from start to end, of each of the assistant's turns.

    Arguments and errors are those of `render_chat`. Raises UserError also when the template is not one that only adds
    text for each message and does not mark the turns with {% generation %} either.
    """
    answer = _ask(template, messages, special_tokens, turns=True)
    return answer["text"], [(start, end) for start, end in answer["spans"]]


def _ask(template: Any, messages: Sequence[dict[str, Any]], special_tokens: dict[str, str], **more: Any) -> dict:
    """Returns the answer of the process that renders. Raises UserError for a template or conversation that is none."""
    if isinstance(template, list):  # several templates, each with a name
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    if not template or not isinstance(template, str):
        raise UserError("this model has no chat template; prompt it with plain text")
    if not isinstance(messages, list | tuple) or not all(isinstance(message, dict) for message in messages):
        raise UserError('a conversation must be a list of messages such as {"role": "user", "content": "Hello"}')
    request = {"template": template, "messages": list(messages), "special_tokens": special_tokens}
    try:
        line = json.dumps(request | {"max_characters": _MAX_CHARACTERS} | more)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"a conversation must hold only values of JSON: {error}") from None
    answer = _WORKER.ask(line)
    if "text" not in answer:
        raise UserError(f"the model's chat template does not take this conversation: {answer['error']}")
    return answer


class _Worker:
    """The process that renders, started at the first conversation and again after it had to be killed."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._owner = 0

    def ask(self, line: str) -> dict[str, Any]:
        """Returns the answer to one request. Threads take turns."""
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            try:
                process.stdin.write(line + "\n")
                process.stdin.flush()
            except OSError:
                pass  # it died: there will be no answer
            answer = _read_line(process, _MAX_SECONDS)
            if answer:
                return json.loads(answer)
            self.stop()
            return {"error": f"it takes longer than {_MAX_SECONDS:g} seconds, or ended its process"}

    def stop(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        # A forked child shares the pipes of its parent's process, which is not its to end.
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()

    def _running(self) -> subprocess.Popen:
        if self._process is None or self._owner != os.getpid():
            packages = Path(jinja2.__file__).parent.parent
            command = [sys.executable, "-I", str(Path(__file__).with_name("chat_worker.py")), str(packages)]
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8"
                )
            except OSError as error:
                raise UserError(f"cannot start the process that renders chat templates: {error}") from None
            self._owner = os.getpid()
            if not _read_line(self._process, _START_SECONDS):
                self.stop()
                raise UserError(f"the process that renders chat templates does not start: {' '.join(command)}")
        return self._process


def _read_line(process: subprocess.Popen, seconds: float) -> str:
    """Returns the next line that a process writes, or "" when it ends or time runs out."""
    assert process.stdout is not None
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        line = process.stdout.readline()
    finally:
        timer.cancel()
    return line if line.endswith("\n") else ""


_WORKER = _Worker()
atexit.register(_WORKER.stop)
