"""What a compiled program does in one step on one chip: matrix products, memory traffic, collectives, cycles.

multiplications   2 * multiply-accumulates of dots and convolutions; a convolution's taps on padding do not count
kernels           the FLOPs that Pallas kernels declare (`cost_estimate`): XLA cannot look into them
cycles            the TPU compiler's own estimate of every fusion, one after the other; collectives and Pallas
                  kernels have none
HBM bytes         what scheduled instructions read and write in the chip's main memory
wire bytes        what a chip sends: with n in a group, an all-gather (n - 1) / n of its result, a reduce-scatter or
                  all-to-all (n - 1) / n of its operand, an all-reduce both, a collective-permute its operand
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from dreamllm_jax.planning.hlo import Instruction, Module, executions, parse

Groups = list[tuple[int, ...]]
COLLECTIVE = re.compile(
    "(all-gather|all-reduce|reduce-scatter|(?:ragged-)?all-to-all|collective-(?:permute|broadcast))(-start)?"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind along the same mesh axes.

    Attributes:
      kind: as in the program; an all-gather that overlaps with a matrix product is a loop of collective-permutes.
      axis: the mesh axis they run along, several joined by "+", or "other".
      between_slices: over the data center's network; the rest runs between the chips of a slice.
      count: how many are executed.
      bytes: what a chip sends.
    """

    kind: str
    axis: str
    between_slices: bool
    count: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Program:
    """What one chip does in one step; `flops_by_name` tells multiplications apart by where they were traced."""

    flops_by_name: Mapping[str, float]
    kernel_flops: float
    cycles: float
    hbm_bytes: float
    collectives: tuple[Collective, ...]
    unknown_loops: tuple[str, ...]

    @property
    def mxu_flops(self) -> float:
        return sum(self.flops_by_name.values())


def read_program(text: str, mesh: Mapping[str, int]) -> Program:
    """Reads the text of a compiled program.

    Args:
      text: from `compiled.as_text()`.
      mesh: mesh axis -> size, in the order in which the devices lie; the first is the one that crosses slices.
    """
    module = parse(text)
    executed, unknown = executions(module)
    flops: dict[str, float] = collections.defaultdict(float)
    kernel_flops = cycles = hbm_bytes = 0.0
    sums: dict[tuple[str, str, bool], list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    seen: set[tuple] = set()
    for part in executed:
        computation = module.computations[part.computation]
        for instruction in computation.values():
            if instruction.opcode in ("dot", "convolution"):
                operands = [computation[name] for name in instruction.operands[:2]]
                flops[instruction.op_name] += part.count * multiplications(instruction, *operands)
            elif instruction.opcode == "custom-call" and '"tpu_custom_call"' in instruction.attributes:
                declared = re.search(r'"?cost_estimate"?:\s*\{[^}]*?"?flops"?:\s*"?(\d+)', instruction.attributes)
                kernel_flops += part.count * (int(declared[1]) if declared else 0)
            elif collective := COLLECTIVE.fullmatch(instruction.opcode):
                kind = collective[1]
                # Fusions that start, continue and end one collective each hold it.
                channel = re.search(r"channel_id=(\d+)", instruction.attributes)
                key = (kind, channel[1] if channel else instruction.name, part.fused or part.computation)
                groups = communicating(instruction.attributes, mesh)
                if key not in seen and groups != []:
                    seen.add(key)
                    operand = sum(computation[name].bytes for name in instruction.operands)
                    if kind == "all-reduce" and part.fused and "all-reduce-scatter" in part.computation:
                        kind = "reduce-scatter"  # each chip keeps its slice of the sum
                    total = sums[kind, axes_of(groups, mesh), False]
                    total[0] += part.count
                    total[1] += part.count * wire_bytes(instruction, kind, operand, groups, mesh)
            elif instruction.opcode == "send" and "_xla_megascale_transfer_type" in instruction.attributes:
                kind, factor = between_slices(instruction.attributes)
                total = sums[kind, next(iter(mesh)), True]
                total[0] += part.count
                total[1] += part.count * factor * computation[instruction.operands[0]].bytes
            if not part.fused:
                estimated = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
                if estimated and int(estimated[1]) < 2**62:  # which stands for none
                    cycles += part.count * int(estimated[1])
                hbm_bytes += part.count * traffic(module, part.computation, instruction)
    collectives = tuple(Collective(*key, *total) for key, total in sorted(sums.items()))
    return Program(dict(flops), kernel_flops, cycles, hbm_bytes, collectives, tuple(unknown))


# Multiplications.


def multiplications(instruction: Instruction, left: Instruction, right: Instruction) -> float:
    """FLOPs of a dot or a convolution of `left` and `right`."""
    out, left, right = (one.arrays[0].dims for one in (instruction, left, right))
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        dims = [int(dim) for dim in contracted[1].split(",") if dim] if contracted else []
        return 2.0 * math.prod(out) * math.prod(left[dim] for dim in dims)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        return 0.0
    left_labels, right_labels, out_labels = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    spatial = sum(label.isdigit() for label in left_labels)

    def option(name: str, default: str) -> list[str]:
        found = re.search(rf"\b{name}=([\dx_\-]+)", window[1] if window else "")
        return found[1].split("x") if found else [default] * spatial

    strides, paddings = option("stride", "1"), option("pad", "0_0")
    dilations = option("lhs_dilate", "1"), option("rhs_dilate", "1")
    taps = 1
    for i in range(spatial):
        taps *= valid_taps(
            left[left_labels.index(str(i))],
            right[right_labels.index(str(i))],
            out[out_labels.index(str(i))],
            stride=int(strides[i]),
            padding=int(paddings[i].split("_")[0]),
            left_dilation=int(dilations[0][i]),
            right_dilation=int(dilations[1][i]),
        )
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    channels = right[right_labels.index("i")] * right[right_labels.index("o")]
    return 2.0 * taps * channels * left[left_labels.index("b")] / (int(groups[1]) if groups else 1)


@functools.lru_cache(maxsize=4096)
def valid_taps(
    size: int, window: int, outputs: int, stride: int, padding: int, left_dilation: int = 1, right_dilation: int = 1
) -> int:
    """How many (output, tap) pairs along one dimension of a convolution meet an element of the input.

    Args:
      padding: before the first element.
      left_dilation, right_dilation: distance of the input's elements, and of the taps.
    """
    positions = np.arange(outputs)[:, None] * stride + np.arange(window) * right_dilation - padding
    inside = (positions >= 0) & (positions <= (size - 1) * left_dilation)
    return int(np.count_nonzero(inside & (positions % left_dilation == 0)))


# Collectives.


# Sizes of the axes; the devices' order, as iota's dimensions and their transposition or as a list; the axes that meet.
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\))?"
    r" \{([^}]*)\}"
)


