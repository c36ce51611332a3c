"""A run begins with a checkpoint only if it is of the same model."""

import dataclasses

import pytest

from dreamllm_jax.data.vocabulary import SpecialTokens
from dreamllm_jax.runs.initial import open_initial, require_same_model
from tests.tiny import tiny_config

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


def test_a_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no model\.json: it is not the --to of a finished"):
        open_initial(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"model_type 'llama', expected 'dreamllm'"):
        open_initial(str(tmp_path))
