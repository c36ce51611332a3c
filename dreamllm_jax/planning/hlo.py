"""Reads the text of an optimised XLA program: its computations, and how often each of them is executed.

XLA's own cost analysis counts the body of a loop once. A scanned stack of layers is one loop, and collectives that
overlap with matrix products are further loops inside it; here each computation is weighted by the trip counts of all
loops around it.

    %name (parameters) -> result {                                         a computation
      %name = shape opcode(operands), attribute=value, ...                 an instruction
      ROOT %name = (shape, shape) tuple(%a, %b)                            ... whose value is the computation's
    }
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "f8e4m3fn": 8, "f8e5m2": 8, "s16": 16, "u16": 16, "f16": 16}
_BITS |= {"bf16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128}

_START = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](\{[^}]*\})?")
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array's shape, or one of a tuple's."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool  # not in one of the chip's small memories

    @property
    def bytes(self) -> float:
        return functools.reduce(int.__mul__, self.dims, 1) * _BITS[self.dtype] / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction; `arguments` is the text between its parentheses, `attributes` what follows them."""

    name: str
    opcode: str
    shape: str
    arguments: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        return tuple(re.findall(r"%([\w.\-]+)", _COMMENT.sub("", self.arguments)))

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays it makes; tokens and other opaque things left out."""
        found = []
        for dtype, dims, layout in _ARRAY.findall(self.shape):
            if dtype in _BITS:
                sizes = tuple(int(size.removeprefix("<=")) for size in dims.split(",") if size)
                found.append(Array(dtype, sizes, re.search(r"S\([1-9]\d*\)", layout) is None))
        return tuple(found)

    @property
    def bytes(self) -> float:
        return sum(array.bytes for array in self.arrays)

    @property
    def hbm_bytes(self) -> float:
        return sum(array.bytes for array in self.arrays if array.in_hbm)

    def called(self, attribute: str = "calls|to_apply|called_computation") -> str | None:
        """The computation that an attribute names."""
        match = re.search(rf"\b(?:{attribute})=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    computations: Mapping[str, Computation]
    entry: str

    def root(self, computation: str) -> Instruction:
        return next(one for one in self.computations[computation].values() if one.is_root)


def parse(text: str) -> Module:
    """Reads what `compiled.as_text()` gives.

    Raises:
      ValueError: it is no such text.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current, pending = None, None, ""

    def finish() -> None:
        if current is not None and pending and (instruction := _instruction(pending)):
            current[instruction.name] = instruction

    for line in text.splitlines():
        header = None if line.startswith(" ") else _HEADER.match(line)
        if header or line.rstrip() == "}":
            finish()
            pending, current = "", None
            if header:
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif current is not None and _START.match(line):
            finish()
            pending = line
        else:  # attributes may hold line breaks
            pending += " " + line
    if entry is None:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction | None:
    start = _START.match(line)
    rest = line[start.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = _COMMENT.sub("", rest[:end]), rest[end:].lstrip()
    opcode = re.match(r"([\w\-]+)\(", rest)
    if opcode is None:
        return None
    end = _closing(rest, opcode.end() - 1)
    return Instruction(start[2], opcode[1], shape, rest[opcode.end() : end], rest[end + 1 :], bool(start[1]))


_PARENTHESES = re.compile(r'"(?:[^"\\]|\\.)*"|[()]')


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes; those in quotation marks do not count."""
    depth = 0
    for match in _PARENTHESES.finditer(text, start):
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return len(text)


# "call-start" is another core's work, such as a gather on a SparseCore.
_CALLS = ("fusion", "call", "call-start", "async-start")


@dataclasses.dataclass(frozen=True)
class Executed:
    """A computation, how often it is executed in a step, and whether it is part of a fusion."""

    computation: str
    count: float
    fused: bool


def executions(module: Module) -> tuple[list[Executed], list[str]]:
    """Every computation as often as it is called, and the loops whose trip count is unknown (counted as one).

    Of a conditional every branch is counted: an upper bound.
    """
    counts: dict[tuple[str, bool], float] = collections.defaultdict(float)
    unknown: list[str] = []

    def visit(computation: str, count: float, fused: bool) -> None:
        counts[computation, fused] += count
        for instruction in module.computations[computation].values():
            if instruction.opcode == "while":
                trips = trip_count(module, computation, instruction)
                if trips is None:
                    unknown.append(instruction.name)
                visit(instruction.called("body"), count * (1 if trips is None else trips), False)
            elif instruction.opcode == "conditional":
                for branch in _branches(instruction):
                    visit(branch, count, False)
            elif instruction.opcode in _CALLS and (called := instruction.called()):
                visit(called, count, fused or instruction.opcode == "fusion")

    visit(module.entry, 1.0, False)
    return [Executed(name, count, fused) for (name, fused), count in counts.items()], unknown


def _branches(conditional: Instruction) -> Iterator[str]:
    if listed := re.search(r"branch_computations=\{([^}]*)\}", conditional.attributes):
        yield from (name.strip().lstrip("%") for name in listed[1].split(","))
    for attribute in ("true_computation", "false_computation"):
        if name := conditional.called(attribute):
            yield name


def trip_count(module: Module, computation: str, loop: Instruction) -> int | None:
    """How often a `while` in `computation` runs its body; None if it does not count from a constant to a constant."""
    if known := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes):
        return int(known[1])
    condition, body = loop.called("condition"), loop.called("body")
    compare = _trace(module, condition, module.root(condition).name)
    if compare.instruction.opcode != "compare":
        return None

    def initial(index: int) -> int | None:
        return _trace(module, computation, loop.operands[0], index=index).constant

    left, right = (compare.operand(module, i) for i in (0, 1))
    counter = left.index
    limit = right.constant if right.index is None else initial(right.index)
    if counter is None or limit is None:
        return None
    start, step = initial(counter) or 0, 1
    update = _trace(module, body, module.root(body).name, index=counter)
    if update.instruction.opcode in ("add", "subtract"):
        terms = [update.operand(module, i).constant for i in (0, 1)]
        step = next((term for term in terms if term), 1)
        step = -step if update.instruction.opcode == "subtract" else step
    direction = re.search(r"direction=(\w+)", compare.instruction.attributes)[1]
    distance = limit - start if step > 0 else start - limit
    return max(0, -(-(distance + (direction in ("LE", "GE"))) // abs(step)))


@dataclasses.dataclass(frozen=True)
class _Value:
    """What makes a scalar: an instruction, and the fusions that it was found in, innermost first."""

    instruction: Instruction
    computation: str
    frames: tuple[tuple[str, Instruction], ...]

    @property
    def constant(self) -> int | None:
        found = re.fullmatch(r"\s*(-?\d+)\s*", self.instruction.arguments)
        return int(found[1]) if found and self.instruction.opcode == "constant" else None

    @property
    def index(self) -> int | None:
        """Which element of the loop's state it is, if it is one."""
        if self.instruction.opcode != "get-tuple-element":
            return None
        return int(re.search(r"index=(\d+)", self.instruction.attributes)[1])

    def operand(self, module: Module, i: int) -> "_Value":
        return _trace(module, self.computation, self.instruction.operands[i], self.frames)


_SAME = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "optimization-barrier", "opt-barrier")


