"""The training state: what is trained, what is frozen, and how both lie on the mesh."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from dreamllm_jax.models.dreamllm import DreamLLM, DreamLLMConfig
from dreamllm_jax.sharding import ShardingConfig, param_shardings

Leaves = dict[str, jax.Array]  # parameter path, such as "queries/dream_queries" -> array


@struct.dataclass
class TrainState:
    """Gradients and optimizer state exist for `trainable` alone; `frozen` never changes."""

    step: Int[Array, ""]
    trainable: Leaves
    opt_state: Any
    frozen: Leaves


def split_params(params: Mapping, rules: Sequence[tuple[str, bool]]) -> tuple[Leaves, Leaves]:
    """Splits a parameter tree into flat (trainable, frozen) leaves by the first rule that matches a whole path.

    Raises:
      ValueError: naming a parameter no rule matches, or a rule that matches no parameter.
    """
    trainable, frozen, used = {}, {}, set()
    for path, leaf in flatten_dict(params, sep="/").items():
        match = next(((i, train) for i, (pattern, train) in enumerate(rules) if re.fullmatch(pattern, path)), None)
        if match is None:
            raise ValueError(f"trainable: no pattern matches the parameter {path}; end the list with ('.*', False)")
        used.add(match[0])
        (trainable if match[1] else frozen)[path] = leaf
    for i, (pattern, _) in enumerate(rules):
        if i not in used and pattern != ".*":
            raise ValueError(f"trainable: {pattern!r} decides about no parameter; the top level is {', '.join(params)}")
    if not trainable:
        raise ValueError("trainable: every parameter is frozen, there is nothing to train")
    return trainable, frozen


def merge_params(trainable: Leaves, frozen: Leaves) -> dict:
    """The inverse of `split_params`."""
    return unflatten_dict({**trainable, **frozen}, sep="/")


def abstract_params(config: DreamLLMConfig) -> dict:
    """The parameter tree's shapes with their logical axes, nothing computed."""
    return dict(jax.eval_shape(DreamLLM(config).init, jax.random.key(0))["params"])


def make_state(params: Mapping, rules: Sequence[tuple[str, bool]], optimizer, param_dtype, frozen_dtype) -> TrainState:
    """A fresh state around a parameter tree (without logical axes)."""
    trainable, frozen = split_params(params, rules)
    trainable = {path: leaf.astype(param_dtype) for path, leaf in trainable.items()}
    frozen = {path: leaf.astype(frozen_dtype) for path, leaf in frozen.items()}
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), frozen)


def abstract_state(
    config: DreamLLMConfig,
    rules: Sequence[tuple[str, bool]],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    sharding: ShardingConfig,
    param_dtype: str = "float32",
    frozen_dtype: str = "float32",
) -> TrainState:
    """The state's shapes, types and shardings (`jax.ShapeDtypeStruct`s), nothing computed.

    Optimizer moments lie as their parameters do.
    """
    boxed = abstract_params(config)
    shardings = flatten_dict(param_shardings(boxed, mesh, sharding), sep="/")
    state = jax.eval_shape(lambda p: make_state(p, rules, optimizer, param_dtype, frozen_dtype), nn.unbox(boxed))
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(path, leaf):
        name = next((key.key for key in path if isinstance(key, jax.tree_util.DictKey)), None)
        sharding = shardings.get(name, replicated) if leaf.ndim else replicated
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, state)


def init_state(abstract: TrainState, config: DreamLLMConfig, rules, optimizer, key: jax.Array) -> TrainState:
    """Fresh random parameters, made directly in their shards."""

    def init(key):
        params = nn.unbox(DreamLLM(config).init(key)["params"])
        dtypes = {path: leaf.dtype for path, leaf in {**abstract.trainable, **abstract.frozen}.items()}
        flat = {path: leaf.astype(dtypes[path]) for path, leaf in flatten_dict(params, sep="/").items()}
        trainable, frozen = split_params(unflatten_dict(flat, sep="/"), rules)
        return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), frozen)

    return jax.jit(init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))(key)
