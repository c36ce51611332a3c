"""A tiny DreamLLM, trained from scratch on a few pictures with their names: minutes on two CPU cores.

    python -m dreamllm_jax.train --config=configs/tiny.py --workdir=runs/tiny

The argument may give the dream queries and the image decoder: `configs/tiny.py:queries=4,decoder=sana`; "sd" is a U-Net
that learns velocity, "sana" a linear transformer that learns a flow. After its 1000 steps it knows its 24 pictures by
heart, both ways; `python -m dreamllm_jax.report` shows the curves.

Every part is built as the real one, only smaller. As there are no pretrained towers of this size, all of them are
trained; in the image decoder an autoencoder in pixel space, without parameters (kind "pixel"), stands in for the one of
Stable Diffusion (kind "kl") or SANA (kind "dc").
"""

from ml_collections import ConfigDict

from dreamllm_jax.experiment import recipes

PICTURE = 32  # pixels on a side
PIXELS = {"sample_size": PICTURE // 4, "in_channels": 48, "out_channels": 48}  # squares of 4 x 4 as latents
DECODERS = {
    "sd": {
        "kind": "stable_diffusion",
        "denoiser": PIXELS
        | {
            "block_out_channels": (128, 64),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 64,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
            "use_linear_projection": True,
        },
        "autoencoder": {"kind": "pixel", "patch_size": 4},
        # Velocity: a small model's errors in epsilon would be blown up at the noisiest timesteps.
        "schedule": {"prediction_type": "v_prediction"},
    },
    "sana": {
        "kind": "sana",
        "denoiser": PIXELS
        | {
            "num_layers": 4,
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 32,
            "cross_attention_dim": 128,
            "caption_channels": 64,
            "qk_norm": "rms_norm_across_heads",
        },
        "autoencoder": {"kind": "pixel", "patch_size": 4},
    },
}


def get_config(arg: str = "") -> ConfigDict:
    given = recipes.parse(arg, {"decoder": DECODERS}, queries=8, decoder="sd")
    config = ConfigDict()
    config.seed = 0
    config.steps = 1000
    config.log_every = 50

    config.model = {
        "language_model": {
            "kind": "llama",
            "vocab_size": 512,  # 8 special tokens included
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 512,
        },
        "vision_encoder": {
            "kind": "clip",
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": PICTURE,
            "patch_size": 8,
        },
        "image_decoder": DECODERS[given.decoder],
        "num_queries": given.queries,
        "remat": "none",
    }
    config.parameters = {"trainable": ((".*", True),)}

    config.data = {
        "path": "openmoji",
        "corpora": {
            "pairs": {"mode": "joint", "weight": 16.0},
            "interleaved": {"mode": "joint", "weight": 1.0},
            "conversations": {"mode": "joint", "weight": 1.0, "learn_dream_start": True},
        },
    }
    config.rows = {"per_step": 8, "length": 128, "see_slots": 3, "dream_slots": 3, "dream_size": PICTURE}

    # All images at once: on CPU, convolutions in a loop are several times slower.
    config.objective = {"kind": "joint", "lm_weight": 1.0, "dm_weight": 10.0, "drop_prob": 0.1, "image_chunk": 0}
    config.optimizer = {"learning_rate": 2e-3, "warmup_ratio": 0.05, "b2": 0.95}
    if given.decoder == "sana":  # whose gates are small at first
        config.optimizer.learning_rates = (("image_decoder/.*", 2.5),)
    config.checkpoint = {"every": 250, "keep": 2}
    return config
