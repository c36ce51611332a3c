"""The device mesh, the logical axes, and the rules that map one to the other.

Weights and activations name their axes logically; `ShardingConfig.rules` says which mesh axes each name is split over.
A mesh axis that does not divide a dimension is left out for that array: a convolution with 4 output channels stays
whole.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "sequence", "tensor")

DEFAULT_RULES: Mapping[str, tuple[str, ...]] = {
    # Activations.
    "rows": ("data", "fsdp"),
    "tokens": ("sequence",),
    "row_parts": ("data", "fsdp", "sequence"),  # the devices' parts of rows, one after the other
    "images": ("data", "fsdp", "sequence", "tensor"),  # the towers are small: no chip repeats another's image
    "act_embed": (),
    "act_heads": ("tensor",),
    "attention_heads": ("tensor", "sequence"),  # while attending, whole rows meet: their heads are split instead
    "act_mlp": ("tensor",),
    # The language model's weights.
    "vocab": ("tensor",),
    "embed": ("fsdp", "sequence"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "norm": (),
    "lora": (),  # the rank of adapters
    "layers": (),
    # The image towers' and projectors' weights.
    "tower_in": (),
    "tower_out": ("fsdp", "sequence", "tensor"),
    "tower_norm": (),
}


# Along these logical axes weights are split where they are stored, not where they are used.
STORED_APART = ("embed", "tower_in", "tower_out", "tower_norm")


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
    """Sizes of the mesh axes (at most one may be -1: the devices left over) and the rules.

    Attributes:
      data: replicas of the weights; the axis that crosses slices.
      fsdp: shards of weights and optimizer state; rows are split over `data` and `fsdp`.
      sequence: parts of a row; weights and optimizer state are split over it too.
      tensor: parts of heads and of the feed-forward width.
      rules: logical axis -> mesh axes, for the names that differ from `DEFAULT_RULES`.
    """

    data: int = 1
    fsdp: int = -1
    sequence: int = 1
    tensor: int = 1
    rules: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        sizes = [self.data, self.fsdp, self.sequence, self.tensor]
        if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
            raise ValueError(f"mesh sizes must be positive, at most one -1 for the devices left over, got {sizes}")
        for name, axes in self.rules.items():
            if name not in DEFAULT_RULES:
                raise ValueError(f"rules: unknown logical axis {name!r}; there are {', '.join(DEFAULT_RULES)}")
            if unknown := set(axes) - set(MESH_AXES):
                raise ValueError(f"rules.{name}: unknown mesh axes {sorted(unknown)}; there are {', '.join(MESH_AXES)}")

    @property
    def all_rules(self) -> dict[str, tuple[str, ...]]:
        return {**DEFAULT_RULES, **self.rules}


def make_mesh(config: ShardingConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (default: all). Of several slices of chips, `data` crosses them, every other axis lies
    inside one.

    Raises:
      ValueError: if the configured sizes do not multiply to the number of devices, `data` not to that of the slices, or
        the chips cannot be laid out so.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.sequence, config.tensor]
    asked = ", ".join(f"{name}={size}" for name, size in zip(MESH_AXES, sizes, strict=True))
    fixed = math.prod(size for size in sizes if size != -1)
    if len(devices) % fixed or (-1 not in sizes and fixed != len(devices)):
        raise ValueError(
            f"the mesh ({asked}) does not fit {len(devices)} devices: change sharding.*, or use -1 for one axis"
        )
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes[0] % slices:
        raise ValueError(
            f"sharding.data={sizes[0]} must be a multiple of the {slices} slices, for it is the axis that crosses them"
        )
    if slices == 1:
        layout = functools.partial(mesh_utils.create_device_mesh, sizes)
    else:
        inside = [sizes[0] // slices, *sizes[1:]]
        layout = functools.partial(mesh_utils.create_hybrid_device_mesh, inside, [slices, 1, 1, 1])
    try:
        # An axis of the mesh may be a part of one of the torus; by itself JAX allows that for v5e alone.
        grid = layout(devices, allow_split_physical_axes=True)
    except NotImplementedError:
        raise ValueError(f"the mesh ({asked}) cannot be laid out on these {len(devices)} chips: change it") from None
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))


@contextlib.contextmanager
def use(mesh: Mesh, config: ShardingConfig) -> Iterator[None]:
    """Traces and runs what is inside on `mesh` under the configured rules."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(config.all_rules.items())):
        yield


