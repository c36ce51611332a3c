"""Stage III of DreamLLM, supervised fine-tuning on instructions (arXiv 2309.11499, section 3.3): as stage II, on
conversations and instructed stories.

    python -m dreamllm_jax.plan --config=configs/stage3.py:7b --topology=v5p-16
    python -m dreamllm_jax.train --config=configs/stage3.py:7b --workdir=gs://… \
        --config.parameters.init_from=RUN_OF_STAGE_II --config.data.path=DOCUMENTS

The argument is the llama's size: 7b (default) or 13b.
"""

from ml_collections import ConfigDict

from dreamllm_jax.models import published


def get_config(arg: str = "7b") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 5_000
    config.log_every = 10

    config.model = published.dreamllm(arg or "7b")
    config.parameters = {
        "init_from": "",
        "trainable": (
            ("(llama|visual_projector|queries|condition_projector)/.*", True),
            (".*", False),
        ),
        "dtype": "float32",
        "frozen_dtype": "bfloat16",
    }
    config.data = {
        "path": "",
        "corpora": {
            "conversations": {"mode": "joint", "weight": 1.0},
            "interleaved": {"mode": "joint", "weight": 1.0},
            "pairs": {"mode": "creation", "weight": 1.0},
        },
    }
    config.rows = {"per_step": 64, "length": 2048, "see_slots": 4, "dream_slots": 4, "dream_size": 512}
    config.objective = {"lm_weight": 1.0, "dm_weight": 10.0, "drop_prob": 0.1}
    config.optimizer = {"learning_rate": 4e-5, "warmup_ratio": 0.003, "weight_decay": 0.0}
    config.sharding = {"data": 1, "fsdp": -1, "sequence": 1, "tensor": 1}
    config.checkpoint = {"every": 500, "keep": 3}
    return config
