"""Stage I of DreamLLM, alignment (arXiv 2309.11499, section 3.3): projectors and dream queries are learnt on captioned
pictures, read and painted in one run; the llama, CLIP and Stable Diffusion stay frozen.

    python -m dreamllm_jax.plan --config=configs/stage1_joint.py:7b --topology=v5e-8
    python -m dreamllm_jax.train --config=configs/stage1_joint.py:7b --workdir=gs://… \
        --config.parameters.init_from=IMPORTED_MODEL --config.data.path=DOCUMENTS

The original learns to read and to paint in separate runs (`stage1_comprehension`, `stage1_creation`). The parameters
that those learn are disjoint and the images are spread over all chips, so one run does both.
"""

from ml_collections import ConfigDict

from dreamllm_jax import published


def get_config(arg: str = "") -> ConfigDict:
    config = published.alignment(arg)
    config.steps = 40_000
    config.data = {"path": "", "corpora": {"pairs": {"mode": "joint", "weight": 1.0}}}
    config.rows.see_slots = config.rows.dream_slots = 5  # pairs with short captions fill 2048 tokens
    config.objective.dm_weight = 1.0
    return config
