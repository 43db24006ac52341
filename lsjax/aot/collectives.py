"""The data that devices exchange during one run of a compiled program, and the least time that this takes."""

import math
import re
from typing import NamedTuple

import numpy as np

from lsjax.aot import hlo
from lsjax.costs.hardware import Topology

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One collective operation of a program, as one group of devices executes it.

    kind: one of KINDS.
    payload: bytes of the whole array on one device (the result of an all-gather, the operand of a reduction).
    group: ids of the devices that take part together; the other groups of the same operation have the same size.
    times: executions per run of the program.
    operation: path of JAX names that the operation came from.
    hidden: True when the compiler schedules a loop, kernel or matrix product while the transfer is under way.
    """

    kind: str
    payload: int
    group: tuple[int, ...]
    times: float
    operation: str
    hidden: bool = False

    @property
    def received(self) -> float:
        """Returns the bytes that one device must receive per execution: the part of the payload that it lacks."""
        missing = 1 - 1 / len(self.group)
        return {"all-reduce": 2 * missing, "collective-permute": 1.0}.get(self.kind, missing) * self.payload

    def seconds(self, topology: Topology) -> float:
        """Returns a lower bound in seconds for one execution, as if every link of the device were busy."""
        chip, per_host = topology.chip, topology.devices_per_host
        within = self.received / chip.link_bandwidth
        hosts = len({device // per_host for device in self.group}) if per_host else 1
        if hosts == 1:
            return within
        # A host receives the part that it lacks through the network cards of its participating devices, each a share.
        local = len(self.group) / hosts
        share = self.received / (1 - 1 / len(self.group)) * (1 - 1 / hosts) / local
        return max(within, share / chip.network_bandwidth)


def collectives(program: hlo.Program, devices: int, share: hlo.BranchShare = hlo.always) -> list[Collective]:
    """Lists every collective among more than one device.

    devices: number of devices that the program runs on. share: as in `hlo.Program.runs`.
    """
    found: list[Collective] = []
    seen = set()
    for instruction, times in program.runs(share):
        located = _locate_collective(program, instruction)
        if located is None:
            continue
        kind, collective = located
        if instruction.opcode == "fusion":
            # A collective that continues behind several fusions appears in the text of each: count it once.
            channel = re.search(r"channel_id=(\d+)", collective.attributes)
            identity = (channel and channel[1], collective.shape, times, instruction.operation if not channel else "")
            if identity in seen:
                continue
            seen.add(identity)
        group = _group(collective.attributes, devices)
        if len(group) > 1:
            hidden = _hidden(program, instruction)
            found.append(Collective(kind, _payload(kind, collective), group, times, instruction.operation, hidden))
    return found


def _hidden(program: hlo.Program, instruction: hlo.Instruction) -> bool:
    """Returns whether the device computes while the collective is under way.

    The text of a compiled program is in execution order, so this looks for work between a start and its done.
    """
    if instruction.opcode == "fusion":
        return True  # XLA:TPU puts it into one kernel with a matrix product
    if not instruction.opcode.endswith("-start"):
        return False
    computation = next(c for c in program.computations.values() if c.get(instruction.name) is instruction)
    in_order = list(computation.values())
    for other in in_order[in_order.index(instruction) + 1 :]:
        if instruction.name in other.operands:
            return False
        if other.opcode in ("while", "conditional", "custom-call", "dot", "convolution") or "gemm" in other.name:
            return True
    return False


def _locate_collective(program: hlo.Program, instruction: hlo.Instruction) -> tuple[str, hlo.Instruction] | None:
    """Returns (kind, the instruction that holds shape and groups), or None when no collective starts here."""
    kind = next((kind for kind in KINDS if instruction.opcode in (kind, f"{kind}-start")), None)
    if kind:
        return kind, instruction
    if instruction.opcode != "fusion":
        return None
    # XLA:TPU fuses a collective with its neighbours, and writes a reduce-scatter as an all-reduce and a slice.
    name = instruction.called()[0]
    inside = [i for i in program.computations[name].values() if i.opcode in KINDS]
    if not inside or instruction.name.startswith("async-collective-done") or "done" in name:
        return None
    return ("reduce-scatter" if name.startswith("all-reduce-scatter") else inside[0].opcode), inside[0]


def _payload(kind: str, instruction: hlo.Instruction) -> int:
    """Returns the bytes of the larger of operand and result; the shape of a start instruction holds both as tuples."""
    parts = hlo.top_level(instruction.shape)
    if instruction.opcode.endswith("-start") and len(parts) > 1:
        return max(hlo.size(part) for part in parts[:2])
    whole = hlo.size(instruction.shape)
    if kind == "reduce-scatter" and instruction.opcode == "reduce-scatter":
        return whole * len(_group(instruction.attributes, 0))
    return whole


def _group(attributes: str, devices: int) -> tuple[int, ...]:
    """Parses the first group of device ids from any of the forms in which XLA writes them."""
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
    """Parses the first group of a mesh: the devices that differ only along the axes in `over`.

    For example axes "'axis_0'=16,'axis_1'=4", device_ids "[4,16]T(1,0)", over "'axis_0'".
    """
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values()))
    if device_ids:
        shape, _, order = device_ids.partition("]")
        ids = ids.reshape([int(n) for n in shape.strip("[").split(",")])
        transposed = re.search(r"T\(([\d,]+)\)?", order)
        ids = ids.transpose([int(n) for n in transposed[1].split(",")]) if transposed else ids
    ids = ids.reshape(list(sizes.values()))
    chosen = re.findall(r"'(\w+)'", over)
    index = tuple(slice(None) if name in chosen else 0 for name in sizes)
    return tuple(ids[index].ravel().tolist())


def _iota(text: str) -> np.ndarray:
    """Returns the groups of an iota such as "[4,16]<=[16,4]T(1,0)", one group per row."""
    numbers = [[int(n) for n in part.split(",")] for part in re.findall(r"[\[(]([\d,]+)[\])]", text)]
    ids = np.arange(math.prod(numbers[1])).reshape(numbers[1])
    ids = ids.transpose(numbers[2]) if len(numbers) == 3 else ids
    return ids.reshape(numbers[0])


def summarize(found: list[Collective], topology: Topology) -> dict[str, dict[str, float]]:
    """Sums the collectives of one run, as one device sees them.

    Returns {kind: {count, bytes, received_bytes, seconds, hidden}}: bytes counts payloads, and hidden is the share of
    the seconds during which the device computes.
    """
    table: dict[str, dict[str, float]] = {}
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
