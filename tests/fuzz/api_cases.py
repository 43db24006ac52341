"""Malformed arguments of the Python API: every argument takes a dozen values that do not belong there."""

import dataclasses
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import lsjax
from tests.fuzz.harness import Case
from tests.fuzz.odd_values import (
    EARLY_EXIT,
    GENERATE,
    LOAD,
    ODD,
    SAMPLING,
    SPECULATIVE,
    NotGood,
    either,
    ids_of,
    never,
    odd_values,
    value_of,
    whole,
)
from tests.fuzz.parts import NEW_TOKENS, PROMPT, check_model


def generation_cases() -> Iterator[Case]:
    rng = random.Random(1)
    for argument, meaning in GENERATE.items():
        for name, value in odd_values(rng):
            yield _generate_case(f"generate {argument}={name}", argument, value, meaning)
    for field, meaning in SAMPLING.items():
        for name, value in odd_values(rng):
            yield _sampling_case(f"generate Sampling({field}={name})", field, value, meaning)
    for maker, fields in ((lsjax.EarlyExit, EARLY_EXIT), (lsjax.SelfSpeculative, SPECULATIVE)):
        for field, meaning in fields.items():
            for name, value in odd_values(rng):
                yield _strategy_case(f"generate {maker.__name__}({field}={name})", maker, field, value, meaning)
    for argument in ("prompts", "max_new_tokens", "seed", "stop_tokens"):
        for name, value in odd_values(rng)[::3]:
            yield _stream_case(f"stream {argument}={name}", argument, value, GENERATE[argument])
    for argument, meaning in {"prompts": never, "strategy": never, "batch_size": never, "sampling": never}.items():
        for name, value in odd_values(rng)[::3]:
            yield _tune_case(f"tune {argument}={name}", argument, value, meaning)
    for name, value in odd_values(rng):
        yield Case(f"generate model={name}", lambda _, w, v=value: lsjax.generate(value_of(v), [PROMPT], 2))


def expected_texts(parts: Any, argument: str, value: Any, meaning: Callable) -> list[list[int]] | None:
    """Returns the tokens for what a value means; None where it means nothing good."""
    try:
        meant = meaning(value)
    except NotGood:
        return None
    if argument == "batch_size" and meant is not None:
        meant = None  # a sequence does not depend on those beside it
    if argument in SAMPLING:
        base = {"temperature": 0.5} if argument != "temperature" else {}
        return parts.texts(sampling=lsjax.Sampling(**base | {argument: meant}))
    return parts.texts(**{argument: meant})


def accept(argument: str, value: Any, meaning: Callable) -> Callable[[Any, Any], None]:
    """Returns the check that tokens are those of what a value means."""

    def check(parts: Any, result: Any) -> None:
        expected = expected_texts(parts, argument, value_of(value), meaning)
        assert expected is not None, f"accepted {argument}={value_of(value)!r}, with the result {str(result)[:200]}"
        assert result == expected, f"{argument}={value_of(value)!r} gives {result}, but its meaning gives {expected}"

    return check


def _generate_case(name: str, argument: str, value: Any, meaning: Callable) -> Case:
    def call(parts, _):
        arguments = {"prompts": [PROMPT], "max_new_tokens": NEW_TOKENS} | {argument: value_of(value)}
        return lsjax.generate(parts.model, **arguments).tokens

    return Case(name, call, accept(argument, value, meaning))


def _sampling_case(name: str, field: str, value: Any, meaning: Callable) -> Case:
    def call(parts, _):
        base = {} if field == "temperature" else {"temperature": 0.5}
        sampling = lsjax.Sampling(**base | {field: value_of(value)})
        return lsjax.generate(parts.model, [PROMPT], NEW_TOKENS, sampling=sampling).tokens

    # A temperature of 0 is greedy decoding.
    return Case(name, call, accept(field, value, either(meaning, whole(0, 0)) if field == "temperature" else meaning))


