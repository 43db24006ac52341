"""What devices send each other in one run of a compiled program, and how long the wires need for it at least."""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lsjax.scale import hlo
from lsjax.scale.hardware import Topology

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """`payload`: bytes of the whole array on one device (what an all-gather gives, what a reduction takes).
    `group`: device ids that take part in it together, as one of such groups. `times`: a run of the program. `hidden`:
    the compiler's schedule has the device compute while it is under way (a loop, kernel or matrix product)."""

    kind: str
    payload: int
    group: tuple[int, ...]
    times: float
    operation: str
    hidden: bool = False

    @property
    def received(self) -> float:
        """Bytes that one device must receive each time: the part that it does not have."""
        rest = 1 - 1 / len(self.group)
        return {"all-reduce": 2 * rest, "collective-permute": 1.0}.get(self.kind, rest) * self.payload

    def seconds(self, topology: Topology) -> float:
        """Lower bound of one execution with every wire of the device busy."""
        chip, per_host = topology.chip, topology.devices_per_host
        within = self.received / chip.link_bandwidth
        hosts = len({device // per_host for device in self.group}) if per_host else 1
        if hosts == 1:
            return within
        # What a host lacks comes over the network cards of its devices that take part, each a share.
        local = len(self.group) / hosts
        share = self.received / (1 - 1 / len(self.group)) * (1 - 1 / hosts) / local
        return max(within, share / chip.network_bandwidth)


def collectives(
    program: hlo.Program, devices: int, share: Callable[[hlo.Instruction], float] = lambda _: 1.0
) -> list[Collective]:
    """Every collective among more than one device; `share` as in `Program.runs`."""
    found, seen = [], set()
    for instruction, times in program.runs(share):
        inner = _collective_of(program, instruction)
        if inner is None:
            continue
        kind, collective = inner
        if instruction.opcode == "fusion":
            # One that goes on behind several fusions is in the text of each of them.
            channel = re.search(r"channel_id=(\d+)", collective.attributes)
            same = (channel and channel[1], collective.shape, times, instruction.operation if not channel else "")
            if same in seen:
                continue
            seen.add(same)
        group = _group(collective.attributes, devices)
        if len(group) > 1:
            hidden = _hidden(program, instruction)
            found.append(Collective(kind, _payload(kind, collective), group, times, instruction.operation, hidden))
    return found


def _hidden(program: hlo.Program, instruction: hlo.Instruction) -> bool:
    """A compiled program's text is in the order in which it runs: is there work between a start and its end?"""
    if instruction.opcode == "fusion":
        return True  # with a matrix product in the same kernel (XLA:TPU)
    if not instruction.opcode.endswith("-start"):
        return False
    computation = next(c for c in program.computations.values() if c.get(instruction.name) is instruction)
    after = iter(computation.values())
    for other in after:
        if other is instruction:
            break
    for other in after:
        if instruction.name in other.operands:
            return False
        if other.opcode in ("while", "conditional", "custom-call", "dot", "convolution") or "gemm" in other.name:
            return True
    return False


def _collective_of(program: hlo.Program, instruction: hlo.Instruction) -> tuple[str, hlo.Instruction] | None:
    """(kind, the instruction with its shape and groups); asynchronous ones count where they start."""
    kind = next((kind for kind in KINDS if instruction.opcode in (kind, f"{kind}-start")), None)
    if kind:
        return kind, instruction
    if instruction.opcode != "fusion":
        return None
    # XLA:TPU fuses a collective with what stands around it, and writes a reduce-scatter as all-reduce and slice.
    name = instruction.called()[0]
    inside = [i for i in program.computations[name].values() if i.opcode in KINDS]
    if not inside or instruction.name.startswith("async-collective-done") or "done" in name:
        return None
    return ("reduce-scatter" if name.startswith("all-reduce-scatter") else inside[0].opcode), inside[0]


def _payload(kind: str, instruction: hlo.Instruction) -> int:
    """The largest of what goes in and what comes out: a start instruction's shape holds both, as two tuples."""
    parts = hlo.top_level(instruction.shape)
    if instruction.opcode.endswith("-start") and len(parts) > 1:
        return max(hlo.size(part) for part in parts[:2])
    whole = hlo.size(instruction.shape)
    if kind == "reduce-scatter" and instruction.opcode == "reduce-scatter":
        return whole * len(_group(instruction.attributes, 0))
    return whole


def _group(attributes: str, devices: int) -> tuple[int, ...]:
    """The first group of `replica_groups`, in any of the three ways that XLA writes them."""
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
    if pairs:
        return int(pairs[1]), int(pairs[2])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return tuple(map(int, listed[1].split(",")))
    tiled = re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if tiled:
        return tuple(_iota(tiled[1])[0].tolist())
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[^)]*\)?)\))? \{([^}]*)\}", attributes)
    if mesh:
        return _mesh_group(*mesh.groups())
    return tuple(range(devices))


def _mesh_group(axes: str, device_ids: str | None, over: str) -> tuple[int, ...]:
    """'axis_0'=16,'axis_1'=4 with device_ids [4,16]T(1,0), over 'axis_0'."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values()))
    if device_ids:
        shape, _, order = device_ids.partition("]")
        ids = ids.reshape([int(n) for n in shape.strip("[").split(",")])
        turned = re.search(r"T\(([\d,]+)\)?", order)
        ids = ids.transpose([int(n) for n in turned[1].split(",")]) if turned else ids
    ids = ids.reshape(list(sizes.values()))
    chosen = re.findall(r"'(\w+)'", over)
    index = tuple(slice(None) if name in chosen else 0 for name in sizes)
    return tuple(ids[index].ravel().tolist())


def _iota(text: str) -> np.ndarray:
    """ "[4,16]<=[16,4]T(1,0)" -> the groups, one a row."""
    numbers = [[int(n) for n in part.split(",")] for part in re.findall(r"[\[(]([\d,]+)[\])]", text)]
    ids = np.arange(math.prod(numbers[1])).reshape(numbers[1])
    ids = ids.transpose(numbers[2]) if len(numbers) == 3 else ids
    return ids.reshape(numbers[0])


def summarize(found: list[Collective], topology: Topology) -> dict[str, dict[str, float]]:
    """{kind: {count, bytes (payload), received_bytes, seconds, hidden (share of the seconds)}} of one run, on one
    device."""
    table = {}
    for kind in KINDS:
        mine = [c for c in found if c.kind == kind]
        if mine:
            seconds = sum(c.times * c.seconds(topology) for c in mine)
            table[kind] = {
                "count": sum(c.times for c in mine),
                "bytes": sum(c.times * c.payload for c in mine),
                "received_bytes": sum(c.times * c.received for c in mine),
                "seconds": seconds,
                "hidden": sum(c.times * c.seconds(topology) for c in mine if c.hidden) / seconds,
            }
    return table
