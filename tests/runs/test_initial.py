"""A run begins with a checkpoint only if it is of the same model."""

import dataclasses
from typing import Any

import pytest

from dreamllm_jax.data.vocabulary import SpecialTokens
from dreamllm_jax.model import DreamLLMConfig
from dreamllm_jax.runs.initial import open_initial, require_same_model
from tests.tiny import DECODER_XL, tiny_config
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


def test_a_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no model\.json: it is not the --to of a finished"):
        open_initial(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"model_type 'llama', expected 'dreamllm'"):
        open_initial(str(tmp_path))
