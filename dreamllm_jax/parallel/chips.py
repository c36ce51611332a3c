"""What the TPU chips can do, and what the names of their slices mean.

Sources: the system architecture pages of Cloud TPU v4, v5e, v5p and v6e (https://cloud.google.com/tpu/docs/v4, /v5e,
/v5p, /v6e). They state a chip's interconnect in both directions together, or a pod's network bandwidth; here it is one
direction of one chip. Clocks are those by which XLA's TPU compiler counts its cycles.

JAX is imported only where a device is meant: names alone are also read by launch/, on machines without it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip: what JAX calls a TPU device.

    Attributes:
      kind: its Cloud name.
      device_kinds: what `jax.Device.device_kind` calls it.
      peak_flops: bfloat16 FLOP/s of its matrix units.
      hbm_bytes: memory that a program may use.
      ici_bandwidth: bytes/s that it sends over all its links to other chips of the slice.
      dcn_bandwidth: bytes/s that it sends to other slices.
      clock: Hz.
      cores: TensorCores; Cloud names of v4 and v5p count them.
      dimensions: of the torus of chips.
    """

    kind: str
    device_kinds: tuple[str, ...]
    peak_flops: float
    hbm_bytes: int
    ici_bandwidth: float
    dcn_bandwidth: float
    clock: float
    cores: int
    dimensions: int


def _gib(size: float) -> int:
    return int(size * 2**30)


CHIPS = {
    chip.kind: chip
    for chip in (
        Chip("v4", ("TPU v4",), 275e12, _gib(30.75), 300e9, 6.25e9, 1.05e9, 2, 3),
        Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, _gib(15.75), 200e9, 3.125e9, 1.5e9, 1, 2),
        Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, _gib(95.74), 600e9, 6.25e9, 1.75e9, 2, 3),
        Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, _gib(31.25), 400e9, 12.5e9, 1.75e9, 1, 2),
    )
}
_ALIASES = {"v5litepod": "v5e"}

# Chips -> the shape in which Cloud TPU gives that many.
_SHAPES = {
    2: {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    3: {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
    | {1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16"},
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or several slices of `shape` (such as "2x2x4") chips each."""

    name: str
    chip: Chip
    shape: str
    slices: int = 1

    @property
    def chips(self) -> int:
        return self.slices * math.prod(map(int, self.shape.split("x")))

    @property
    def chips_per_host(self) -> int:
        """Four, but for slices of v5e and v6e that are one host."""
        chips = self.chips // self.slices
        return chips if self.chip.dimensions == 2 and chips <= 8 else 4

    @property
    def hosts(self) -> int:
        """Of all slices together."""
        return self.chips // self.chips_per_host

    def devices(self) -> list[jax.Device]:
        """Devices to compile for, without there being any.

        Raises:
          ImportError: libtpu, which holds the compiler, is not installed.
          ValueError: libtpu knows no such slice, or is locked by another process.
        """
        import jax
        from jax.experimental import topologies

        options: dict[str, Any] = {"num_slices": self.slices} if self.slices > 1 else {}
        if self.chip.kind == "v4":
            options["chip_config_name"] = "megacore"  # both cores as one device
        if self.chips == self.slices:
            options["chips_per_host_bounds"] = (1, 1, 1)  # of a host's chips only one
        try:
            import libtpu  # noqa: F401
        except ImportError:
            raise ImportError(
                'the TPU compiler is missing: pip install "dreamllm_jax[tpu]" (no TPU is needed)'
            ) from None
        try:
            name = f"{self.chip.kind}:{self.shape}"
            return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
        except (RuntimeError, jax.errors.JaxRuntimeError) as error:
            said = " ".join(str(error).split())
            if "lockfile" in said or "already in use" in said:
                raise ValueError(
                    f"libtpu is in use by another process on this machine; end it first ({said})"
                ) from None
            raise ValueError(f"libtpu cannot describe {self.name}: {said}") from None


def find_topology(name: str) -> Topology:
    """The slice of a Cloud name: `v5p-128`, `v5e-16`, two slices `v5p-128x2`, or chips in a shape, `v5p:4x4x4`.

    v4 and v5p names count TensorCores, two a chip; v5e and v6e names count chips.

    Raises:
      ValueError: saying what there is.
    """
    match = re.fullmatch(r"(\w+?)(?:-(\d+)(?:x(\d+))?|:(\d+(?:x\d+)*))?", name)
    if match is None:
        raise ValueError(f"{name!r} is no slice of TPU chips; write it as v5p-128, v5p-128x2 or v5p:4x4x4")
    kind, size, slices, shape = match.groups()
    chip = CHIPS.get(_ALIASES.get(kind, kind))
    if chip is None:
        near = difflib.get_close_matches(kind, CHIPS, n=1)
        raise ValueError(f"no chip {kind!r}: there are {', '.join(CHIPS)}{f'; is it {near[0]}?' if near else ''}")
    shapes = _SHAPES[chip.dimensions]
    if shape:  # and perhaps the number of slices after its sides
        sides = shape.split("x")
        if len(sides) > chip.dimensions:
            *sides, slices = sides
        if len(sides) != chip.dimensions:
            raise ValueError(f"{name!r}: a slice of {chip.kind} has {chip.dimensions} sides, as {shapes[16]}")
        shape = "x".join(sides)
    else:
        chips, rest = divmod(int(size or 0), chip.cores)
        shape = None if rest else shapes.get(chips)
        if shape is None:
            names = [f"{chip.kind}-{chips * chip.cores}" for chips in shapes]
            raise ValueError(f"{name!r} is no slice of {chip.kind}: there are {', '.join(names)}")
    if slices == "0":
        raise ValueError(f"{name!r}: the number of slices must be positive")
    return Topology(name, chip, shape, int(slices or 1))


def chip_of(device: jax.Device) -> Chip | None:
    """The chip of a device that is there; None if it is no TPU known here."""
    return next((chip for chip in CHIPS.values() if device.device_kind in chip.device_kinds), None)
