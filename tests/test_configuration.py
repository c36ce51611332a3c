"""A configuration that cannot be used is refused at once, in one line that names the key."""

import importlib.util
from pathlib import Path

import pytest

from dreamllm_jax.configuration import ConfigError
from dreamllm_jax.experiment import read_experiment, require_mesh_fits

TINY = Path(__file__).parent.parent / "configs" / "tiny.py"


@pytest.fixture
def config():
    spec = importlib.util.spec_from_file_location("tiny", TINY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def test_the_tiny_configuration_is_read(config):
    experiment = read_experiment(config)
    assert experiment.model.llama.hidden_size == config.model.llama.hidden_size
    assert experiment.data.corpora["pairs"].mode == "joint"
    assert experiment.row_shape.num_patches == 16
    assert experiment.parameters.trainable == ((".*", True),)
    assert read_experiment(config.to_dict()) == experiment


BROKEN = [
    ({"stepz": 3}, r"config\.stepz is not a setting; did you mean config\.steps\?"),
    (
        {"optimizer.learning_rat": 1e-3},
        r"learning_rat is not a setting; did you mean config\.optimizer\.learning_rate\?",
    ),
    ({"model.llama.hiden_size": 64}, r"hiden_size is not .* did you mean config\.model\.llama\.hidden_size\?"),
    ({"model.vae.patch_siz": 4}, r"config\.model\.vae\.patch_siz is not a setting"),
    ({"data.corpora.pairs.mod": "joint"}, r"config\.data\.corpora\.pairs\.mod is not a setting; did you mean .*mode\?"),
    ({"steps": "many"}, r"config\.steps must be int, got 'many'"),
    ({"steps": True}, r"config\.steps must be int, got True"),
    ({"steps": 0}, r"steps must be positive"),
    ({"optimizer": 3}, r"config\.optimizer must be a group of settings"),
    ({"optimizer.learning_rate": -1.0}, r"config\.optimizer: learning_rate and eps must be positive"),
    ({"optimizer.warmup_ratio": 3.0}, r"warmup_ratio must lie in \[0, 1\]"),
    ({"objective.lm_weight": -1.0}, r"config\.objective: lm_weight must not be negative"),
    ({"objective.image_chunk": -1}, r"config\.objective: image_chunk must not be negative"),
    ({"model.remat": "attentoin"}, r"config\.model: unknown remat policy 'attentoin': choose from none, dots, full"),
    ({"objective.null_condition": "querys"}, r"null_condition must be one of .*did you mean 'queries'\?"),
    ({"model.dtype": "float16"}, r"config\.model\.dtype must be one of 'float32', 'bfloat16'"),
    ({"model.unet.in_channels": 4}, r"config\.model: unet\.in_channels is 4, but the autoencoder's latents have 48"),
    ({"model.visual_projector": {"kind": "mlp"}}, r"an mlp projector has a depth of 2 or more, the others 1"),
    ({"model.num_queries": 127}, r"rows\.length=128 has no room for an image to paint, which takes 129 tokens"),
    ({"rows.length": 1024}, r"rows\.length=1024 exceeds model\.llama\.max_position_embeddings=512"),
    ({"rows.dream_size": 30}, r"rows\.dream_size=30 must be a positive multiple of 8"),
    ({"rows.microbatches": 3}, r"rows\.microbatches=3 does not divide rows\.per_step=8"),
    ({"rows.see_slots": -1}, r"must not be negative"),
    ({"data.corpora.pairs.weight": -1.0}, r"config\.data\.corpora\.pairs: the weight of a corpus must be positive"),
    ({"data.flip": 2.0}, r"config\.data: flip is between 0 and 1, got 2"),
    ({"parameters.trainable": (("llama/(", True),)}, r"trainable: 'llama/\(' is not a regular expression"),
    ({"parameters.trainable": (("llama/.*",),)}, r"config\.parameters\.trainable\[0\] must have 2 entries, got 1"),
    ({"sharding": {"fsdp": 0}}, r"config\.sharding: mesh sizes must be positive"),
    ({"sharding": {"rules": {"embd": ("fsdp",)}}}, r"unknown logical axis 'embd'"),
    ({"sharding": {"rules": {"embed": ("fspd",)}}}, r"rules\.embed: unknown mesh axes \['fspd'\]"),
    ({"checkpoint.keep": 0}, r"config\.checkpoint: every and keep must be positive"),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN, ids=[next(iter(changes)) for changes, _ in BROKEN])
def test_broken_configurations(config, changes, message):
    settings = config.to_dict()
    for path, value in changes.items():
        *groups, name = path.split(".")
        at = settings
        for group in groups:
            at = at[group]
        at[name] = value
    with pytest.raises(ConfigError, match=message) as refused:
        read_experiment(settings)
    assert "\n" not in str(refused.value)


def test_a_missing_setting_is_named(config):
    settings = config.to_dict()
    del settings["optimizer"]
    with pytest.raises(ConfigError, match=r"config\.optimizer is missing"):
        read_experiment(settings)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"tensor": 3}, r"sharding\.tensor=3 does not divide model\.llama\.num_attention_heads=4"),
        ({"sequence": 3}, r"sharding\.sequence=3 does not divide model\.llama\.hidden_size=128"),
        ({"fsdp": 256}, r"sharding\.fsdp=256 does not divide model\.llama\.hidden_size=128"),
        ({"fsdp": 2, "sequence": 128}, r"fsdp=2 x sharding\.sequence=128 does not divide"),
    ],
    ids=str,
)
def test_meshes_that_the_model_cannot_be_split_over(config, mesh, message):
    experiment = read_experiment(config)
    require_mesh_fits(experiment, {"data": 1, "fsdp": 4, "sequence": 2, "tensor": 2})
    with pytest.raises(ConfigError, match=message):
        require_mesh_fits(experiment, {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1, **mesh})
