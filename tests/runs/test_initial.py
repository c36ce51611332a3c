"""A run begins with a checkpoint only if it is of the same model."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from etils import epath
from flax.traverse_util import flatten_dict
from jax.sharding import SingleDeviceSharding

from dreamllm_jax.checkpoints import saved
from dreamllm_jax.data.vocabulary import SpecialTokens
from dreamllm_jax.model import TEACHER, DreamLLMConfig, abstract_params
from dreamllm_jax.runs.initial import open_initial, require_same_model, restore_initial
from dreamllm_jax.training.state import split_params
from tests.tiny import DECODER_XL, tiny_config, tiny_params
from tests.towers.test_flow_decoders import SANA

CONFIG = tiny_config()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"language_model": dataclasses.replace(CONFIG.language_model, rope_theta=5e5)},
            r"^config\.model\.language_model\.rope_theta is 500000\.0, but DIR has 10000\.0$",
        ),
        (
            {"special_tokens": dataclasses.replace(SpecialTokens.last_of(64), dream=3)},
            r"^config\.model\.special_tokens\.dream is 3, but DIR has 61$",
        ),
    ],
    ids=["rotary base", "token"],
)
def test_another_model_is_refused_and_another_computation_is_not(changes, message):
    computed = {"dtype": "bfloat16", "remat": "full"}
    assert dataclasses.replace(CONFIG, **computed) != CONFIG
    require_same_model(CONFIG, dataclasses.replace(CONFIG, **computed), "DIR")
    with pytest.raises(ValueError, match=message):
        require_same_model(CONFIG, dataclasses.replace(CONFIG, **computed, **changes), "DIR")


def test_another_way_of_learning_sampling_and_computing_is_not_another_decoder():
    flow = {"shift": 3.0, "sampling_shift": 2.0, "density": "mode", "weighting": "cosmap", "use_dynamic_shifting": True}

    def of(decoder: Any, **settings) -> DreamLLMConfig:
        return dataclasses.replace(CONFIG, image_decoder=dataclasses.replace(decoder, **settings))

    def flowing(**settings) -> DreamLLMConfig:
        return of(SANA, flow=dataclasses.replace(SANA.flow, **settings))

    require_same_model(flowing(), flowing(**flow), "DIR")
    require_same_model(of(DECODER_XL), of(DECODER_XL, upcast=False, remat="full"), "DIR")
    message = r"^config\.model\.image_decoder\.flow\.num_train_timesteps is 500, but DIR has 1000$"
    with pytest.raises(ValueError, match=message):
        require_same_model(flowing(), flowing(num_train_timesteps=500), "DIR")


def test_a_teacher_begins_as_what_it_teaches(tmp_path):
    leaves, taught = flatten_dict(tiny_params(CONFIG), sep="/"), dataclasses.replace(CONFIG, teacher=True)
    saved.write_description(epath.Path(tmp_path), CONFIG, None)
    saved.write_params(epath.Path(tmp_path), leaves)
    shapes, here = flatten_dict(nn.unbox(abstract_params(taught)), sep="/"), SingleDeviceSharding(jax.devices()[0])
    types = {path: "bfloat16" if path.startswith(TEACHER) else "float32" for path in shapes}
    abstract = {path: jax.ShapeDtypeStruct(x.shape, types[path], sharding=here) for path, x in shapes.items()}
    found, seen = restore_initial(str(tmp_path), taught, abstract), ("vision_encoder/", "visual_projector/")
    assert found.keys() == leaves.keys() | {f"{TEACHER}/{path}" for path in leaves if path.startswith(seen)}
    for path, x in found.items():
        np.testing.assert_array_equal(x, leaves[path.removeprefix(f"{TEACHER}/")].astype(x.dtype), err_msg=path)
    _, frozen = split_params(abstract_params(taught), ((".*", True),))
    assert {path for path in found if path.startswith(TEACHER)} == set(frozen)


def test_a_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no model\.json: it is not the --to of a finished"):
        open_initial(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"model_type 'llama', expected 'dreamllm'"):
        open_initial(str(tmp_path))
