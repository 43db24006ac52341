"""Values that look like what an argument takes: classes for their instances, ranges without end, sets, views, bytes."""

import array
import collections
import dataclasses
import enum
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import lsjax
from tests.fuzz.harness import Case
from tests.fuzz.parts import NEW_TOKENS, PROMPT
from tests.fuzz.reader_cases import equals


class _Two(enum.IntEnum):
    TWO = 2


def _raise(*_: Any) -> Any:
    raise RuntimeError("a fault\nof the class")


def _lists() -> dict[str, Any]:
    """Returns lists and objects like lists whose methods fail, lie, or never end."""
    kinds: dict[str, tuple[type, dict[str, Any]]] = {
        "no length": (list, {"__len__": _raise}),
        "no entries": (list, {"__iter__": _raise}),
        "a tuple without entries": (tuple, {"__iter__": _raise}),
        "no entry": (object, {"__len__": lambda self: 2, "__getitem__": _raise}),
        "an iterator that fails": (object, {"__len__": lambda self: 2, "__iter__": lambda self: map(_raise, (1,))}),
        "no end": (object, {"__len__": lambda self: 2, "__getitem__": lambda self, index: 1}),
        "fewer entries": (object, {"__len__": lambda self: 2, "__iter__": lambda self: iter((1,))}),
        "a negative length": (object, {"__len__": lambda self: -1, "__getitem__": _raise}),
        "no index": (object, {"__index__": _raise}),
        "no attributes": (object, {"__getattr__": _raise}),
        "no attributes but a length": (object, {"__getattr__": _raise, "__len__": lambda self: 2}),
        "no length to ask for": (object, {"__len__": property(_raise)}),
        "no number of axes": (object, {"ndim": property(_raise), "tolist": lambda self: [1]}),
    }
    made = {}
    for name, (base, methods) in kinds.items():
        cls = type(name.title().replace(" ", ""), (base,), methods)
        made[name] = cls() if base is object else cls((1, 2))
    return made


LISTS = _lists()
OBJECTS: dict[str, Any] = {
    "no attributes": LISTS["no attributes"],
    "no length to ask for": LISTS["no length to ask for"],
    "no path": type("NoPath", (), {"__fspath__": _raise})(),
    "a path that is a number": type("NumberPath", (), {"__fspath__": lambda self: 3})(),
    "no dtype": type("NoDtype", (), {"dtype": property(_raise), "__len__": lambda self: 1})(),
    "no copy": type("NoCopy", (), {"__deepcopy__": _raise})(),
    "no text": type("NoText", (), {"__repr__": _raise})(),
}


class _Word(str):
    __slots__ = ()


_LONG = range(10**12)
_RAGGED = [[1], [2, 3]]
_FIELDS = types.SimpleNamespace(temperature=1.0, top_k=0, top_p=1.0)

REFUSED: dict[str, list[Any]] = {
    "sampling": [lsjax.Sampling, _FIELDS, types.MappingProxyType({}), ("temperature", 1.0), lsjax.Autoregressive()],
    "strategy": [lsjax.Autoregressive, lsjax.EarlyExit, "autoregressive", lsjax.Sampling(), lsjax.EarlyExit(True),
                 lsjax.EarlyExit(np.float32(1)), lsjax.SelfSpeculative(1, "2"), lsjax.SelfSpeculative("AUTO", 2)],
    "stop": ["\ud800", ["a", "\udc80"], b"", bytearray(b"a"), memoryview(b"a"), _LONG, range(0), {"a"}, {"a": 1},
             [b"a"], [[["a"]]], collections.UserString("a"), 3],
    "stop_tokens": [_LONG, [2**70], [-1], [1.0], b"a", "a", {1: 2}, [[[1]]], np.array([1.0]), np.array([True]), [None],
                    iter([1]), np.ma.array([1.5])],
    "prompts": [[_LONG], _LONG, frozenset({"a"}), types.MappingProxyType({1: 2}), collections.UserDict({1: 2}), [b"ab"],
                [bytearray(b"ab")], [memoryview(b"ab")], [[1.0]], [[True]], [["a"]], [None], [[]], [frozenset({1})],
                [np.array([[1, 2]])], [np.array([1.0])], [[2**70]], [[-1]], iter(["a"]), [range(0)], ["a", 3]],
    "max_new_tokens": [_LONG, "4", 4.0, True, np.float32(4), np.array(4), np.array([4.0]), 2**40, -1, 0],
    "batch_size": [_LONG, "1", 1.0, True, 0, -1],
    "seed": [_LONG, "1", 1.0, True, -1, 2**64, np.float64(1)],
}  # fmt: skip
# What these mean, as the plain value.
MEANT: dict[str, list[tuple[Any, Any]]] = {
    "prompts": [(_Word(PROMPT), [PROMPT]), (np.str_(PROMPT), [PROMPT]), ((PROMPT,), [PROMPT]),
                (np.array([PROMPT]), [PROMPT]), (collections.deque([PROMPT]), [PROMPT]),
                ([range(1, 4)], [[1, 2, 3]]), ([array.array("i", [1, 2])], [[1, 2]]),
                ([np.array([1, 2], np.uint8)], [[1, 2]]),
                ([collections.UserList([1, 2])], [[1, 2]]), ([(_Two.TWO, 1)], [[2, 1]])],
    # A list has a value per prompt, and there is one prompt.
    "max_new_tokens": [(_Two.TWO, 2), (np.uint8(2), 2), (np.array([4]), 4)],
    "seed": [(np.uint64(2**63), 2**63), (_Two.TWO, 2)],
    "batch_size": [(np.int8(1), 1), (10**30, 1)],
    "stop": [(_Word("zzz"), []), ([], []), ((), []), (collections.UserList(["zzz"]), []), ([["zzz"]], [])],
    "stop_tokens": [({2}, [2]), (range(2, 3), [2]), (np.array([2], np.int8), [2]), ((_Two.TWO,), [2]), ([], []),
                    ([[2]], [2])],
}  # fmt: skip


