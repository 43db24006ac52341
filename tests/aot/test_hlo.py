"""Figures read from compiled programs, against programs small enough to count by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lsjax.aot import hlo
from lsjax.aot.collectives import Collective, _group, collectives, summarize
from lsjax.aot.traffic import memory_traffic
from lsjax.config import MeshConfig
from lsjax.costs.hardware import parse_topology
from lsjax.parallel.sharding import make_mesh


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(2, 4, 1))


def sent(mesh, function, *arguments, share=lambda _: 1.0):
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(*arguments).compile()
    return collectives(hlo.parse(compiled.as_text()), 8, share)


def on(mesh, shape, *axes):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*axes)))


def test_every_kind_with_its_bytes_and_group(mesh):
    split = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    x = on(mesh, (64, 16), "fsdp")
    gather = split(lambda x: jax.lax.all_gather(x, "fsdp", tiled=True), in_specs=P("fsdp"), out_specs=P())
    (found,) = sent(mesh, gather, x)
    assert (found.kind, found.payload, len(found.group), found.times) == ("all-gather", 64 * 16 * 4, 4, 1)
    assert found.received == 64 * 16 * 4 * 3 / 4
    (found,) = sent(mesh, split(lambda x: jax.lax.psum(x, "data"), in_specs=P("fsdp"), out_specs=P("fsdp")), x)
    assert (found.kind, found.payload, found.group) == ("all-reduce", 16 * 16 * 4, (0, 4))
    assert found.received == 2 * 16 * 16 * 4 / 2
    scatter = split(lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True), in_specs=P(), out_specs=P("fsdp"))
    (found,) = sent(mesh, scatter, on(mesh, (64, 16)))
    assert (found.kind, found.payload, found.group) == ("reduce-scatter", 64 * 16 * 4, (0, 1, 2, 3))


def test_a_loop_counts_as_often_as_it_goes_round(mesh):
    """Gathers a weight in each of 5 layers, in each of 3 iterations of an outer loop."""
    whole = functools.partial(jax.lax.all_gather, axis_name="fsdp", tiled=True)
    split = jax.shard_map(whole, mesh=mesh, in_specs=P("fsdp"), out_specs=P(), check_vma=False)

    def layers(x, weights):
        def inner(x, _):
            return jax.lax.scan(lambda x, w: (jnp.sin(x @ split(w)), None), x, weights)

        return jax.lax.scan(inner, x, None, length=3)[0]

    found = sent(mesh, layers, on(mesh, (8, 16)), on(mesh, (5, 16, 16), None, "fsdp"))
    assert sum(c.times for c in found if c.kind == "all-gather") == 15
    assert summarize(found, parse_topology("gpu:h100:1x8"))["all-gather"]["bytes"] == 15 * 16 * 16 * 4


def test_a_branch_counts_by_its_share(mesh):
    split = jax.shard_map(
        lambda x: jax.lax.psum(jnp.sin(x), "fsdp"), mesh=mesh, in_specs=P("fsdp"), out_specs=P(), check_vma=False
    )

    def maybe(x, wanted):
        with jax.named_scope("sometimes"):
            return jax.lax.cond(wanted, split, lambda x: jnp.zeros((16, 16)), x)

    arguments = on(mesh, (64, 16), "fsdp"), jax.ShapeDtypeStruct((), jnp.bool)
    found = sent(mesh, maybe, *arguments, share=lambda i: 0.25 if "sometimes" in i.operation else 1.0)
    assert [c.times for c in found if c.kind == "all-reduce"] == [0.25]


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, use_global_device_ids=true", (0, 2)),
        ("replica_groups=[2,4]<=[8], dimensions={0}", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, x", (0, 1, 2, 3)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, x", (0, 4)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}, x", (0, 1, 2, 3)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}, x", (0, 4)),
        ("replica_groups={}, to_apply=%add", (0, 1, 2, 3, 4, 5, 6, 7)),
    ],
)
def test_groups_in_all_the_ways_that_xla_writes_them(text, group):
    assert _group(text, 8) == group


def test_wires_of_a_gpu_are_slower_between_hosts():
    """Gathers 8 GB over 16 GPUs on 2 hosts.

    Half of it arrives over the network cards of the GPUs that take part, 50 GB/s each. Everything except a GPU's own
    part also arrives over its links of 450 GB/s.
    """
    topology = parse_topology("gpu:h100:2x8")
    over_both = Collective("all-gather", 8_000_000_000, tuple(range(16)), 1, "")
    assert over_both.seconds(topology) == pytest.approx(max(4e9 / 8 / 50e9, 7.5e9 / 450e9))
    within = over_both._replace(group=tuple(range(8)))
    assert within.seconds(topology) == pytest.approx(7e9 / 450e9)
    across = over_both._replace(group=(0, 8))  # one of each host: half through a single card
    assert across.seconds(topology) == pytest.approx(4e9 / 50e9)
    tpu = over_both._replace(kind="all-reduce")
    assert tpu.seconds(parse_topology("tpu:v5e:4x4")) == pytest.approx(2 * 7.5e9 / 180e9)


def test_memory_traffic_of_a_layer_stack():
    """Computes x @ W[l] ten times. Each iteration reads a weight and a state and writes a state, for any stack size."""
    width, rows, layers = 512, 8, 10

    def stack(x, weights):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((rows, width), (layers, width, width))]
    moved = memory_traffic(hlo.parse(jax.jit(stack).lower(*shapes).compile().as_text()))
    weights, states = layers * width * width * 4, layers * 2 * rows * width * 4
    # XLA:CPU first slices each weight out of the stack, which reads and writes it once more.
    assert weights + states <= moved <= 1.05 * (3 * weights + 2 * states)


def test_an_update_in_place_counts_as_its_slice():
    def write(cache, row, at):
        return jax.lax.dynamic_update_slice(cache, row, (at, 0))

    shapes = [jax.ShapeDtypeStruct((10_000, 64), jnp.float32), jax.ShapeDtypeStruct((1, 64), jnp.float32)]
    compiled = jax.jit(write, donate_argnums=0).lower(*shapes, jax.ShapeDtypeStruct((), jnp.int32)).compile()
    assert memory_traffic(hlo.parse(compiled.as_text())) < 10 * 64 * 4


SLICES = """
ENTRY %main (weight: bf16[4096,2048], near: bf16[64,128]) -> bf16[1024,2048] {
  %weight = bf16[4096,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %near = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %begun = ((bf16[4096,2048]{1,0:T(8,128)(2,1)}), bf16[1024,2048]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%weight), slice={[0:1024], [0:2048]}
  %back = ((bf16[64,128]{1,0:T(8,128)(2,1)S(1)}), bf16[8,128]{1,0:T(8,128)(2,1)}, s32[]{:S(2)}) slice-start(%near), slice={[0:8], [0:128]}
  %far = ((bf16[4096,2048]{1,0:T(8,128)(2,1)}), bf16[16,2048]{1,0:T(8,128)(2,1)}, s32[]{:S(2)}) slice-start(%weight), slice={[0:16], [0:2048]}
  %brought = bf16[8,128]{1,0:T(8,128)(2,1)} slice-done(%back)
  %copied = bf16[16,2048]{1,0:T(8,128)(2,1)} slice-done(%far)
  ROOT %part = bf16[1024,2048]{1,0:T(8,128)(2,1)S(1)} slice-done(%begun)
}
"""  # noqa: E501


def test_a_slice_brought_into_fast_memory_counts_as_itself():
    """Reads a quarter of a weight, writes eight rows from fast memory, and reads and writes sixteen rows."""
    quarter, eight, sixteen = 1024 * 2048 * 2, 8 * 128 * 2, 16 * 2048 * 2
    assert memory_traffic(hlo.parse(SLICES)) == quarter + eight + 2 * sixteen


def test_sizes_of_shapes():
    assert hlo.size("(f32[2,3]{1,0}, (bf16[4]{0}, s32[]))") == 24 + 8 + 4
    assert hlo.size("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", main_memory_only=True) == 0
    assert hlo.top_level("(f32[2,3]{1,0:T(8,128)}, (bf16[4], s32[]))") == ["f32[2,3]{1,0:T(8,128)}", "(bf16[4], s32[])"]
    np.testing.assert_equal(hlo.size("pred[7]{0}"), 7)
