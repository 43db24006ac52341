"""Which parameters a run trains: all but the frozen ones, or LoRA adapters of some matrices."""

import math
from typing import Any

import jax

from lsjax.config import TrainingConfig
from lsjax.errors import UserError
from lsjax.model.lora import MATRICES
from lsjax.model.transformer import Params


def is_frozen(config: TrainingConfig, params: Params) -> Any:
    """Returns the tree of parameters with a boolean at each: whether config.training.frozen names it.

    Raises UserError when a part of config.training.frozen names no parameter, or when all parameters are frozen.
    """
    paths = _paths(params)
    named = _named("frozen", config.frozen, jax.tree.leaves(paths), "parameter")
    frozen = jax.tree.map(lambda path: path in named, paths)
    if all(jax.tree.leaves(frozen)):
        raise UserError(f"config.training.frozen ({config.frozen!r}) leaves nothing to train; name fewer parameters")
    return frozen


def trained_paths(config: TrainingConfig, params: Params) -> set[str]:
    """Returns the paths of the parameters that a run trains or, with LoRA, of the matrices that get an adapter.

    params: the model's parameters, or their description. Raises UserError as `is_frozen` and `lora_targets` do.
    """
    if config.lora_rank:
        return set(lora_targets(config, params))
    return {path for path, frozen in leaves_by_path(is_frozen(config, params)).items() if not frozen}


def lora_targets(config: TrainingConfig, params: Params) -> tuple[str, ...]:
    """Returns the paths of the matrices that get a LoRA adapter.

    params: the model's parameters, or their description.
    Raises UserError when a part of config.training.lora_targets names no matrix, when none is left, and when the rank
    exceeds a side of a matrix.
    """
    shapes = {path: leaf.shape for path, leaf in leaves_by_path(params).items()}
    frozen = _named("frozen", config.frozen, list(shapes), "parameter")
    matrices = [path for path in shapes if path in MATRICES]
    targets = [p for p in _named("lora_targets", config.lora_targets, matrices, "matrix") if p not in frozen]
    if not targets:
        raise UserError(
            f"config.training.lora_targets ({config.lora_targets!r}) leaves nothing to train; name matrices that "
            "config.training.frozen does not"
        )
    for path in targets:
        sizes = shapes[path][path.startswith("layers/") :]
        sides = math.prod(sizes[: MATRICES[path]]), math.prod(sizes[MATRICES[path] :])
        if config.lora_rank > min(sides):
            raise UserError(
                f"config.training.lora_rank ({config.lora_rank}) exceeds a side of {path} ({sides[0]} x {sides[1]}); "
                "choose a lower rank"
            )
    return tuple(targets)


def lora_scale(config: TrainingConfig) -> float:
    """Returns the factor of A B: alpha / r."""
    return config.lora_alpha / config.lora_rank


def leaves_by_path(params: Params) -> dict[str, Any]:
    """Returns the leaves of a tree of parameters by their paths, such as layers/attention/qkv."""
    return dict(zip(jax.tree.leaves(_paths(params)), jax.tree.leaves(params), strict=True))


def _paths(params: Params) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: "/".join(key.key for key in path), params)


def _named(key: str, value: str, paths: list[str], kind: str) -> list[str]:
    """Returns the paths that begin with one of the paths in `value`, a text with commas, the value of a key."""
    prefixes = [prefix.strip() for prefix in value.split(",") if prefix.strip()]
    for prefix in prefixes:
        if not any(_begins(path, prefix) for path in paths):
            plural = {"parameter": "parameters", "matrix": "matrices"}[kind]
            raise UserError(f"config.training.{key}: {prefix!r} is no {kind}; the {plural} are {', '.join(paths)}")
    return [path for path in paths if any(_begins(path, prefix) for prefix in prefixes)]


def _begins(path: str, prefix: str) -> bool:
    return f"{path}/".startswith(f"{prefix}/")
