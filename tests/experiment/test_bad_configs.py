"""A hundred ways to write a configuration wrongly, each refused quickly, in one line that names the key."""

import time
from pathlib import Path

import pytest

from dreamllm_jax.common.configuration import ConfigError
from dreamllm_jax.data.storage import write_summary
from dreamllm_jax.experiment import recipes
from dreamllm_jax.experiment.experiment import read_experiment
from dreamllm_jax.runs.check import check

ROOT = Path(__file__).parents[2]
SECONDS = 10

LORA = {"rank": 4, "alpha": 8.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0}
BROKEN = [
    # Misspelt.
    ({"stepz": 3}, "config.stepz is not a setting; did you mean config.steps?"),
    ({"model.language_model.hiden_size": 64}, "did you mean config.model.language_model.hidden_size?"),
    ({"model.vision_encoder.patchsize": 8}, "did you mean config.model.vision_encoder.patch_size?"),
    (
        {"model.image_decoder.denoiser.cross_atention_dim": 64},
        "did you mean config.model.image_decoder.denoiser.cross_attention_dim?",
    ),
    (
        {"model.image_decoder.autoencoder.patch_siz": 4},
        "config.model.image_decoder.autoencoder.patch_siz is not a setting",
    ),
    ({"model.language_model.lora": {"rnk": 4, "alpha": 8.0}}, "did you mean config.model.language_model.lora.rank?"),
    ({"optimizer.learning_rat": 1e-3}, "did you mean config.optimizer.learning_rate?"),
    ({"objective.dm_wieght": 1.0}, "did you mean config.objective.dm_weight?"),
    ({"rows.lenght": 128}, "did you mean config.rows.length?"),
    ({"data.corpora.pairs.mod": "joint"}, "did you mean config.data.corpora.pairs.mode?"),
    ({"parameters.trainble": ()}, "did you mean config.parameters.trainable?"),
    ({"checkpoint.evry": 3}, "did you mean config.checkpoint.every?"),
    ({"sharding.tensr": 2}, "did you mean config.sharding.tensor?"),
    ({"objective.null_condition": "querys"}, "got 'querys'; did you mean 'queries'?"),
    ({"data.corpora.pairs.mode": "jiont"}, "config.data.corpora.pairs.mode must be one of"),
    ({"data.corpora.conversations.template": "vicuna"}, "config.data.corpora.conversations: unknown template 'vicuna'"),
    ({"model.remat": "attentoin"}, "unknown remat policy 'attentoin'"),
    ({"sharding.rules": {"embd": ("fsdp",)}}, "unknown logical axis 'embd'"),
    ({"sharding.rules": {"embed": ("fspd",)}}, "rules.embed: unknown mesh axes ['fspd']"),
    (
        {"checkpoint.best": "los", "checkpoint.keep_best": 1},
        "checkpoint.best must be one of loss, lm_loss, dm_loss, grad_norm, got 'los'",
    ),
    # Called otherwise before.
    ({"model.llama": {}}, "config.model.llama is called config.model.language_model now"),
    ({"model.unet.in_channels": 4}, "config.model.unet is called config.model.image_decoder.denoiser now"),
    (
        {"objective.snr_gamma": 5.0},
        "config.objective.snr_gamma is called config.model.image_decoder.training.snr_gamma",
    ),
    # Kinds.
    (
        {"model.image_decoder.kind": "dit"},
        "image_decoder.kind must be one of 'stable_diffusion', 'stable_diffusion_xl', 'sana', ",
    ),
    (
        {"model.language_model.kind": "lama"},
        "config.model.language_model.kind must be one of 'llama', 'qwen2', 'qwen3', 'qwen25_vl', got 'lama'; did you "
        "mean 'llama'?",
    ),
    ({"model.image_decoder.autoencoder": {"patch_size": 4}}, "autoencoder.kind is missing: it is one of 'kl', 'pixel'"),
    ({"model.image_decoder.autoencoder.kind": [1]}, "autoencoder.kind must be one of 'kl', 'pixel', got [1]"),
    (
        {"model.image_decoder.autoencoder.kind": "kl"},
        "config.model.image_decoder.autoencoder.patch_size is not a setting of kind 'kl'",
    ),
    ({"model.language_model.pattern": ({}, {}, {})}, "pattern has 3 kinds of layers, of which num_hidden_layers=2"),
    (
        {"rows.dream": ({"slots": 1, "height": 32, "width": 30},)},
        "rows.dream: side=30 must be a positive multiple of 8",
    ),
    ({"rows.dream": ({"slots": 0, "height": 32, "width": 32},)}, "rows: slots of a group of slots must be at least 1"),
    (
        {"data.stored": ("moments",), "rows.dream": ({"slots": 1, "height": 32, "width": 64},)},
        "data.stored: moments are of squares of one size",
    ),
    ({"rows.see": ({"slots": 1, "height": 32, "width": 64},)}, "takes images of 32 x 32 pixels, not 32 x 64"),
    # Of the wrong type.
    ({"steps": "many"}, "config.steps must be int, got 'many'"),
    ({"steps": True}, "config.steps must be int, got True"),
    ({"rows.per_step": 8.5}, "config.rows.per_step must be int, got 8.5"),
    ({"optimizer.learning_rate": "fast"}, "config.optimizer.learning_rate must be float, got 'fast'"),
    ({"optimizer": 3}, "config.optimizer must be a group of settings, got 3"),
    ({"data.shuffle": "yes"}, "config.data.shuffle must be bool, got 'yes'"),
    ({"data.path": 3}, "config.data.path must be str, got 3"),
    ({"data.corpora": ["pairs"]}, "config.data.corpora must be a group of settings"),
    ({"model.dtype": "float16"}, "config.model.dtype must be one of 'float32', 'bfloat16', got 'float16'"),
    ({"parameters.trainable": (("language_model/.*",),)}, "config.parameters.trainable[0] must have 2 entries, got 1"),
    (
        {"optimizer.learning_rates": (("language_model/.*", "small"),)},
        "config.optimizer.learning_rates[0][1] must be float",
    ),
    # Out of range.
    ({"steps": 0}, "steps must be positive, got 0"),
    ({"seed": -1}, "seed must not be negative, got -1"),
    ({"optimizer.learning_rate": -1.0}, "config.optimizer: learning_rate and eps must be positive"),
    ({"optimizer.warmup_ratio": 3.0}, "config.optimizer: warmup_ratio must lie in [0, 1], got 3"),
    ({"optimizer.weight_decay": -0.1}, "config.optimizer: weight_decay must not be negative"),
    ({"objective.lm_weight": -1.0}, "config.objective: lm_weight must not be negative, got -1"),
    ({"objective.drop_prob": 1.5}, "config.objective: drop_prob must lie in [0, 1], got 1.5"),
    ({"objective.image_chunk": -1}, "config.objective: image_chunk must not be negative"),
    (
        {"model.image_decoder.training": {"snr_gamma": 0.0}},
        "config.model.image_decoder.training: snr_gamma must be positive",
    ),
    ({"data.corpora.pairs.weight": -1.0}, "config.data.corpora.pairs: the weight of a corpus must be positive"),
    ({"data.flip": 2.0}, "config.data: flip is between 0 and 1, got 2"),
    ({"checkpoint.keep": 0}, "config.checkpoint: every and keep must be positive"),
    ({"model.num_queries": 0}, "config.model: num_queries must be positive, got 0"),
    (
        {"model.language_model.num_hidden_layers": 0},
        "config.model.language_model: num_hidden_layers must be positive, got 0",
    ),
    (
        {"model.language_model.lora": {"rank": 0, "alpha": 8.0}},
        "config.model.language_model.lora: rank and alpha must be positive",
    ),
    (
        {"model.image_decoder.autoencoder.patch_size": 0},
        "config.model.image_decoder.autoencoder: patch_size=0 must be a positive integer",
    ),
    (
        {"optimizer.learning_rates": (("language_model/.*", -2.0),)},
        "learning_rates: 'language_model/.*' has -2.0, which must be",
    ),
    ({"seed": 12345678901234567890}, "config.seed must not be beyond 2147483647, got 12345678901234567890"),
    ({"steps": 2**31}, "config.steps must not be beyond 2147483647"),
    ({"log_every": -1}, "log_every must be positive, got -1"),
    ({"checkpoint.every": 0}, "config.checkpoint: every and keep must be positive"),
    ({"optimizer.learning_rate": float("nan")}, "config.optimizer.learning_rate must be a number, got nan"),
    ({"optimizer.weight_decay": float("inf")}, "config.optimizer.weight_decay must be a number, got inf"),
    (
        {"optimizer.learning_rates": (("language_model/.*", float("nan")),)},
        "learning_rates[0][1] must be a number, got nan",
    ),
    ({"optimizer.b2": 1.0}, "config.optimizer: b2 must be below 1"),
    ({"data.pairs": -1}, "config.data: pairs must not be negative, got -1"),
    ({"timeout": 1e30}, "timeout=1e+30 or host_timeout=60 is longer than any clock runs"),
    (
        {"model.language_model.num_key_value_heads": 0},
        "config.model.language_model: num_key_value_heads must be positive, got 0",
    ),
    ({"model.language_model.rope_theta": -1.0}, "config.model.language_model: rope_theta must be positive, got -1"),
    ({"model.language_model.head_dim": 0}, "config.model.language_model: head_dim 0 is odd or not positive"),
    (
        {"model.language_model.initializer_range": -1.0},
        "config.model.language_model: initializer_range must not be negative",
    ),
    (
        {"model.vision_encoder.num_attention_heads": 0},
        "config.model.vision_encoder: num_attention_heads must be positive, got 0",
    ),
    (
        {"model.vision_encoder.layer_norm_eps": 0.0},
        "config.model.vision_encoder: layer_norm_eps must be positive, got 0",
    ),
    (
        {"model.image_decoder.denoiser.norm_num_groups": 0},
        "config.model.image_decoder.denoiser: norm_num_groups must be positive, got 0",
    ),
    (
        {"model.image_decoder.denoiser.sample_size": -1},
        "config.model.image_decoder.denoiser: sample_size must be positive, got -1",
    ),
    ({"model.image_decoder.denoiser.cross_attention_dim": 0}, "cross_attention_dim=0 must be one positive integer"),
    (
        {"model.image_decoder.autoencoder.scaling_factor": 0.0},
        "config.model.image_decoder.autoencoder: scaling_factor must be positive, got 0",
    ),
    (
        {"model.visual_projector": {"kind": "linear", "layer_norm_eps": -1.0}},
        "config.model.visual_projector: layer_norm_eps must be positive",
    ),
    (
        {"model.visual_projector": {"kind": "newline"}},
        "config.model: visual_projector: a visual projector of kind 'newline' needs features with places",
    ),
    (
        {"model.image_decoder.schedule.num_train_timesteps": 0},
        "config.model.image_decoder.schedule: num_train_timesteps must be a whole number from 1 to 1,000,000, got 0",
    ),
    (
        {"model.image_decoder.schedule.beta_end": 2.0},
        "config.model.image_decoder.schedule: 0 < beta_start <= beta_end < 1 must hold",
    ),
    # Rows without room.
    ({"model.num_queries": 127}, "rows.length=128 has no room for an image to paint, which takes 129 tokens"),
    ({"rows.length": 18}, "rows.length=18 has no room for an image to see, which takes 18 tokens"),
    ({"rows.length": 1024}, "rows.length=1024 exceeds model.language_model.max_position_embeddings=512"),
    (
        {"rows.length": 1536, "model.language_model.rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        "rows.length=1536 exceeds model.language_model.max_position_embeddings=512, 1024 as rope_scaling has it",
    ),
    ({"rows.microbatches": 3}, "config.rows: microbatches=3 does not divide per_step=8"),
    ({"rows.dream_size": 30}, "rows.dream_size=30 must be a positive multiple of 8"),
    ({"rows.see_slots": -1}, "config.rows: see_slots and dream_slots must not be negative"),
    # Shapes that do not go together.
    (
        {"model.image_decoder.denoiser.in_channels": 4},
        "config.model.image_decoder: denoiser.in_channels is 4, but the autoencoder's latents have 48 channels",
    ),
    (
        {"model.image_decoder.denoiser.norm_num_groups": 7},
        "config.model.image_decoder.denoiser: block_out_channels: 128 cannot be split into 7",
    ),
    (
        {"model.image_decoder.denoiser.down_block_types": ("DownBlock2D",)},
        "down_block_types=('DownBlock2D',) must have 2 entries",
    ),
    ({"model.vision_encoder.num_attention_heads": 5}, "hidden_size 64 is not a multiple of num_attention_heads 5"),
    (
        {"model.language_model.num_key_value_heads": 3},
        "num_attention_heads 4 is not a multiple of num_key_value_heads 3",
    ),
    ({"model.visual_projector": {"kind": "mlp"}}, "an mlp projector has a depth of 2 or more, the others 1"),
    ({"model.connector": {"kind": "conv"}}, "connector: a conv projector needs a square number"),
    (
        {"model.language_model.rope_scaling": LLAMA3},
        "config.model.language_model.rope_scaling: rope_type 'llama3' needs low_freq_factor",
    ),
    (
        {"model.language_model.lora": {**LORA, "targets": ("q_prj",)}},
        "config.model.language_model.lora: targets must be some of q_proj",
    ),
    # Meshes that divide nothing.
    ({"sharding.tensor": 3}, "sharding.tensor=3 does not divide model.language_model.num_attention_heads=4"),
    ({"sharding.sequence": 3}, "sharding.sequence=3 does not divide model.language_model.hidden_size=128"),
    ({"sharding.fsdp": 256}, "sharding.fsdp=256 does not divide model.language_model.hidden_size=128"),
    ({"sharding.fsdp": 2, "sharding.sequence": 128}, "fsdp=2 x sharding.sequence=128 does not divide"),
    ({"sharding": {"fsdp": 0}}, "config.sharding: mesh sizes must be positive"),
    ({"sharding.fsdp": 4, "rows.microbatches": 4}, "rows.per_step=8 in rows.microbatches=4 parts does not divide over"),
    ({"sharding.fsdp": 16}, "rows.per_step=8 does not divide over sharding.data=1 x sharding.fsdp=16"),
    ({"sharding": {"data": -1, "fsdp": -1}}, "mesh sizes must be positive, at most one -1"),
    # What is trained.
    ({"parameters.trainable": ((".*", False),)}, "trainable: every parameter is frozen, there is nothing to train"),
    ({"parameters.trainable": (("lama/.*", True), (".*", False))}, "'lama/.*' decides about no parameter"),
    ({"parameters.trainable": (("language_model/.*", True),)}, "no pattern matches the parameter"),
    (
        {"parameters.trainable": (("language_model/(", True),)},
        "trainable: 'language_model/(' is not a regular expression",
    ),
    ({"optimizer.learning_rates": (("lama/.*", 2.0),)}, "optimizer.learning_rates: 'lama/.*' decides about no trained"),
    (
        {"optimizer.layer_decays": (("dream_queries/.*", 0.9),)},
        "optimizer.layer_decays: dream_queries/embedding is matched",
    ),
    # What does not go together, and what is not there.
    ({"objective.lm_weight": 0.0, "objective.dm_weight": 0.0}, "lm_weight and dm_weight are both 0"),
    (
        {"objective.lm_weight": 0.0, "rows.dream_slots": 0},
        "objective.lm_weight=0 and rows.dream_slots=0: there is",
    ),
    ({"model.teacher": True}, "model.teacher is of objective.kind=reconstruction: leave it out"),
    ({"objective": {"kind": "reconstruction"}}, "choose model.image_decoder.autoencoder.kind=unilip"),
    ({"data.stored": ("features",)}, "is trained: leave features out of data.stored, or freeze the tower"),
    ({"data.stored": ("moments",), "data.flip": 0.5}, "stored moments cannot be mirrored"),
    ({"data.corpora.pairs.epochs": 2.0}, "config.data.corpora.pairs: a corpus has a weight (16.0) or epochs (2.0)"),
    (
        {"data.corpora": {"pairs": {"epochs": 1.0}, "text": {}}},
        "config.data: give epochs to all corpora or to none",
    ),
    ({"data.path": "no/such/folder"}, "no/such/folder"),
    ({"parameters": 3}, "config.parameters must be a group of settings, got 3"),
    ({"host_timeout": 0.0}, "timeout must not be negative and host_timeout positive, got 3600.0 and 0.0"),
    (
        {"data.path": "{data}"},
        "config.data.corpora.conversations is not in {data}: there are interleaved, pairs; import it",
    ),
    (
        {"data.path": "{data}", "data.corpora": {"pairs": {}}},
        "{data} has no tokenizer of its own: give --tokenizer (config.data.tokenizer)",
    ),
    ({"parameters.init_from": "no/such/model"}, "no/such/model has no model.json"),
]


def changed(settings: dict, changes: dict, data: str) -> dict:
    for path, value in changes.items():
        *groups, name = path.split(".")
        at = settings
        for group in groups:
            at = at.setdefault(group, {})
        at[name] = value.format(data=data) if isinstance(value, str) else value
    return settings


@pytest.fixture
def data(tmp_path) -> str:
    """A data set without conversations."""
    write_summary(tmp_path, {"settings": {}, "corpora": {"pairs": {}, "interleaved": {}}})
    return str(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"), BROKEN, ids=[f"{i}-{next(iter(c))}" for i, (c, _) in enumerate(BROKEN)]
)
def test_broken_configurations(changes, message, data):
    settings = changed(recipes.load(ROOT / "configs" / "tiny.py").to_dict(), changes, data)
    began = time.monotonic()
    with pytest.raises((ValueError, OSError)) as refused:
        check(settings)
    assert message.format(data=data) in str(refused.value) and "\n" not in str(refused.value)
    assert time.monotonic() - began < SECONDS


def test_pictures_beyond_a_table_of_positions_are_named():
    """Of 6 patches of 2 x 2 latents, each of which stands for 4 x 4 pixels."""
    settings = recipes.load(ROOT / "configs" / "tiny.py").to_dict()
    denoiser = {"sample_size": 8, "in_channels": 48, "out_channels": 48, "num_layers": 1, "pos_embed_max_size": 6}
    denoiser |= {"num_attention_heads": 2, "attention_head_dim": 8, "caption_projection_dim": 16}
    autoencoder = {"kind": "pixel", "patch_size": 4}
    settings["model"]["image_decoder"] = {
        "kind": "stable_diffusion_3",
        "denoiser": denoiser,
        "autoencoder": autoencoder,
    }
    read_experiment(changed(settings, {"rows.dream_size": 48}, ""))
    with pytest.raises(ConfigError, match=r"^rows.dream_size=56 must be a positive multiple of 8, at most 48, for"):
        read_experiment(changed(settings, {"rows.dream_size": 56}, ""))


def test_a_missing_setting_is_named():
    settings = recipes.load(ROOT / "configs" / "tiny.py").to_dict()
    del settings["optimizer"]
    with pytest.raises(ConfigError, match=r"config\.optimizer is missing"):
        read_experiment(settings)
