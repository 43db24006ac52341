"""Decoder weights made straight from files, so that a model is held once; and its parameters made of them again."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from lsjax.decoding.passes import Weights
from lsjax.interop.source import ModelSource
from lsjax.model.output_major import INPUT_AXES, LeftOperand, OutputMajor, inputs_first, laid_out, with_output_major
from lsjax.model.quantized import Quantized, quantize_layers, quantize_params
from lsjax.model.transformer import Params
from lsjax.scale.sharding import decoder_shardings, mesh_of, tree_shardings


def read_decoder_weights(
    source: ModelSource, shapes: Params, dtype: jnp.dtype, mesh: Mesh | None, for_cpu: bool, in_int8: bool
) -> Weights:
    """What `decoder_weights` makes of a source's parameters (in_int8: rounded as `quantize_params` does), `shapes` of
    them stacked. Beside the result memory holds one weight of one layer at a time, as it was read (from a workdir, the
    host holds one of all layers)."""
    layout = LeftOperand if for_cpu and mesh is None else OutputMajor
    change = quantize_layers if in_int8 else functools.partial(laid_out, layout=layout)
    rest = {key: shapes[key] for key in shapes if key != "layers"}
    rest = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), rest)
    layer = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], dtype), shapes["layers"])
    # The head first: changing it takes as much again as there is room for now.
    rest = _with_head(source.load_rest(_placed(rest, mesh)), layout, mesh, in_int8)
    return rest | {"layers": _read_layers(source, layer, change, mesh)}


def _read_layers(source: ModelSource, layer: Params, change, mesh: Mesh | None) -> tuple[Params, ...]:
    """Every layer, changed; `layer` describes one of them as it is read."""
    read_as = jax.tree_util.tree_leaves_with_path(_placed({"layers": (layer,)}, mesh)["layers"][0])
    changed = _placed({"layers": (jax.eval_shape(change, layer),)}, mesh)["layers"][0]
    tree = jax.tree.structure(layer)
    held_as = tree.flatten_up_to(jax.tree.map(lambda a: a.sharding, changed))
    weights: list[list[Any]] = [[]] * len(read_as)
    # The largest first: of some sources a weight of all layers lies in memory meanwhile.
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
        return with_output_major(rest | {"layers": ()}, layout)

    if mesh is None:
        return change(rest)
    return jax.jit(change, out_shardings=decoder_shardings(jax.eval_shape(change, rest), mesh))(rest)


def _placed(weights: Weights, mesh: Mesh | None) -> Weights:
    """Descriptions, with where decoding has them."""
    here = SingleDeviceSharding(jax.devices()[0])
    shardings = decoder_shardings(weights, mesh) if mesh else jax.tree.map(lambda _: here, weights)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), weights, shardings)


def stacked_params(weights: Weights, shapes: Params) -> Params:
    """Parameters of these `shapes` (of so many layers as there are) out of the decoder weights that were made of them;
    int8 stays int8."""

    def stack(path, leaf, *layers):
        if isinstance(layers[0], OutputMajor | LeftOperand):
            layers = [inputs_first(held.kernel, leaf.shape[1:], INPUT_AXES[path[-1].key]) for held in layers]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *layers)

    def make(layers, head):
        params = {"layers": jax.tree_util.tree_map_with_path(stack, shapes["layers"], *layers)}
        if isinstance(head, Quantized):
            return params | {"lm_head": head}
        return params | ({"lm_head": head.kernel.T} if "lm_head" in shapes else {})

    mesh, head = mesh_of(weights["embed"]), weights.get("lm_head")
    arguments = weights["layers"], head
    as_made = mesh is None or isinstance(head, Quantized)
    shardings = None if as_made else tree_shardings(jax.eval_shape(make, *arguments), mesh)
    made = jax.jit(make, out_shardings=shardings)(*arguments)
    return {key: weights[key] for key in ("embed", "final_norm")} | made
