"""A reader for the HLO text of compiled programs: which instructions run, how often, and the bytes of their arrays.

XLA's own cost analysis counts the body of a loop once; this reader multiplies it by the loop's trip count.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

_BITS = {"pred": 8, "s4": 4, "u4": 4, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_LISTS = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")


class Instruction(NamedTuple):
    """One line of HLO.

    shape, attributes: as written in the text; attributes of a constant or parameter are its value or number.
    operands: names of instructions of the same computation.
    is_root: True for the result of its computation.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def operation(self) -> str:
        """Returns the path of JAX names that it came from, such as jit(train_step)/.../dot_general; "" if unknown."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self) -> list[str]:
        """Returns the names of the computations that it runs."""
        lists = [
            name.strip().lstrip("%") for text in _CALLED_LISTS.findall(self.attributes) for name in text.split(",")
        ]
        return _CALLED.findall(self.attributes) + [name for name in lists if name]


Computation = dict[str, Instruction]

# Maps a conditional to the share of its executions that take the branch with the most instructions.
BranchShare = Callable[[Instruction], float]


def always(conditional: Instruction) -> float:
    """Returns 1: the largest branch is taken every time."""
    return 1.0


class Program(NamedTuple):
    """A parsed program.

    computations: {name: computation}, fusions and loop bodies among them.
    entry: name of the computation where execution begins.
    unknown_trip_count: iterations to assume for a loop whose trip count the text does not give.
    """

    computations: dict[str, Computation]
    entry: str
    unknown_trip_count: int = 1

    def runs(self, share: BranchShare = always) -> Iterator[tuple[Instruction, float]]:
        """Yields every instruction with the number of times it runs, except instructions inside fusions.

        share: the share of executions in which a conditional takes the branch with the most instructions. The other
        branches are not counted: they are small and return zeros.
        """
        yield from self._runs(self.entry, 1.0, share)

    def _runs(self, computation: str, times: float, share: BranchShare) -> Iterator[tuple[Instruction, float]]:
        for instruction in self.computations[computation].values():
            yield instruction, times
            if instruction.opcode == "while":
                body = _found(r"body=%?([\w.\-]+)", instruction.attributes)
                yield from self._runs(body, times * (self.trip_count(instruction) or self.unknown_trip_count), share)
            elif instruction.opcode == "conditional":
                largest = max(instruction.called(), key=self._size)
                yield from self._runs(largest, times * share(instruction), share)
            elif instruction.opcode in ("call", "async-start"):
                for name in instruction.called():
                    yield from self._runs(name, times, share)

    def _size(self, computation: str) -> int:
        """Counts the instructions of a computation and of those that it runs."""
        inside = (i for i in self.computations[computation].values() if i.opcode in ("while", "conditional", "call"))
        below = (self._size(name) for i in inside for name in i.called() if name in self.computations)
        return len(self.computations[computation]) + sum(below)

    def trip_count(self, loop: Instruction) -> int | None:
        """Returns the iterations of a counted loop; None when the text does not say because values decide."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[_found(r"condition=%?([\w.\-]+)", loop.attributes)]
        root = next(i for i in condition.values() if i.is_root)
        comparison = root
        if root.opcode == "fusion":
            comparison = next(i for i in self.computations[root.called()[0]].values() if i.is_root)
        limits = [i for i in condition.values() if i.opcode == "constant" and i.shape.startswith("s32[]")]
        if comparison.opcode != "compare" or "direction=LT" not in comparison.attributes or len(limits) != 1:
            return None
        return int(_found(r"^(\d+)", limits[0].attributes))


def parse(text: str) -> Program:
    """Parses the HLO text of a compiled program (`compiled.as_text()`)."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif current is not None and " = " in line:
            instruction = _instruction(line.strip())
            current[instruction.name] = instruction
    return Program(computations, entry)


def _instruction(line: str) -> Instruction:
    """Parses one line of the form `%name = shape opcode(operands), attributes`."""
    left, right = line.split(" = ", 1)
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    shape, rest = right[:end], right[end:].strip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inner, after = rest[opening + 1 : closing], rest[closing + 1 :]
    opcode = rest[:opening]
    is_root = left.startswith("ROOT ")
    name = left.removeprefix("ROOT ").lstrip("%")
    if opcode in ("constant", "parameter"):
        return Instruction(name, shape, opcode, (), inner, is_root)
    return Instruction(name, shape, opcode, tuple(re.findall(r"%([\w.\-]+)", inner)), after, is_root)


def _found(pattern: str, text: str) -> str:
    """Returns the first group of a pattern. Raises ValueError when the text does not hold what XLA always writes."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"this HLO is of another form: {text[:200]!r} has no {pattern}")
    return found[1]


def _closing(text: str, opening: int) -> int:
    """Returns the index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for index in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    return len(text) - 1


def arrays(shape: str) -> list[tuple[str, tuple[int, ...], bool]]:
    """Returns (dtype, dimensions, in main memory) per array of a shape; a TPU layout marks arrays in fast memory."""
    return [
        (dtype, tuple(map(int, sizes.split(","))) if sizes else (), not re.search(r"S\([1-9]\d*\)", layout or ""))
        for dtype, sizes, layout in _ARRAY.findall(shape)
        if dtype != "token"
    ]


def top_level(shape: str) -> list[str]:
    """Splits a tuple shape into its elements; any other shape is returned as the only element."""
    if not shape.startswith("("):
        return [shape]
    parts, depth, start = [], 0, 1
    for index in range(1, len(shape) - 1):
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(shape[index], 0)
        if shape[index] == "," and depth == 0:
            parts.append(shape[start:index].strip())
            start = index + 1
    return [*parts, shape[start:-1].strip()]


def size(shape: str, *, main_memory_only: bool = False) -> int:
    """Returns the bytes of all arrays of a shape."""
    return sum(
        math.prod(sizes) * _bits(dtype) // 8
        for dtype, sizes, in_main_memory in arrays(shape)
        if in_main_memory or not main_memory_only
    )


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 0
