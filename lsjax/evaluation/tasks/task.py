"""Defines what a task is: examples with prompts, and a score for each generated text."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Example(NamedTuple):
    """One example of a task.

    name: tells it from the others, for reports and messages. prompt: the text to continue.
    reference: what a continuation is compared with. test: a program that tests prompt and continuation, if the task
      runs code.
    """

    name: str
    prompt: str
    reference: str
    test: str = ""


class Task(Protocol):
    """A task: prompts that a model continues, and scores of the continuations."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the scores; the first one is the task's figure in tables."""
        ...

    @property
    def stop(self) -> tuple[str, ...]:
        """The texts that end a continuation, just before them."""
        ...

    @property
    def max_new_tokens(self) -> int:
        """The most new tokens per example, unless a person says otherwise."""
        ...

    def examples(self) -> Sequence[Example]:
        """Returns all examples, always in the same order. Raises UserError when they cannot be read."""
        ...

    def score(self, example: Example, text: str) -> dict[str, float]:
        """Returns {metric: score in 0..1} of a continuation."""
        ...
