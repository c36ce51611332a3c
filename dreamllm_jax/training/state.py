"""The training state: what is trained, what is frozen, and how both lie on the mesh."""

import functools
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

from dreamllm_jax.checkpoints.saved import AVERAGE, PARAMS
from dreamllm_jax.checkpoints.steps import OPTIMIZER
from dreamllm_jax.experiment.settings import OptimizerConfig, ParametersConfig
from dreamllm_jax.layers.weights import draw
from dreamllm_jax.model import DreamLLMConfig, abstract_params
from dreamllm_jax.parallel.mesh import ShardingConfig, param_shardings
from dreamllm_jax.training.optimizer import join_average, make_optimizer, split_average

Leaves = dict[str, jax.Array]  # parameter path, such as "dream_queries/embedding" -> array


@struct.dataclass
class TrainState:
    """Gradients and optimizer state exist for `trainable` alone; `frozen` never changes."""

    step: Int[Array, ""]
    trainable: Leaves
    opt_state: Any
    frozen: Leaves


def split_params(params: Mapping, rules: Sequence[tuple[str, bool]]) -> tuple[Leaves, Leaves]:
    """Splits a tree of `Weight`s into flat (trainable, frozen) leaves by the first rule that matches a whole path.

    Those that are `fixed` are frozen, whatever the rules say.

    Raises:
      ValueError: naming a parameter no rule matches, or a rule that matches no parameter.
    """
    trainable, frozen, used = {}, {}, set()
    for path, leaf in flatten_dict(params, sep="/").items():
        match = next(((i, train) for i, (pattern, train) in enumerate(rules) if re.fullmatch(pattern, path)), None)
        if match is None:
            raise ValueError(f"trainable: no pattern matches the parameter {path}; end the list with ('.*', False)")
        used.add(match[0])
        (trainable if match[1] and not leaf.fixed else frozen)[path] = nn.unbox(leaf)
    for i, (pattern, _) in enumerate(rules):
        if i not in used and pattern != ".*":
            raise ValueError(f"trainable: {pattern!r} decides about no parameter; the top level is {', '.join(params)}")
    if not trainable:
        raise ValueError("trainable: every parameter is frozen, there is nothing to train")
    return trainable, frozen


def merge_params(trainable: Leaves, frozen: Leaves) -> dict:
    """The inverse of `split_params`."""
    return unflatten_dict({**trainable, **frozen}, sep="/")


def abstract_state(
    model: DreamLLMConfig,
    parameters: ParametersConfig,
    optimizer: OptimizerConfig,
    mesh: Mesh,
    sharding: ShardingConfig,
) -> TrainState:
    """The state's shapes, types and shardings (`jax.ShapeDtypeStruct`s), nothing computed.

    Optimizer moments lie as their parameters do.
    """
    boxed = abstract_params(model)
    shardings = flatten_dict(param_shardings(boxed, mesh, sharding), sep="/")
    replicated = NamedSharding(mesh, PartitionSpec())
    trainable, frozen = split_params(boxed, parameters.trainable)

    def typed(leaves: Leaves, dtype: str) -> Leaves:
        return {
            path: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=shardings[path]) for path, leaf in leaves.items()
        }

    def place(path, leaf):
        name = next((key.key for key in reversed(path) if isinstance(key, jax.tree_util.DictKey)), None)
        moment = next((key.name for key in reversed(path) if isinstance(key, jax.tree_util.GetAttrKey)), None)
        dtype = {"mu": optimizer.mu_dtype, "nu": optimizer.nu_dtype}.get(moment, leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=shardings.get(name, replicated))

    trainable, frozen = typed(trainable, parameters.dtype), typed(frozen, parameters.frozen_dtype)
    opt_state = jax.tree_util.tree_map_with_path(
        place, jax.eval_shape(make_optimizer(optimizer, steps=1).init, trainable)
    )
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated), trainable, opt_state, frozen)


def _shardings(tree):
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _fresh(abstract: TrainState, optimizer: optax.GradientTransformation, trainable: Leaves) -> Any:
    return jax.tree.map(lambda x, like: x.astype(like.dtype), optimizer.init(trainable), abstract.opt_state)


def init_leaves(model: DreamLLMConfig, leaves: Leaves, key: jax.Array) -> Leaves:
    """Fresh random parameters in the place of abstract ones; adapters begin by adding nothing."""
    return draw(flatten_dict(abstract_params(model), sep="/"), leaves, key)


def state_from_leaves(abstract: TrainState, leaves: Leaves, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state around parameters that lie as `abstract` says."""
    trainable, frozen = ({path: leaves[path] for path in part} for part in (abstract.trainable, abstract.frozen))
    fresh = functools.partial(_fresh, abstract, optimizer)
    opt_state = jax.jit(fresh, out_shardings=_shardings(abstract.opt_state))(trainable)
    step = jax.device_put(jnp.zeros((), jnp.int32), abstract.step.sharding)
    return TrainState(step, trainable, opt_state, frozen)


def to_items(state: TrainState) -> dict[str, Any]:
    """What is saved of a state at each checkpoint; averages apart, so that they can be loaded like parameters."""
    rest, average = split_average(state.opt_state)
    items = {PARAMS: state.trainable, OPTIMIZER: {"step": state.step, "state": rest}}
    return items if average is None else items | {AVERAGE: average}


def from_items(items: Mapping[str, Any], frozen: Leaves) -> TrainState:
    """The inverse of `to_items`."""
    opt_state = join_average(items[OPTIMIZER]["state"], items.get(AVERAGE))
    return TrainState(items[OPTIMIZER]["step"], items[PARAMS], opt_state, frozen)
