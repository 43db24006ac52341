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
        inside = program.computations[instruction.called()[0]]
        read = sum(_read(program, inside, k, shape) for k, shape in enumerate(shapes))
        return read + _written(program, inside, instruction.shape)
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * written
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _bytes(shapes[1])
    if instruction.opcode == "slice-start":  # ((operand), slice, ...)
        part = hlo.top_level(instruction.shape)[1]
        return _bytes(part) + (hlo.size(part) if _bytes(shapes[0]) else 0)
    if instruction.opcode.endswith("-start"):  # its shape holds the operands beside the result
        return written
    return written + sum(map(_bytes, shapes))


def _read(program: hlo.Program, inside: hlo.Computation, number: int, shape: str) -> float:
    """Of operand `number` of a fusion: all of it, or only the slices taken."""
    names = {i.name for i in inside.values() if i.opcode == "parameter" and i.attributes == str(number)}
    read = 0.0
    for user in inside.values():  # in order of definition, so that views are followed
        places = [k for k, name in enumerate(user.operands) if name in names]
        if not places:
            continue
        if user.opcode in ("bitcast", "copy", "transpose", "reshape"):
            names.add(user.name)
        elif user.opcode in ("dynamic-slice", "slice", "gather") and places == [0]:
            read += _bytes(user.shape)
        elif user.opcode == "fusion":  # XLA:TPU nests them
            nested = program.computations[user.called()[0]]
            read += sum(_read(program, nested, k, shape) for k in places)
        elif user.opcode != "dynamic-update-slice" or places != [0]:
            return _bytes(shape)
    return min(read, _bytes(shape))


def _written(program: hlo.Program, inside: hlo.Computation, shape: str) -> float:
    """Of a fusion's result: all of it, or only the slice that is replaced."""
    root = next(i for i in inside.values() if i.is_root)
    shapes = hlo.top_level(shape)
    parts = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(parts) != len(shapes):
        return _bytes(shape)
    return sum(_written_part(program, inside, *pair) for pair in zip(parts, shapes, strict=True))


def _written_part(program: hlo.Program, inside: hlo.Computation, part: hlo.Instruction, shape: str) -> float:
    while part.opcode in ("bitcast", "copy") and part.operands:
        part = inside[part.operands[0]]
    if part.opcode == "dynamic-update-slice":
        return _bytes(inside[part.operands[1]].shape)
    if part.opcode == "fusion":
        return _written(program, program.computations[part.called()[0]], shape)
    return _bytes(shape)
