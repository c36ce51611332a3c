"""Every axis has a rule, every mesh that cannot be is refused."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec as P

from dreamllm_jax.common.configuration import read
from dreamllm_jax.experiment import published
from dreamllm_jax.model import DreamLLMConfig, abstract_params
from dreamllm_jax.parallel.feeding import rows_sharding
from dreamllm_jax.parallel.mesh import (
    DEFAULT_RULES,
    MESH_AXES,
    ShardingConfig,
    constrain,
    make_mesh,
    param_shardings,
    partition_spec,
    use,
)
from tests.tiny import tiny_config

MESH = {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 2}


def test_every_weight_has_axes_with_rules():
    boxed = abstract_params(tiny_config())
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    for path, leaf in leaves:
        assert isinstance(leaf, nn.LogicallyPartitioned), jax.tree_util.keystr(path)
        assert {name for name in leaf.names if name} <= DEFAULT_RULES.keys(), jax.tree_util.keystr(path)
    shardings = param_shardings(boxed, make_mesh(ShardingConfig(fsdp=4, tensor=2)), ShardingConfig())
    assert shardings["language_model"]["layers"]["mlp"]["up_proj"]["kernel"].spec == P(None, "fsdp", "tensor")
    assert shardings["language_model"]["lm_head"]["kernel"].spec == P("fsdp", "tensor")


def test_no_large_weight_of_the_published_model_is_replicated():
    boxed = abstract_params(read(DreamLLMConfig, published.model("7b")))
    weights = flatten_dict(nn.unbox(boxed), sep="/")
    for config in (ShardingConfig(fsdp=8), ShardingConfig(fsdp=2, sequence=2, tensor=2)):
        shardings = flatten_dict(param_shardings(boxed, make_mesh(config), config), sep="/")
        for path, leaf in weights.items():
            parts = leaf.size // math.prod(shardings[path].shard_shape(leaf.shape))
            assert parts >= 4 or leaf.size * leaf.dtype.itemsize <= 2**20, f"{path} {leaf.shape} lies in {parts} parts"
            if path.startswith("language_model") and "kernel" in path:
                assert parts == 8, path


def test_partition_specs():
    rules = ShardingConfig(rules={"mlp": ("tensor", "data")}).all_rules
    assert partition_spec(("rows", "tokens", "mlp"), (8, 6, 8), rules, MESH) == P(("data", "fsdp"), None, "tensor")
    assert partition_spec(("rows",), (2,), rules, MESH) == P("data"), "an axis that does not divide is left out"
    assert partition_spec(("mlp", None), (4, 3), rules, MESH) == P(("tensor", "data"), None)
    assert partition_spec(("rows", "embed"), (8, 4), rules, MESH, first=1) == P("data", "fsdp")
    with pytest.raises(ValueError, match="no sharding rule for the logical axis 'embd'"):
        partition_spec(("embd",), (8,), rules, MESH)
    with pytest.raises(ValueError, match="2 logical axes"):
        partition_spec(("rows", None), (8,), rules, MESH)


def test_constraints_apply_inside_and_vanish_outside():
    x = jnp.ones((8, 4))
    assert constrain(x, ("rows", None)) is x
    config = ShardingConfig(data=2, fsdp=4)
    with use(make_mesh(config), config):
        assert jax.jit(lambda x: constrain(x * 2, ("rows", None)))(x).sharding.spec == P(("data", "fsdp"))
        with pytest.raises(ValueError, match="no sharding rule for the logical axis 'rosw'"):
            jax.jit(lambda x: constrain(x, ("rosw", None)))(x)


def test_meshes():
    assert dict(make_mesh(ShardingConfig()).shape) == dict(zip(MESH_AXES, (1, 8, 1, 1), strict=True))
    assert dict(make_mesh(ShardingConfig(data=-1, fsdp=2, tensor=2)).shape)["data"] == 2
    for config in (ShardingConfig(fsdp=3), ShardingConfig(fsdp=4), ShardingConfig(data=16), ShardingConfig(tensor=3)):
        with pytest.raises(ValueError, match=r"the mesh \(data=.*\) does not fit 8 devices: change sharding"):
            make_mesh(config)
    with pytest.raises(ValueError, match="at most one -1"):
        ShardingConfig(data=-1, fsdp=-1)
    with pytest.raises(ValueError, match="6 rows do not divide over 8 shards"):
        rows_sharding(make_mesh(ShardingConfig()), ShardingConfig(), 6)
