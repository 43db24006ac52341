"""Counts the FLOPs of a function in its jaxpr: dot_generals, times the turns of loops and the share of branches."""

import math

import jax


def count_flops(function, *arguments, share: float = 1.0) -> float:
    """Counts the FLOPs of function(*arguments).

    share: how often a `cond` takes its costly branch, as a share of its executions.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr, share)


def _count(jaxpr, share: float) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            total += _dot(equation)
        elif name == "cond":
            total += share * max(_count(branch.jaxpr, share) for branch in equation.params["branches"])
        else:
            turns = equation.params.get("length", 1) if name == "scan" else 1
            total += turns * sum(_count(inner, share) for inner in _inside(equation))
    return total


def _dot(equation) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _inside(equation):
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "jaxpr"):
                yield item.jaxpr
            elif hasattr(item, "eqns"):
                yield item