def communicating(attributes: str, mesh: Mapping[str, int]) -> Groups | None:
    """The groups of devices that a collective runs over, without those of one; None for one group of all.

    Understands `{{0,1},{2,3}}`, `[2,4]<=[4,2]T(1,0)`, `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}` and
    source-target pairs.

    Raises:
      ValueError: groups in another notation.
    """
    if pairs := re.search(r"source_target_pairs=(\{\{[\d,{}\s]*\}\}|\{\})", attributes):
        groups = _listed(pairs[1])
        return [pair for pair in groups if pair[0] != pair[1]]
    if grid := re.search(_MESH_GROUPS, attributes):
        groups = _along_axes(*grid.groups())
    elif iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, dims, transpose = iota.groups()
        groups = [tuple(group) for group in _iota([int(n) for n in shape.split(",")], dims, transpose).tolist()]
    elif listed := re.search(r"replica_groups=(\{\{[\d,{}\s]*\}\})", attributes):
        groups = _listed(listed[1])
    elif "replica_groups={}" in attributes or "replica_groups=" not in attributes:
        return None if math.prod(mesh.values()) > 1 else []
    else:
        raise ValueError(f"the groups of a collective are written in an unknown way: {attributes[:300]}")
    return [group for group in groups if len(group) > 1]


def _listed(text: str) -> Groups:
    return [tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,\s]+)\}", text)]


def _iota(shape: Sequence[int], dims: str, transpose: str | None) -> np.ndarray:
    """Devices 0, 1, ... laid out as `dims`, transposed, and read in `shape`."""
    sizes = [int(dim) for dim in dims.split(",")]
    devices = np.arange(math.prod(sizes)).reshape(sizes)
    if transpose:
        devices = devices.transpose([int(axis) for axis in transpose.split(",")])
    return devices.reshape(shape)


