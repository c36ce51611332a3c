"""Stage I of DreamLLM (arXiv 2309.11499, section 3.3): the towers are frozen; visual projector, connector and dream
queries are learnt.

    python -m dreamllm_jax.train --config=configs/alignment.py:checkpoints/initial --workdir=runs/alignment

The argument is the model to begin with, as `convert import` writes it. The pictures are a few emoji, to try it out;
`--config.data.path` names others.
"""

from ml_collections import ConfigDict

from dreamllm_jax.checkpoints import saved
from dreamllm_jax.experiment import published


def get_config(arg: str = "") -> ConfigDict:
    if not arg:
        raise ValueError("name the model to begin with: --config=configs/alignment.py:DIR")
    model = saved.find(arg).config
    config = published.alignment()
    config.steps = 1000
    config.model = {"dtype": "bfloat16"}  # the rest as the checkpoint says
    config.parameters.init_from = arg
    config.data = {
        "path": "openmoji",
        "corpora": {
            "pairs": {"mode": "joint", "weight": 4.0},
            "interleaved": {"mode": "joint", "weight": 1.0},
        },
    }
    if model.prompting is not None:  # one that is asked in words of its own loses these, not its condition
        config.objective.drop_prob = 0.0
        config.data.corpora.pairs.drop_text = 0.1
    document = model.vision_encoder.num_patches + model.num_queries + 32
    config.rows = {
        "per_step": 8,
        "length": min(4 * document, model.language_model.max_length),
        "see_slots": 4,
        "dream_slots": 4,
        "dream_size": model.image_decoder.default_size,
    }
    config.checkpoint.keep = 2
    return config
