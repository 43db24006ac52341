"""Decoder weights straight from files, so that memory holds a model once; and parameters back from them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from lsjax.decoding.forward import Weights
from lsjax.decoding.shardings import decoder_weight_shardings
from lsjax.io.source import ModelSource
from lsjax.model.quantization import is_quantized, quantize_layers, quantize_params, states_in_int8
from lsjax.model.transformer import Params
from lsjax.model.weight_layout import (
    INPUT_AXES,
    LeftOperand,
    OutputMajor,
    inputs_first,
    lay_out_layers,
    lay_out_weights,
)
from lsjax.parallel.sharding import mesh_of, tree_shardings


def read_decoder_weights(
    source: ModelSource, shapes: Params, dtype: jnp.dtype, mesh: Mesh | None, for_cpu: bool, in_int8: bool
) -> Weights:
    """Reads a model's parameters into the layout of `decoder_weights`, weight by weight.

    shapes: the stacked parameters, described. in_int8: rounds them as `quantize_params` does.
    Besides the result, memory holds one weight of one layer at a time, as it was read. (For a workdir the host holds
    one weight of all layers.)
    """
    layout = LeftOperand if for_cpu and mesh is None else OutputMajor
    change = quantize_layers if in_int8 else functools.partial(lay_out_layers, layout=layout)
    rest = {key: shapes[key] for key in shapes if key != "layers"}
    rest = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), rest)
    layer = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], dtype), shapes["layers"])
    # The head comes first: its change needs a second copy, and memory is still free.
    rest = _with_head(source.load_rest(_placed(rest, mesh)), layout, mesh, in_int8)
    weights = rest | {"layers": _read_layers(source, layer, change, mesh)}
    return states_in_int8(weights, rounded=layout is LeftOperand)


def _read_layers(source: ModelSource, layer: Params, change, mesh: Mesh | None) -> tuple[Params, ...]:
    """Reads and changes every layer; `layer` describes one of them as it is read."""
    read_as = jax.tree_util.tree_leaves_with_path(_placed({"layers": (layer,)}, mesh)["layers"][0])
    changed = _placed({"layers": (jax.eval_shape(change, layer),)}, mesh)["layers"][0]
    tree = jax.tree.structure(layer)
    held_as = tree.flatten_up_to(jax.tree.map(lambda a: a.sharding, changed))
    weights: list[list[Any]] = [[]] * len(read_as)
    # The largest weight comes first: some sources hold it for all layers in memory meanwhile.
    for place in sorted(range(len(read_as)), key=lambda place: -read_as[place][1].size):
        path, described = read_as[place]
        change_one = functools.partial(_change_one, change, path[-1].key)
        program = jax.jit(change_one, out_shardings=held_as[place])
        name = "/".join(["layers", *(key.key for key in path)])
        weights[place] = [jax.block_until_ready(program(a)) for a in source.load_layers(name, described)]
    return tuple(map(tree.unflatten, zip(*weights, strict=True)))


def _change_one(change, name: str, weight: jax.Array):
    return change({name: weight})[name]


def _with_head(rest: Params, layout, mesh: Mesh | None, in_int8: bool) -> Weights:
    if in_int8:
        rest = quantize_params(rest | {"layers": {}})

    def change(rest):
        return lay_out_weights(rest | {"layers": ()}, layout)

    if mesh is None:
        return change(rest)
    return jax.jit(change, out_shardings=decoder_weight_shardings(jax.eval_shape(change, rest), mesh))(rest)


def _placed(weights: Weights, mesh: Mesh | None) -> Weights:
    """Returns the descriptions with the shardings that decoding uses."""
    here = SingleDeviceSharding(jax.devices()[0])
    shardings = decoder_weight_shardings(weights, mesh) if mesh else jax.tree.map(lambda _: here, weights)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), weights, shardings)


def stack_params(weights: Weights, shapes: Params) -> Params:
    """Stacks decoder weights back into parameters of these `shapes`, for the layers there are.

    Weights in int8 stay as they are, in the form that does not round states.
    """

    def stack(path, leaf, *layers):
        if isinstance(layers[0], OutputMajor | LeftOperand):
            layers = [inputs_first(held.kernel, leaf.shape[1:], INPUT_AXES[path[-1].key]) for held in layers]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *layers)

    def make(layers, head):
        params = {"layers": jax.tree_util.tree_map_with_path(stack, shapes["layers"], *layers)}
        if is_quantized(head):
            return params | {"lm_head": head}
        return params | ({"lm_head": head.kernel.T} if "lm_head" in shapes else {})

    weights = states_in_int8(weights, rounded=False)
    mesh, head = mesh_of(weights["embed"]), weights.get("lm_head")
    arguments = weights["layers"], head
    shardings = None
    if mesh is not None and not is_quantized(head):
        shardings = tree_shardings(jax.eval_shape(make, *arguments), mesh)
    made = jax.jit(make, out_shardings=shardings)(*arguments)
    return {key: weights[key] for key in ("embed", "final_norm")} | made