def _strategy_case(name: str, maker: type, field: str, value: Any, meaning: Callable) -> Case:
    def call(parts, _):
        good = {"exit_layer": 1} | ({"num_speculations": 2} if maker is lsjax.SelfSpeculative else {})
        strategy = maker(**good | {field: value_of(value)})
        return lsjax.generate(parts.model, [PROMPT], NEW_TOKENS, strategy=strategy).tokens

    def check(parts: Any, result: Any) -> None:
        try:
            meant = meaning(value_of(value))
        except NotGood:
            raise AssertionError(f"accepted {field}={value!r}, with the result {result}") from None
        if maker is lsjax.SelfSpeculative:  # any setting gives the full model's greedy tokens
            assert result == parts.texts()
        else:
            assert result == parts.texts(strategy=maker(meant))

    return Case(name, call, check)


def _stream_case(name: str, argument: str, value: Any, meaning: Callable) -> Case:
    def call(parts, _):
        arguments = {"prompts": [PROMPT], "max_new_tokens": NEW_TOKENS} | {argument: value_of(value)}
        pieces = list(lsjax.stream(parts.model, **arguments))
        rows = 1 + max(piece.row for piece in pieces)
        return [[token for piece in pieces if piece.row == row for token in piece.tokens] for row in range(rows)]

    def one_prompt(value: Any) -> list:
        return [ids_of(value) or never()]

    return Case(name, call, accept(argument, value, either(one_prompt, meaning) if argument == "prompts" else meaning))


def _tune_case(name: str, argument: str, value: Any, meaning: Callable) -> Case:
    def call(parts, _):
        arguments = {"prompts": [], "max_new_tokens": 2} | {argument: value_of(value)}
        return lsjax.tune(parts.model, **arguments)

    return Case(name, call, lambda parts, result: meaning(result) if argument != "prompts" else None)


def loading_cases() -> Iterator[Case]:
    rng = random.Random(2)
    for argument, meaning in LOAD.items():
        for name, value in odd_values(rng):
            yield _load_case(f"load {argument}={name}", argument, value, meaning)
    for name, value in odd_values(rng):
        yield Case(f"read_model_config path={name}", lambda _, w, v=value: lsjax.read_model_config(value_of(v)))
    for name, value in odd_values(rng):
        yield Case(f"quantize model={name}", lambda _, w, v=value: lsjax.quantize(value_of(v)))
    for dtype in (
        "float64",
        "int32",
        "uint8",
        "complex64",
        "float8_e4m3fn",
        "torch.float32 ",
        np.float64,
        np.int8,
        "O",
    ):
        yield _load_case(f"load dtype={dtype!r}", "dtype", dtype, never)


def _load_case(name: str, argument: str, value: Any, meaning: Callable) -> Case:
    def call(parts, _):
        return lsjax.load(**{"path": parts.huggingface} | {argument: value_of(value)})

    def check(parts: Any, model: Any) -> None:
        try:
            meant = meaning(value_of(value))
        except NotGood:
            raise AssertionError(f"accepted {argument}={value!r}: {model}") from None
        if meant is not None and argument != "for_decoding":
            check_model(model)

    return Case(name, call, check)


def mathematics_cases() -> Iterator[Case]:
    """Arguments of the functions of the paper's equations, and of `forward` and `hidden_states`."""
    rng = random.Random(3)
    dropout = {"num_layers": 4, "max_rate": 0.2, "step": 1, "total_steps": 10}
    for argument in (*dropout, "depth_schedule", "time_schedule"):
        for name, value in odd_values(rng):
            yield _function_case(lsjax.layer_dropout_rates, dropout, argument, name, value, _are_rates)
    curriculum = {"name": "gradual", "num_layers": 4, "step": 1, "total_steps": 10, "rotation": 2}
    for argument in curriculum:
        for name, value in odd_values(rng)[::2]:
            yield _function_case(lsjax.exit_curriculum, curriculum, argument, name, value, _are_flags)
    weights = {"num_layers": 4, "exit_scale": 0.2, "active": np.array([True, False, True, True])}
    for argument in weights:
        for name, value in odd_values(rng)[::2]:
            yield _function_case(lsjax.exit_weights, weights, argument, name, value, _are_weights)
    yield from _forward_cases(rng)


