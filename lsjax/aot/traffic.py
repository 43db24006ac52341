"""Counts the bytes that one run of a compiled program reads from and writes to the device's main memory.

Each instruction reads its operands and writes its result once. Values inside a fusion cost nothing, and a slice of a
larger array counts as the slice. Repeated reads inside a kernel (such as flash attention) are not visible here.
"""

from lsjax.aot import hlo

# Instructions that move nothing, or whose called computations are counted instead.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "add-dependency", "async-start", "async-update", "domain"),
}


def memory_traffic(program: hlo.Program, share: hlo.BranchShare = hlo.always) -> float:
    """Returns the bytes that one run moves on one device; `share` is that of `hlo.Program.runs`."""
    owners = {id(i): c for c in program.computations.values() for i in c.values()}
    total = 0.0
    for instruction, times in program.runs(share):
        if instruction.opcode not in _FREE and not instruction.opcode.endswith("-done"):
            total += times * _moved(program, owners[id(instruction)], instruction)
    return total


def _bytes(shape: str) -> int:
    """Returns the bytes of a shape that lie in main memory."""
    return hlo.size(shape, main_memory_only=True)


def _moved(program: hlo.Program, computation: hlo.Computation, instruction: hlo.Instruction) -> float:
    """Returns the bytes that one execution of an instruction reads and writes."""
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
    if instruction.opcode.endswith("-start"):  # its shape already holds the operands beside the result
        return written
    return written + sum(map(_bytes, shapes))


def _read(program: hlo.Program, inside: hlo.Computation, number: int, shape: str) -> float:
    """Returns the bytes that a fusion reads of operand `number`: the slices that it takes, or the whole operand."""
    names = {i.name for i in inside.values() if i.opcode == "parameter" and i.attributes == str(number)}
    read = 0.0
    for user in inside.values():  # in definition order, so that views of the operand are followed
        places = [k for k, name in enumerate(user.operands) if name in names]
        if not places:
            continue
        if user.opcode in ("bitcast", "copy", "transpose", "reshape"):
            names.add(user.name)
        elif user.opcode in ("dynamic-slice", "slice", "gather") and places == [0]:
            read += _bytes(user.shape)
        elif user.opcode == "fusion":  # XLA:TPU nests fusions
            nested = program.computations[user.called()[0]]
            read += sum(_read(program, nested, k, shape) for k in places)
        elif user.opcode != "dynamic-update-slice" or places != [0]:
            return _bytes(shape)
    return min(read, _bytes(shape))


def _written(program: hlo.Program, inside: hlo.Computation, shape: str) -> float:
    """Returns the bytes that a fusion writes: the slice that it replaces, or its whole result."""
    root = next(i for i in inside.values() if i.is_root)
    shapes = hlo.top_level(shape)
    parts = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(parts) != len(shapes):
        return _bytes(shape)
    return sum(_written_part(program, inside, *pair) for pair in zip(parts, shapes, strict=True))


def _written_part(program: hlo.Program, inside: hlo.Computation, part: hlo.Instruction, shape: str) -> float:
    """Returns the bytes that a fusion writes for one element of its result."""
    while part.opcode in ("bitcast", "copy") and part.operands:
        part = inside[part.operands[0]]
    if part.opcode == "dynamic-update-slice":
        return _bytes(inside[part.operands[1]].shape)
    if part.opcode == "fusion":
        return _written(program, program.computations[part.called()[0]], shape)
    return _bytes(shape)