def partition_spec(
    axes: Sequence[str | None],
    shape: Sequence[int],
    rules: Mapping[str, Sequence[str]],
    mesh_shape: Mapping[str, int],
    first: int = 0,
) -> PartitionSpec:
    """Logical axes of one array -> mesh axes, leaving out those that do not divide its dimension.

    Of dimensions that want the same mesh axis the first one has it, before all others the dimension `first`.

    Raises:
      ValueError: for a logical axis without a rule.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} logical axes {tuple(axes)} for an array of shape {tuple(shape)}")
    taken: set[str] = set()
    parts: list[Any] = [None] * len(axes)
    for i in sorted(range(len(axes)), key=lambda i: i != first):
        name, size = axes[i], shape[i]
        if name is not None and name not in rules:
            raise ValueError(f"no sharding rule for the logical axis {name!r}; there are {', '.join(rules)}")
        part: list[str] = []
        for axis in rules[name] if name is not None else ():
            divides = size % (math.prod(mesh_shape[a] for a in part) * mesh_shape[axis]) == 0
            if axis not in taken and mesh_shape[axis] > 1 and divides:
                part.append(axis)
                taken.add(axis)
        parts[i] = tuple(part) if len(part) > 1 else part[0] if part else None
    return PartitionSpec(*parts)


def mesh_spec(axes: Sequence[str | None], shape: Sequence[int], first: int = 0) -> PartitionSpec:
    """How an array with these logical axes lies on the mesh in force; outside `use` it is not split."""
    free, rules = free_axes(), dict(nn.get_logical_axis_rules())
    return partition_spec(axes, shape, rules, free, first) if free and rules else PartitionSpec()


def free_axes() -> dict[str, int]:
    """The axes of the mesh in force along which arrays here may be split, with their sizes: inside `on_devices` those
    alone that it leaves together."""
    mesh = jax.sharding.get_abstract_mesh()
    taken = set(mesh.manual_axes)
    return {} if taken == set(mesh.axis_names) else {a: 1 if a in taken else n for a, n in mesh.shape.items()}


def constrain(x: jax.Array, axes: Sequence[str | None], first: int = 0) -> jax.Array:
    """Asks for an activation to be split as its logical axes say; outside `use` it does nothing.

    Args:
      first: see `partition_spec`.
    """
    if not free_axes() or not nn.get_logical_axis_rules():
        return x
    return jax.lax.with_sharding_constraint(x, mesh_spec(axes, x.shape, first))


def split_over(axis: str, size: int) -> tuple[str, ...]:
    """The mesh axes over which a dimension of `size` with this logical axis is split; outside `use`, none."""
    spec = mesh_spec((axis,), (size,))
    part = spec[0] if spec else None
    return (part,) if isinstance(part, str) else part or ()


def shards(axis: str, size: int) -> int:
    """Over how many devices a dimension of `size` with this logical axis is split; outside `use`, 1."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in split_over(axis, size))


def platform() -> str:
    """What is being compiled for: "tpu", "gpu" or "cpu"; inside `use`, the kind of the mesh's devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def param_shardings(boxed: dict, mesh: Mesh, config: ShardingConfig) -> dict:
    """Shardings of a parameter tree with logical axes (as from `jax.eval_shape(model.init, ...)`)."""

    def one(leaf):
        axes, value = (
            (leaf.names, leaf.value) if isinstance(leaf, nn.LogicallyPartitioned) else ((None,) * leaf.ndim, leaf)
        )
        return NamedSharding(mesh, partition_spec(axes, value.shape, config.all_rules, mesh.shape))

    return jax.tree.map(one, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
