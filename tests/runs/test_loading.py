"""A model that is loaded to generate takes no more memory than it computes with, and gives the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax.traverse_util import flatten_dict

from dreamllm_jax.checkpoints.saved import SavedModel, write_description, write_params
from dreamllm_jax.data.tokenizer import load_tokenizer
from dreamllm_jax.model import DreamLLM
from dreamllm_jax.parallel.mesh import ShardingConfig, make_mesh
from dreamllm_jax.runs import load
from dreamllm_jax.runs.load import load_model
from tests.painter import TOKENIZER
from tests.tiny import tiny_config, tiny_params


def save(directory, dtype: str, stored: str = "float32"):
    config = tiny_config()
    llama = dataclasses.replace(config.language_model, vocab_size=TOKENIZER.vocab_size)
    config = dataclasses.replace(config, language_model=llama, dtype=dtype, special_tokens=TOKENIZER.special)
    params = jax.tree.map(lambda x: np.asarray(x).astype(stored), tiny_params(config))
    directory = epath.Path(directory)
    write_params(directory, flatten_dict(params, sep="/"))
    write_description(directory, config, TOKENIZER)
    return config, params


def outputs(model: DreamLLM, params) -> dict:
    """Whatever the model computes with its parameters."""
    config, rng = model.config, np.random.default_rng(0)
    side = config.vision_encoder.image_size
    latents = rng.normal(size=(2, *config.image_decoder.latent_shape(16, 16))).astype(np.float32)
    condition = rng.normal(size=(2, config.num_queries, config.language_model.hidden_size)).astype(np.float32)

    def run(module: DreamLLM):
        seen = module.see(rng.integers(0, 256, (1, side, side, 3)).astype(np.uint8))
        tokens, slots = jnp.arange(48)[None], jnp.full((1, 1), 2)
        x = module.embed(tokens, [(seen[None], slots)], [slots + config.vision_encoder.num_patches])
        hidden, _ = module.decode(x, jnp.arange(48)[None], jnp.ones((1, 48), jnp.int32))
        return {
            "see": seen,
            "logits": module.language_model.logits(hidden),
            "null": module.null_hidden(),
            "denoise": module.image_decoder.denoise(latents, jnp.asarray([17, 801]), module.condition(condition)),
            "moments": module.image_decoder.stored(rng.integers(0, 256, (1, 16, 16, 3)).astype(np.uint8)),
            "paint": module.image_decoder.decode(latents),
        }

    return jax.device_get(jax.jit(lambda params: model.apply({"params": params}, method=run))(params))


@pytest.mark.slow
def test_a_bfloat16_model_is_loaded_in_bfloat16_and_gives_every_bit(tmp_path, monkeypatch):
    """Parameters that were trained in float32: those that are cast anyway are loaded so, a group after the other."""
    _, trained = save(tmp_path / "model", "bfloat16")
    monkeypatch.setattr(load, "_GROUP_BYTES", 1 << 14)
    read, restore = [], SavedModel.restore
    monkeypatch.setattr(SavedModel, "restore", lambda self, wanted: read.append(wanted) or restore(self, wanted))
    model, params, _ = load_model(tmp_path / "model")
    assert len(read) > 5 and all(
        len(group) == 1 or sum(4 * x.size for x in group.values()) <= 1 << 14 for group in read
    )
    leaves = flatten_dict(params, sep="/")
    bytes_ = sum(x.nbytes for x in leaves.values())
    assert bytes_ < 0.6 * sum(x.nbytes for x in jax.tree.leaves(trained))
    assert all(
        leaf.dtype == "bfloat16"
        for path, leaf in leaves.items()
        if path.startswith("language_model/") and "norm" not in path
    )
    want = outputs(model, trained)
    for name, got in outputs(model, params).items():
        np.testing.assert_array_equal(got, want[name], err_msg=name)


@pytest.mark.parametrize(
    ("dtype", "stored"), [("float32", "bfloat16"), ("float32", "float32"), ("bfloat16", "float16")]
)
def test_nothing_is_made_larger(dtype, stored, tmp_path):
    save(tmp_path / "model", dtype, stored)
    assert {str(x.dtype) for x in jax.tree.leaves(load_model(tmp_path / "model")[1])} == {stored}


def test_a_mesh_is_given_its_shards_in_the_models_type(tmp_path):
    save(tmp_path / "model", "bfloat16")
    sharding = ShardingConfig(fsdp=4, tensor=2)
    _, params, _ = load_model(tmp_path / "model", make_mesh(sharding), sharding)
    kernel = params["language_model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.dtype == "bfloat16" and kernel.addressable_shards[0].data.size * 8 == kernel.size


def test_a_tokenizer_that_is_missing_or_another_models_is_told_first(tmp_path):
    config, _ = save(tmp_path / "model", "float32")
    (tmp_path / "model" / "tokenizer").rename(tmp_path / "tokenizer")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*/model/tokenizer: put a tokenizer\.model or a"):
        load_model(tmp_path / "model")
    other = load_tokenizer(tmp_path / "tokenizer")
    special = dataclasses.replace(config.special_tokens, eos=5)
    write_description(epath.Path(tmp_path / "model"), dataclasses.replace(config, special_tokens=special), other)
    with pytest.raises(ValueError, match=r"model/tokenizer is another model's: its special tokens are"):
        load_model(tmp_path / "model")
