"""A small DreamLLM that composes: trained from scratch on drawn scenes, it reads and paints such as it never saw.

    python -m dreamllm_jax.train --config=configs/scenes.py --workdir=runs/scenes
    python -m dreamllm_jax.evaluate scenes --workdir=runs/scenes --guidance=1

The argument may give the dream queries: `configs/scenes.py:queries=8`.

Its pictures (docs/data.md#scenes) are squares of 12 pixels, four by four: one token each to the vision encoder and to
SANA's denoiser, and there are as many dream queries. A picture follows from its caption, so nothing is dropped for
guidance; the denoiser gives clean latents, whose noise need not pass through it, and is told where squares are. Muon
moves the matrices of all layers, which takes fewer steps than AdamW.
"""

from ml_collections import ConfigDict

from dreamllm_jax.experiment import recipes

PICTURE, SQUARE = 48, 12  # pixels on a side
WIDTH, HEADS = 192, 4  # of the denoiser
CHANNELS = 3 * SQUARE**2


def get_config(arg: str = "") -> ConfigDict:
    given = recipes.parse(arg, {}, queries=16)
    config = ConfigDict()
    config.seed = 0
    config.steps = 800
    config.log_every = 50

    config.model = {
        "language_model": {
            "kind": "llama",
            "vocab_size": 512,  # 8 special tokens included
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 512,
        },
        "vision_encoder": {
            "kind": "clip",
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": PICTURE,
            "patch_size": SQUARE,
        },
        "image_decoder": {
            "kind": "sana",
            "denoiser": {
                "sample_size": PICTURE // SQUARE,
                "in_channels": CHANNELS,
                "out_channels": CHANNELS,
                "num_layers": 4,
                "num_attention_heads": HEADS,
                "attention_head_dim": WIDTH // HEADS,
                "num_cross_attention_heads": HEADS,
                "cross_attention_head_dim": WIDTH // HEADS,
                "cross_attention_dim": WIDTH,
                "caption_channels": 128,
                "qk_norm": "rms_norm_across_heads",
                "interpolation_scale": 1.0,
            },
            "autoencoder": {"kind": "pixel", "patch_size": SQUARE},
            "flow": {"prediction_type": "sample", "weighting": "preconditioned", "shift": 4.0, "input_scale": 0.2},
        },
        "num_queries": given.queries,
        "remat": "none",
    }
    config.parameters = {"trainable": ((".*", True),)}

    config.data = {
        "path": "scenes",
        "pairs": 16_000,
        "corpora": {"pairs": {"mode": "joint"}},
    }
    config.rows = {"per_step": 40, "length": 64, "see_slots": 1, "dream_slots": 1, "dream_size": PICTURE}

    # All images at once: on CPU, convolutions in a loop are several times slower.
    config.objective = {"kind": "joint", "lm_weight": 1.0, "dm_weight": 10.0, "image_chunk": 0}
    config.optimizer = {
        "learning_rate": 4e-3,
        "warmup_ratio": 0.05,
        "b2": 0.95,
        "muon": (
            "language_model/layers/.*/kernel",
            "vision_encoder/encoder/layers/.*/kernel",
            "visual_projector/.*/kernel",
            "connector/.*/kernel",
            "image_decoder/denoiser/transformer_blocks/(?!ff/conv_depth).*/kernel",
        ),
        # Gates and positions begin small.
        "learning_rates": (
            ("image_decoder/denoiser/(.*/)?scale_shift_table", 5.0),
            ("vision_encoder/embeddings/position_embedding/.*", 5.0),
        ),
    }
    config.checkpoint = {"every": 200, "keep": 2}
    return config
