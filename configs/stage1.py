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

from dreamllm_jax import published


def get_config(arg: str = "7b") -> ConfigDict:
    config = published.stage(arg or "7b")
    config.steps = 10_000
    config.parameters.trainable = (("(visual_projector|queries|condition_projector)/.*", True), (".*", False))
    config.data = {"path": "", "corpora": {"pairs": {"mode": "joint", "weight": 1.0}}}
    config.rows.per_step = 16
    config.objective.dm_weight = 1.0
    config.optimizer.learning_rate = 2e-3
    return config