def argument_cases() -> Iterator[Case]:
    """Returns all of them."""
    for name, values in REFUSED.items():
        for number, value in enumerate(values):
            yield Case(f"generate {name} that is none, {number}", functools.partial(_generate, arguments={name: value}))
    for name, pairs in MEANT.items():
        for number, (value, plain) in enumerate(pairs):
            call = functools.partial(_both, value={name: value}, plain={name: plain})
            yield Case(
                f"generate {name} in another way, {number}", call, lambda _, found: equals(found[1])(_, found[0])
            )
    for number, prompts in enumerate((_LONG, [1, "a"], {1: 2}, b"ab", bytearray(b"ab"), memoryview(b"ab"), [2**70])):
        call = functools.partial(_stream, prompts=prompts)
        yield Case(f"stream of prompts that are none, {number}", call)
    for name, value in LISTS.items():
        for argument in ("prompts", "max_new_tokens", "stop", "stop_tokens"):
            yield _case_of(argument, f"of {name}", value)
            yield _case_of(argument, f"of one entry of {name}", [value])
        yield _case_of("prompts", f"of an id of {name}", [[value]])
        yield Case(f"stream of prompts of {name}", functools.partial(_stream, prompts=value))
        yield Case(f"layer_predictions of a prompt of {name}",
                   lambda parts, _, value=value: lsjax.layer_predictions(parts.model, value))  # fmt: skip
        yield Case(f"tune for prompts of {name}", lambda parts, _, value=value: lsjax.tune(parts.model, value))
        for field in ("temperature", "top_k", "top_p"):
            yield Case(f"Sampling({field} of {name})", lambda parts, _, field=field, value=value: _generate(
                parts, _, {"sampling": lsjax.Sampling(**{"temperature": 1.0} | {field: value})}))  # fmt: skip
        yield Case(f"a draft vocabulary of {name}", lambda parts, _, value=value: _generate(
            parts, _, {"strategy": lsjax.SelfSpeculative(1, 2, draft_vocabulary=value)}))  # fmt: skip
    yield from _object_cases()
    yield Case("a draft vocabulary of 10**12 ids", lambda parts, _: _generate(
        parts, _, {"strategy": lsjax.SelfSpeculative(1, 2, draft_vocabulary=_LONG)}))  # fmt: skip
    for number, embed in enumerate((_RAGGED, [[1.0]], "abc", None, _LONG, collections.UserString("a"))):
        for function in (lsjax.forward, lsjax.hidden_states):
            call = functools.partial(_forward, function=function, change={"embed": embed})
            yield Case(f"{function.__name__} with an embedding that is none, {number}", call)
    for number, layers in enumerate(({"attention": _RAGGED}, [], None, {"attention": {"qkv": "a"}})):
        call = functools.partial(_forward, function=lsjax.forward, change={"layers": layers})
        yield Case(f"forward with layers that are none, {number}", call)
    for number, tokens in enumerate((_LONG, [_LONG], _RAGGED, [[_Two.TWO, 300]], [{1, 2}], np.array([["1"]]))):
        yield Case(f"forward of tokens that are none, {number}", lambda parts, _, tokens=tokens: lsjax.forward(
            parts.model.params, tokens, parts.model.config))  # fmt: skip
    for number, value in enumerate((_LONG, [4], (), {}, "4", np.array([4]))):
        yield Case(f"layer_dropout_rates of layers that are no number, {number}", lambda *_, value=value:
                   lsjax.layer_dropout_rates(value, 0.2, 1, 10, "exponential", "constant"))  # fmt: skip
    for number, prompt in enumerate(([], "", b"a", [_LONG], _LONG, None, {1: 2}, [1.0], ["a"], [300], "a\ud800")):
        if prompt != "":  # the tokenizer has a token that opens a text
            yield Case(f"layer_predictions of a prompt that is none, {number}",
                       lambda parts, _, prompt=prompt: lsjax.layer_predictions(parts.model, prompt))  # fmt: skip
    for number, count in enumerate((-1, 1.0, "1", True, 10**6, None)):
        yield Case(f"layer_predictions of new tokens that are no number, {number}",
                   lambda parts, _, count=count: lsjax.layer_predictions(parts.model, PROMPT, count))  # fmt: skip


