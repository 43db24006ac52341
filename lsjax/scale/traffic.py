"""Bytes that one run of a compiled program reads from and writes to the device's main memory.

Each instruction reads its operands and writes its result once; what a fusion keeps to itself costs nothing, and
slices of a larger array count as the slice. What a kernel (flash attention, say) reads twice is not seen.
"""

from collections.abc import Callable

from lsjax.scale import hlo

# They move nothing, or are counted by what they run.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "add-dependency", "async-start", "async-update", "domain"),
}


def memory_traffic(program: hlo.Program, share: Callable[[hlo.Instruction], float] = lambda _: 1.0) -> float:
    """Bytes of one run on one device; `share` as in `Program.runs`."""
    owners = {id(i): c for c in program.computations.values() for i in c.values()}
    total = 0.0
    for instruction, times in program.runs(share):
        if instruction.opcode not in _FREE and not instruction.opcode.endswith("-done"):
            total += times * _moved(program, owners[id(instruction)], instruction)
    return total


def _bytes(shape: str) -> int:
    return hlo.size(shape, main_memory_only=True)


def _moved(program: hlo.Program, computation: hlo.Computation, instruction: hlo.Instruction) -> float:
    shapes = [computation[name].shape for name in instruction.operands if name in computation]
    written = _bytes(instruction.shape)
    if instruction.opcode == "fusion":
        return _fused(program.computations[instruction.called()[0]], instruction, shapes)
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * written
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _bytes(shapes[1])
    if instruction.opcode.endswith("-start"):  # its shape holds the operands beside the result
        return written
    return written + sum(map(_bytes, shapes))


def _fused(inside: hlo.Computation, fusion: hlo.Instruction, shapes: list[str]) -> float:
    parameters = {
        int(i.attributes): i.name for i in inside.values() if i.opcode == "parameter" and i.attributes.isdigit()
    }
    read = sum(_read(inside, parameters.get(k, ""), shape) for k, shape in enumerate(shapes))
    root = next(i for i in inside.values() if i.is_root)
    parts = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    results = hlo.top_level(fusion.shape)
    if len(parts) != len(results):
        return read + _bytes(fusion.shape)
    return read + sum(_written(inside, part, shape) for part, shape in zip(parts, results, strict=True))


def _read(inside: hlo.Computation, parameter: str, shape: str) -> float:
    """Of a fusion's operand: all of it, or only the slices taken."""
    names, users = {parameter}, []
    for instruction in inside.values():  # in order of definition, so that bitcasts are followed
        if names.isdisjoint(instruction.operands):
            continue
        if instruction.opcode in ("bitcast", "copy", "transpose", "reshape"):
            names.add(instruction.name)
        else:
            users.append(instruction)
    read = 0
    for user in users:
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] in names:
            read += _bytes(user.shape)
        elif not (user.opcode == "dynamic-update-slice" and user.operands[0] in names):
            return _bytes(shape)
    return min(read, _bytes(shape))


def _written(inside: hlo.Computation, part: hlo.Instruction, shape: str) -> float:
    """Of a fusion's result: all of it, or only the slice that is replaced."""
    while part.opcode in ("bitcast", "copy") and part.operands:
        part = inside[part.operands[0]]
    if part.opcode == "dynamic-update-slice":
        return _bytes(inside[part.operands[1]].shape)
    return _bytes(shape)