def _function_case(function: Callable, good: dict, argument: str, name: str, value: Any, check: Callable) -> Case:
    def call(_, __):
        return function(**good | {argument: value_of(value)})

    def accepted(_, result: Any) -> None:
        # A whole number that any other spelling means gives what the plain one gives.
        odd = value_of(value)
        if argument in ("num_layers", "step", "total_steps", "rotation"):
            plain = np.asarray(odd)
            assert plain.ndim == 0, f"accepted {argument}={odd!r}"
            assert plain.dtype.kind in "iu", f"accepted {argument}={odd!r}"
            np.testing.assert_array_equal(result, function(**good | {argument: int(plain)}))
        check(np.asarray(result))

    return Case(f"{function.__name__} {argument}={name}", call, accepted)


def _are_rates(rates: np.ndarray) -> None:
    assert rates.dtype == np.float32
    assert rates.ndim == 1
    assert ((rates >= 0) & (rates <= 1)).all()


def _are_flags(flags: np.ndarray) -> None:
    assert flags.dtype == bool
    assert flags.ndim == 1
    assert flags[-1]


def _are_weights(weights: np.ndarray) -> None:
    assert weights.shape == (4,)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
    assert (weights >= 0).all()


def _forward_cases(rng: random.Random) -> Iterator[Case]:
    tokens = {
        "no rows": np.zeros((0, 3), np.int32), "no columns": np.zeros((1, 0), np.int32), "one axis": [1, 2],
        "three axes": [[[1]]], "floats": [[1.0, 2.0]], "an id of the vocabulary's size": [[1, 288]],
        "a negative id": [[-1, 2]], "booleans": [[True, False]], "texts": [["a"]], "ragged": [[1], [1, 2]],
        "2**40": [[2**40]], "objects": [[None]], "a text": "abc", "10**40": [[10**40]], "nan": [[math.nan]],
    }  # fmt: skip
    for function in (lsjax.forward, lsjax.hidden_states):
        for name, value in tokens.items():
            yield Case(
                f"{function.__name__} tokens: {name}",
                lambda parts, _, f=function, v=value: f(parts.model.params, v, parts.model.config),
            )
        for name, value in odd_values(rng)[::2]:
            yield Case(
                f"{function.__name__} params={name}",
                lambda parts, _, f=function, v=value: f(value_of(v), np.array([[1]]), parts.model.config),
            )
        for name, value in odd_values(rng)[::2]:
            yield Case(
                f"{function.__name__} config={name}",
                lambda parts, _, f=function, v=value: f(parts.model.params, np.array([[1]]), value_of(v)),
            )
    yield from _params_cases()
    masks = {"short": [1, 1], "nan": [1, 1, math.nan], "inf": [math.inf, 1, 1], "a text": "111", "long": [[1] * 3] * 3}
    for name, value in masks.items():
        yield Case(
            f"forward layer_mask: {name}",
            lambda parts, _, v=value: lsjax.forward(parts.model.params, np.array([[1]]), parts.model.config, v),
        )


def _params_cases() -> Iterator[Case]:
    changes = {
        "without embed": lambda p: {k: v for k, v in p.items() if k != "embed"},
        "without layers": lambda p: {k: v for k, v in p.items() if k != "layers"},
        "layers of nothing": lambda p: p | {"layers": {}},
        "layers without attention": lambda p: (
            p | {"layers": {k: v for k, v in p["layers"].items() if k != "attention"}}
        ),
        "a norm of another width": lambda p: p | {"final_norm": {"scale": np.ones(5, np.float32)}},
        "a norm without scale": lambda p: p | {"final_norm": {}},
        "an embedding of one axis": lambda p: p | {"embed": np.ones(36, np.float32)},
        "an embedding of texts": lambda p: p | {"embed": np.full((288, 36), "a")},
        "a short embedding": lambda p: p | {"embed": p["embed"][:100]},
        "a head of another width": lambda p: p | {"lm_head": np.ones((5, 288), np.float32)},
        "lists for arrays": lambda p: p | {"embed": [[1.0, 2.0]]},
    }
    for name, change in changes.items():
        yield Case(
            f"forward params {name}",
            lambda parts, _, c=change: lsjax.forward(c(parts.model.params), np.array([[1, 200]]), parts.model.config),
        )


