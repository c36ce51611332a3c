"""Our parameter names stand for torch's, both ways."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dreamllm_jax.interop.files import Tensor
from dreamllm_jax.interop.names import Leaf, from_torch, to_torch, torch_name
from dreamllm_jax.towers.connectors.projector import ProjectorConfig
from dreamllm_jax.towers.language_models.decoder import LayerKind
from tests.tiny import MLP, tiny_config, tiny_params

PARAMS = tiny_params(tiny_config(visual_projector=MLP, connector=ProjectorConfig(kind="mlp", depth=2)))


def test_names():
    assert torch_name("down_blocks_0/resnets_1/conv1/kernel") == "down_blocks.0.resnets.1.conv1.weight"
    assert torch_name("layers/mlp/up_proj/kernel", layer=3) == "layers.3.mlp.up_proj.weight"
    assert torch_name("layers/1_of_6/mlp/up_proj/kernel", layer=7) == "layers.7.mlp.up_proj.weight"
    assert torch_name("time_embedding/linear_1/bias") == "time_embedding.linear_1.bias"
    assert torch_name("projector_2/kernel") == "projector.2.weight"


def test_there_and_back():
    for part, tree in PARAMS.items():
        back = flatten_dict(from_torch(tree, to_torch(tree)), sep="/")
        for path, leaf in flatten_dict(tree, sep="/").items():
            np.testing.assert_array_equal(back[path], leaf, err_msg=f"{part}/{path}")


@pytest.mark.parametrize("kinds", [1, 3])
def test_layers_of_a_pattern_are_counted_over_all_kinds(kinds):
    """Entry r of kind k is torch's layer r n + k."""
    pattern = tuple(LayerKind(window=2 * kind) for kind in range(kinds))
    language_model = dataclasses.replace(tiny_config().language_model, num_hidden_layers=6, pattern=pattern)
    params = tiny_params(tiny_config(language_model=language_model))["language_model"]
    tensors = to_torch(params)
    one_kind = dataclasses.replace(language_model, pattern=(LayerKind(),))
    assert tensors.keys() == to_torch(tiny_params(tiny_config(language_model=one_kind))["language_model"]).keys()
    for layer in range(6):
        stack = params["layers"] if kinds == 1 else params["layers"][f"{layer % kinds}_of_{kinds}"]
        kernel = stack["self_attn"]["q_proj"]["kernel"][layer // kinds]
        np.testing.assert_array_equal(tensors[f"layers.{layer}.self_attn.q_proj.weight"], kernel.T)
    jax.tree.map(np.testing.assert_array_equal, from_torch(params, tensors), params)


def test_a_stack_of_mixed_types_holds_them_all():
    def leaf(*dtypes):
        return Leaf("layers/scale", (len(dtypes), 2), tuple(Tensor.of(np.ones(2, dtype)) for dtype in dtypes))

    assert leaf("bfloat16", "bfloat16").dtype == "bfloat16"
    assert leaf("bfloat16", "float16").dtype == leaf("float16", "float32").dtype == "float32"
    assert leaf("float16", "float64").dtype == "float64"


def test_what_does_not_fit_is_listed():
    tensors = to_torch(PARAMS["visual_projector"])
    tensors["projector.7.weight"] = tensors.pop("projector.2.weight")
    tensors["projector.0.weight"] = np.zeros((5, 5))
    with pytest.raises(ValueError) as refused:
        from_torch(PARAMS["visual_projector"], tensors)
    assert str(refused.value).splitlines() == [
        "3 tensors do not fit:",
        "  projector.0.weight has shape (5, 5), expected (32, 16)",
        "  missing projector.2.weight (32, 32)",
        "  unexpected projector.7.weight (32, 32)",
    ]