def _along_axes(sizes: str, dims: str | None, transpose: str | None, listed: str | None, along: str) -> Groups:
    """The groups along axes of a mesh; `'a':(2)4` is the part of size 4 of axis `a` that follows a part of size 2."""
    axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", sizes)}
    chosen = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", along)
    shape, kept, grouped = [], [], []
    for name, size in axes.items():
        parts, at = [], 1
        for before, part in sorted((int(b), int(p)) for n, b, p in chosen if n == name and p):
            parts += [(before // at, False)] if before > at else []
            parts.append((part, True))
            at = before * part
        parts.append((size // at, (name, "", "") in chosen))
        for part, is_grouped in parts:
            (grouped if is_grouped else kept).append(len(shape))
            shape.append(part)
    if listed:
        devices = np.array([int(device) for device in listed.split(",")]).reshape(shape)
    else:
        devices = _iota(shape, dims or str(math.prod(shape)), transpose)
    group_size = math.prod(shape[axis] for axis in grouped)
    return [tuple(group) for group in devices.transpose(kept + grouped).reshape(-1, group_size).tolist()]


def axes_of(groups: Groups | None, mesh: Mapping[str, int]) -> str:
    """The mesh axes along which the groups' devices differ, joined by "+"."""
    devices = math.prod(mesh.values())
    if groups is None:
        return "+".join(axis for axis, size in mesh.items() if size > 1)
    if any(device >= devices for group in groups for device in group):
        return "other"
    names: set[str] = set()
    for group in groups:
        places = np.stack(np.unravel_index(np.array(group), tuple(mesh.values())))
        names |= {axis for axis, place in zip(mesh, places, strict=True) if np.ptp(place)}
    return "+".join(axis for axis in mesh if axis in names)


def wire_bytes(
    instruction: Instruction, kind: str, operand_bytes: float, groups: Groups | None, mesh: Mapping[str, int]
) -> float:
    """Bytes that one chip sends."""
    if kind == "collective-permute":
        return operand_bytes
    members = math.prod(mesh.values()) if groups is None else len(groups[0])
    share = (members - 1) / members
    if kind == "all-gather":
        # What a "start" makes is its operands beside its results.
        started = instruction.opcode.endswith("-start")
        return share * (instruction.bytes - operand_bytes * started)
    return share * operand_bytes * (2 if kind == "all-reduce" else 1)


def between_slices(attributes: str) -> tuple[str, float]:
    """Kind of a transfer between slices, and bytes that a chip sends for each that it hands over.

    The collective is left to a runtime on the hosts, which works slice by slice: `_xla_megascale_target="{1,2}x..."`.
    """
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', attributes)[1].lower().replace("_", "-")
    target = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', attributes)
    slices = 0
    for group in target[1].split(",") if target else ():
        first, _, last = group.partition(":")
        slices += int(last or first) - int(first) + 1
    slices = max(slices, 2)
    factors = {"all-reduce": 2 * (slices - 1) / slices, "all-gather": slices - 1, "collective-permute": 1}
    return kind, factors.get(kind, (slices - 1) / slices)


# Memory traffic.

_MOVES_NOTHING = re.compile(
    "parameter|constant|tuple|get-tuple-element|bitcast|while|conditional|call(-start|-update)?|(partition|replica)-id|"
    "after-all|iota|opt(imization)?-barrier|domain|rng-get-and-update-state|infeed|outfeed|send|recv|async.*|.*-done"
)


def traffic(module: Module, computation: str, instruction: Instruction) -> float:
    """HBM bytes that one scheduled instruction reads and writes."""
    opcode, scope = instruction.opcode, module.computations[computation]
    operands = [scope[name] for name in instruction.operands if name in scope]
    if _MOVES_NOTHING.fullmatch(opcode) or "AllocateBuffer" in instruction.attributes:
        return 0.0
    if opcode == "fusion":
        return _fusion_traffic(module, operands, instruction)
    if opcode in ("copy-start", "slice-start"):
        result = instruction.arrays[0]
        return min(sum(one.hbm_bytes for one in operands), result.bytes) + result.bytes * result.in_hbm
    if opcode.endswith("-start"):  # of a collective: makes what it reads and what it writes
        return instruction.hbm_bytes
    if opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * instruction.hbm_bytes
    if opcode == "dynamic-update-slice":
        return 2 * operands[1].hbm_bytes
    return instruction.hbm_bytes + sum(one.hbm_bytes for one in operands)


def _fusion_traffic(module: Module, operands: Iterable[Instruction], fusion: Instruction) -> float:
    """What a fusion moves; of what it slices or updates in place only the slice."""
    called = fusion.called()
    read = _read_of_parameters(module, called)
    total = sum(read.get(i, one.hbm_bytes) for i, one in enumerate(operands) if one.hbm_bytes)
    scope, root = module.computations[called], module.root(called)
    made = [scope[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for one, array in zip(made, fusion.arrays, strict=False):
        while one.opcode == "bitcast" and one.operands:
            one = scope[one.operands[0]]
        if array.in_hbm:
            total += scope[one.operands[1]].bytes if one.opcode == "dynamic-update-slice" else array.bytes
    return total


def _read_of_parameters(module: Module, computation: str) -> dict[int, float]:
    """Parameter number -> bytes that a fused computation really reads of it."""
    scope = module.computations[computation]
    users: dict[str, list[Instruction]] = collections.defaultdict(list)
    for instruction in scope.values():
        for name in set(instruction.operands):
            users[name].append(instruction)

    def read(name: str) -> float | None:
        """Bytes read of a value by slices alone; None if something takes all of it."""
        if scope[name].is_root:
            return None
        total = 0.0
        for user in users[name]:
            if user.opcode in ("dynamic-slice", "slice") or (user.opcode == "gather" and user.operands[0] == name):
                part = user.bytes
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                part = 0.0
            elif user.opcode == "scatter" and user.operands[0] == name:
                part = scope[user.operands[-1]].bytes
            elif user.opcode == "bitcast":
                part = read(user.name)
            elif user.opcode == "fusion":
                inner = _read_of_parameters(module, user.called())
                part = sum(inner[i] for i, operand in enumerate(user.operands) if operand == name)
            else:
                return None
            if part is None:
                return None
            total += part
        return total

    found = {}
    for instruction in scope.values():
        if instruction.opcode == "parameter":
            part = read(instruction.name)
            whole = instruction.bytes
            found[int(instruction.arguments)] = whole if part is None else min(whole, part)
    return found
