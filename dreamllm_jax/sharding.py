"""The device mesh, the logical axes, and the rules that map one to the other.

Weights and activations name their axes logically; `ShardingConfig.rules` says which mesh axes each name is split over.
A mesh axis that does not divide a dimension is left out for that array: a convolution with 4 output channels stays
whole.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
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
    # The llama's weights.
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
    free, rules = _free_axes(), dict(nn.get_logical_axis_rules())
    return partition_spec(axes, shape, rules, free, first) if free and rules else PartitionSpec()


def _free_axes() -> dict[str, int]:
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
    if not _free_axes() or not nn.get_logical_axis_rules():
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(weight: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """A weight, whole along the axes along which only its storage is split; its gradient is scattered again.

    Cast the weight to the type of the computation before: then what travels is small both ways.

    Args:
      weight: laid out as its logical axes say.
      axes: its logical axes; those other than `STORED_APART` stay split, and so does what is computed from them.
    """
    return constrain(weight, _where_used(axes))


def _where_used(axes: Sequence[str | None]) -> tuple[str | None, ...]:
    return tuple(None if axis in STORED_APART else axis for axis in axes)


def _gathered_fwd(weight, axes):
    return gathered(weight, axes), None


def _gathered_bwd(axes, _, gradient):
    return (constrain(gradient, axes),)


gathered.defvjp(_gathered_fwd, _gathered_bwd)


def copies(weight: jax.Array, axes: tuple[str | None, ...], over: tuple[str, ...]) -> jax.Array:
    """A weight `gathered` once, for work that each device does alone (`on_devices`): [devices, ...], a copy for each.

    Args:
      weight: laid out as its logical axes say.
      axes: its logical axes.
      over: the mesh axes of these devices, as from `split_over`.
    """
    shape = jax.sharding.get_abstract_mesh().shape
    stacked = jnp.broadcast_to(gathered(weight, axes), (math.prod(shape[a] for a in over), *weight.shape))
    return _constrain(stacked, over, *_parts(mesh_spec(_where_used(axes), weight.shape), weight.ndim))


def sum_of_copies(gradients: jax.Array, axes: tuple[str | None, ...], over: tuple[str, ...]) -> jax.Array:
    """The gradient of a weight, laid out as the weight is, from those of its `copies`, [devices, ...].

    They travel once, in their type: each device is sent its part of all of them, and adds them in float32.
    """
    sizes, shape = [jax.sharding.get_abstract_mesh().shape[axis] for axis in over], gradients.shape[1:]
    target = _parts(mesh_spec(axes, shape), len(shape))
    taken = {axis for part in target for axis in (part if isinstance(part, tuple) else (part,))}
    parts = gradients.reshape(*sizes, *shape)
    parts = _constrain(parts, *[None if axis in taken else axis for axis in over], *target)
    here = jnp.sum(parts, [i for i, axis in enumerate(over) if axis in taken], jnp.float32, keepdims=True)
    # Along what is left the sums travel: `jnp.sum` would make them float32 before.
    zero = np.zeros((), gradients.dtype)
    total = jax.lax.reduce(here.astype(gradients.dtype), zero, jax.lax.add, range(len(over)))
    return _constrain(total.reshape(shape), *target)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def copied(weight: jax.Array, axes: tuple[str | None, ...], over: tuple[str, ...]) -> jax.Array:
    """`copies`, whose gradients are added up by `sum_of_copies`."""
    return copies(weight, axes, over)


copied.defvjp(
    lambda weight, axes, over: (copies(weight, axes, over), None),
    lambda axes, over, _, gradients: (sum_of_copies(gradients, axes, over),),
)


def _parts(spec: PartitionSpec, ndim: int) -> tuple:
    """A part of the spec for each dimension."""
    return (*spec, *[None] * (ndim - len(spec)))


def _constrain(x: jax.Array, *parts: Any) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*parts)) if _free_axes() else x


def whole(arrays: Any) -> Any:
    """Results of which every device, and so every host, is to have all, to look at them."""
    if jax.sharding.get_abstract_mesh().empty:
        return arrays
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), arrays)


def platform() -> str:
    """What is being compiled for: "tpu", "gpu" or "cpu"; inside `use`, the kind of the mesh's devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def on_shards(function: Callable, axes: Sequence[Sequence[str | None]], *args: jax.Array) -> Any:
    """`function(*args)` computed by each device on its own shards, for kernels that the partitioner cannot look into.

    Args:
      function: of arrays, to arrays that are laid out as the first of them.
      axes: the logical axes of each argument; along those that the rules split, the function must be independent.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = set(mesh.axis_names) - set(mesh.manual_axes)
    if mesh.empty or mesh.size == 1 or not free:
        return function(*args)
    specs = tuple(mesh_spec(a, x.shape) for a, x in zip(axes, args, strict=True))
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0], axis_names=free, check_vma=False)(*args)


def on_devices(function: Callable, axes: tuple[str, ...], dimensions: tuple[int, ...], out: Any) -> Callable:
    """`function`, computed by each device along `axes` for itself: nothing travels along them while it runs.

    Args:
      axes: mesh axes, as from `split_over`; none, and it is `function`.
      dimensions: of each argument, an array or a pytree of them, the dimension that is split over `axes`.
      out: the same for what it gives, as a pytree's prefix.
    """
    if not axes:
        return function
    specs = jax.tree.map(lambda dimension: PartitionSpec(*[None] * dimension, axes), (dimensions, out))
    # Axes of size 1 too, so that kernels, which no axis may be left for, need nothing more.
    names = {axis for axis, size in jax.sharding.get_abstract_mesh().shape.items() if axis in axes or size == 1}
    return jax.shard_map(function, in_specs=specs[0], out_specs=specs[1], axis_names=names, check_vma=False)


def param_shardings(boxed: dict, mesh: Mesh, config: ShardingConfig) -> dict:
    """Shardings of a parameter tree with logical axes (as from `jax.eval_shape(model.init, ...)`)."""

    def one(leaf):
        axes, value = (
            (leaf.names, leaf.value) if isinstance(leaf, nn.LogicallyPartitioned) else ((None,) * leaf.ndim, leaf)
        )
        return NamedSharding(mesh, partition_spec(axes, value.shape, config.all_rules, mesh.shape))

    return jax.tree.map(one, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def row_shards(config: ShardingConfig, mesh_shape: Mapping[str, int]) -> int:
    """Into how many parts the mesh splits rows."""
    return math.prod(mesh_shape[axis] for axis in config.all_rules["rows"])


def rows_sharding(mesh: Mesh, config: ShardingConfig, rows: int) -> NamedSharding:
    """How a batch lies on the mesh: its leading axis over the axes of "rows".

    Raises:
      ValueError: if the mesh does not divide the rows.
    """
    axes = config.all_rules["rows"]
    parts = row_shards(config, mesh.shape)
    if rows % parts:
        raise ValueError(
            f"{rows} rows do not divide over {parts} shards ({' x '.join(axes)}): change rows.per_step or sharding"
        )
    return NamedSharding(mesh, PartitionSpec(tuple(axes)))


@functools.lru_cache  # asked at every step
def local_rows(sharding: NamedSharding, rows: int, process: int | None = None) -> tuple[int, ...]:
    """The rows of a global batch that a process's devices hold, and it must therefore feed; by default this one's.

    They need not follow each other: a host of a TPU slice is a square of chips, which the mesh goes through in lines.
    Hosts whose devices hold parts of the same rows feed them alike.
    """
    process = jax.process_index() if process is None else process
    spans = {
        index[0].indices(rows)
        for device, index in sharding.devices_indices_map((rows,)).items()
        if device.process_index == process
    }
    return tuple(sorted(row for span in spans for row in range(*span)))


def to_mesh(tree, sharding: NamedSharding, rows: int):
    """This host's `local_rows` (numpy) of a batch of `rows` rows -> global arrays on the mesh."""
    mine = local_rows(sharding, rows)

    def place(x: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(rows)
            first = mine.index(start)
            return x[first : first + stop - start]

        return jax.make_array_from_callback((rows, *x.shape[1:]), sharding, shard)

    return jax.tree.map(place, tree)