def config_cases() -> Iterator[Case]:
    """Values of configuration keys: what is accepted comes back as it was given, finite and of its type."""
    rng = random.Random(4)
    good = lsjax.Config().to_dict()
    paths = [(section, key) for section, keys in good.items() if isinstance(keys, dict) for key in keys]
    paths.remove(("model", "rope_scaling"))  # a section: it has a loop of its own
    names = [name for name in ODD if name not in ("generator", "jax number", "jax array")]
    for section, key in paths:
        for name in rng.sample(names, 2):
            yield _config_case(f"Config.from_dict {section}.{key}={name}", {section: {key: ODD[name]}})
    for name in rng.sample(names, 12):
        yield _config_case(f"Config.from_dict tree={name}", ODD[name], empty=({},))
        yield _config_case(f"Config.from_dict model={name}", {"model": ODD[name]}, empty=({"model": {}},))
        yield _config_case(f"Config.from_dict model.rope_scaling={name}", {"model": {"rope_scaling": ODD[name]}},
                           empty=({"model": {"rope_scaling": {}}},))  # fmt: skip
    for name, key in {"a number": 3, "None": None, "bytes": b"model", "a tuple": ("model",), "far": "x" * 9999}.items():
        yield _config_case(f"Config.from_dict key: {name}", {key: {}})
        yield _config_case(f"Config.from_dict key of a section: {name}", {"model": {key: 1}})


def _config_case(name: str, tree: Any, empty: tuple = ()) -> Case:
    def check(_, config: lsjax.Config) -> None:
        assert isinstance(tree, dict), f"accepted {tree!r}"
        for section, keys in tree.items():
            for key, value in keys.items():
                found = config.to_dict()[section][key]
                assert type(found) is type(lsjax.Config().to_dict()[section][key])
                assert value in ({}, found), f"{section}.{key}={value!r} became {found!r}"
                assert not isinstance(found, float) or math.isfinite(found)
        assert lsjax.Config.from_dict(config.to_dict()) == config

    return Case(name, lambda *_: lsjax.Config.from_dict(tree), check)


def training_cases() -> Iterator[Case]:
    """Arguments of `train`: every one is refused before anything is written."""
    rng = random.Random(5)
    for name, value in odd_values(rng):
        yield Case(f"train config={name}", lambda _, w, v=value: lsjax.train(value_of(v), w.folder / "run"))
    for name, value in odd_values(rng):
        if not isinstance(value, str) or name in ("empty text", "null character"):
            yield Case(f"train workdir={name}", lambda parts, _, v=value: lsjax.train(parts.config, value_of(v)))
    for name, value in odd_values(rng):
        yield Case(
            f"train profile_steps={name}",
            lambda parts, w, v=value: _refused_train(parts, w, profile_steps=value_of(v)),
            _is_no_count,
        )
    for section, key, value in (
        ("data", "corpus", "nowhere"), ("data", "tokenizer", "nowhere"), ("data", "file_pattern", "**.txt"),
        ("data", "file_pattern", "/etc/*"), ("data", "file_pattern", ""), ("data", "text_key", ""),
        ("model", "rope_theta", math.inf), ("training", "seed", 2**32), ("training", "seed", "1"),
        ("training", "learning_rate", math.nan), ("training", "frozen", "nothing_of_that_name"),
        ("model", "vocab_size", 10), ("training", "sequence_length", 129), ("mesh", "tensor", 3), ("mesh", "data", 0),
        ("checkpoint", "keep", 0), ("training", "batch_size", 10**9), ("layerskip", "exit_curriculum", "some"),
    ):  # fmt: skip
        yield Case(f"train {section}.{key}={value!r}", lambda parts, w, s=section, k=key, v=value: lsjax.train(
            _changed(parts.config, s, k, v), w.folder / "run", verbose=False))  # fmt: skip


def _refused_train(parts: Any, watch: Any, **arguments: Any) -> Any:
    # The corpus is missing, so that nothing is trained where the argument is accepted.
    return lsjax.train(_changed(parts.config, "data", "corpus", "nowhere"), watch.folder / "run", **arguments)


def _is_no_count(_, result: Any) -> None:
    raise AssertionError(f"trained without a corpus: {result}")


def _changed(config: lsjax.Config, section: str, key: str, value: Any) -> lsjax.Config:
    part = dataclasses.replace(getattr(config, section), **{key: value})
    return dataclasses.replace(config, **{section: part})


def api_cases() -> list[Case]:
    """Returns all malformed arguments."""
    makers = (generation_cases, loading_cases, mathematics_cases, config_cases, training_cases)
    return [case for maker in makers for case in maker()]