def _object_cases() -> Iterator[Case]:
    """Objects of a class of the caller's own, whose methods fail, as any argument or value of a configuration."""
    tokens = np.array([[1]])
    calls: dict[str, Callable[[Any, Any, Any], Any]] = {
        "load path": lambda parts, _, value: lsjax.load(value),
        "load dtype": lambda parts, _, value: lsjax.load(parts.huggingface, dtype=value),
        "read_model_config path": lambda parts, _, value: lsjax.read_model_config(value),
        "draft vocabulary": lambda parts, _, value: _generate(
            parts, _, {"strategy": lsjax.SelfSpeculative(1, 2, draft_vocabulary=value)}
        ),
        "layer_predictions model": lambda parts, _, value: lsjax.layer_predictions(value, PROMPT),
        "forward embedding": lambda parts, _, value: _forward(parts, _, lsjax.forward, {"embed": value}),
        "forward layers": lambda parts, _, value: _forward(parts, _, lsjax.forward, {"layers": value}),
        "forward tokens": lambda parts, _, value: lsjax.forward(parts.model.params, value, parts.model.config),
        "forward layer_mask": lambda parts, _, value: lsjax.forward(
            parts.model.params, tokens, parts.model.config, value
        ),
        "layer_dropout_rates max_rate": lambda parts, _, value: lsjax.layer_dropout_rates(
            4, value, 1, 10, "exponential", "constant"
        ),
        "train workdir": lambda parts, _, value: lsjax.train(parts.config, value),
        "train config": lambda parts, watch, value: lsjax.train(value, watch.folder / "run"),
        "train section": lambda parts, watch, value: lsjax.train(
            dataclasses.replace(parts.config, model=value), watch.folder / "run"
        ),
        "train key": lambda parts, watch, value: lsjax.train(
            dataclasses.replace(parts.config, model=dataclasses.replace(parts.config.model, width=value)),
            watch.folder / "run",
        ),
    }
    for argument, call in calls.items():
        for name, value in OBJECTS.items():
            yield Case(f"{argument} of {name}", functools.partial(call, value=value))


def _generate(parts: Any, _: Any, arguments: dict[str, Any]) -> list[list[int]]:
    settings = {"prompts": [PROMPT], "max_new_tokens": NEW_TOKENS} | arguments
    return lsjax.generate(parts.model, **settings).tokens


def _stream(parts: Any, _: Any, prompts: Any) -> list:
    return list(lsjax.stream(parts.model, prompts, NEW_TOKENS))


def _both(parts: Any, watch: Any, value: dict[str, Any], plain: dict[str, Any]) -> tuple:
    return _generate(parts, watch, value), _generate(parts, watch, plain)


def _forward(parts: Any, _: Any, function: Any, change: dict[str, Any]) -> Any:
    return function(parts.model.params | change, np.array([[1, 2]]), parts.model.config)


def _case_of(argument: str, name: str, value: Any) -> Case:
    return Case(f"generate {argument} {name}", functools.partial(_generate, arguments={argument: value}))
