"""Stage I of DreamLLM, alignment (arXiv 2309.11499, section 3.3): projectors and dream queries are learnt on captioned
pictures, read and painted; the llama, CLIP and Stable Diffusion stay frozen.

    python -m dreamllm_jax.plan --config=configs/stage1.py:7b --topology=v5e-8
    python -m dreamllm_jax.train --config=configs/stage1.py:7b --workdir=gs://… \
        --config.parameters.init_from=IMPORTED_MODEL --config.data.path=DOCUMENTS

The argument is the llama's size: 7b (default) or 13b. The original learns to read and to paint in separate runs: those
are `--config.data.corpora.pairs.mode=comprehension --config.objective.dm_weight=0` and
`--config.data.corpora.pairs.mode=creation --config.objective.lm_weight=0`.
"""

from ml_collections import ConfigDict

from dreamllm_jax.models import published


def get_config(arg: str = "7b") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 10_000
    config.log_every = 10

    config.model = published.dreamllm(arg or "7b")
    config.parameters = {
        "init_from": "",
        "trainable": (
            ("(visual_projector|queries|condition_projector)/.*", True),
            (".*", False),
        ),
        "dtype": "float32",
        "frozen_dtype": "bfloat16",
    }
    config.data = {"path": "", "corpora": {"pairs": {"mode": "joint", "weight": 1.0}}}
    config.rows = {"per_step": 16, "length": 2048, "see_slots": 4, "dream_slots": 4, "dream_size": 512}
    config.objective = {"lm_weight": 1.0, "dm_weight": 1.0, "drop_prob": 0.1}
    config.optimizer = {"learning_rate": 2e-3, "warmup_ratio": 0.003, "weight_decay": 0.0}
    config.sharding = {"data": 1, "fsdp": -1, "sequence": 1, "tensor": 1}
    config.checkpoint = {"every": 500, "keep": 3}
    return config