def _trace(
    module: Module,
    computation: str,
    name: str,
    frames: tuple[tuple[str, Instruction], ...] = (),
    index: int | None = None,
) -> _Value:
    """Follows a value to where it is made: through copies, tuples, fusions and the fusions' parameters.

    Args:
      index: which element of the value, if it is a tuple.
    """
    while True:
        instruction = module.computations[computation][name]
        opcode = instruction.opcode
        if opcode in _SAME:
            name = instruction.operands[0]
        elif opcode == "tuple" and index is not None:
            name, index = instruction.operands[index], None
        elif opcode == "get-tuple-element" and index is None and _is_known_tuple(module, computation, instruction):
            name, index = instruction.operands[0], int(re.search(r"index=(\d+)", instruction.attributes)[1])
        elif opcode in ("fusion", "call") and instruction.called():
            frames = ((computation, instruction), *frames)
            computation = instruction.called()
            name = module.root(computation).name
        elif opcode == "parameter" and frames:
            (computation, caller), *rest = frames
            frames, name = tuple(rest), caller.operands[int(instruction.arguments)]
        else:
            return _Value(instruction, computation, frames)


def _is_known_tuple(module: Module, computation: str, element: Instruction) -> bool:
    return module.computations[computation][element.operands[0]].opcode in ("tuple", "fusion", "call")
