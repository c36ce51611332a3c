"""Dream queries that are learned, or noise that is drawn anew for each image and step (WeMMU, arXiv 2512.02536).

    python launch/sweep.py --config=configs/ablations/noisy_queries.py --to=runs/noisy --dry-run
    python launch/sweep.py --config=configs/ablations/noisy_queries.py:parent=tiny --to=runs/noisy

WeMMU draws from a standard normal distribution (`deviation`), lest what stands behind the queries hang on fixed points,
and reports that a model then learns edits after captions without unlearning those. Compare `dm_loss`, and what is
painted from several seeds. For guidance captions are dropped in the data: noise has no null condition of its own.
"""

from ml_collections import ConfigDict

from dreamllm_jax.experiment import recipes

SWEEP = recipes.grid(redrawn=(False, True))


def get_config(arg: str = "") -> ConfigDict:
    given, config = recipes.begin(__file__, arg, parent="stage1_creation", redrawn=True, deviation=1.0)
    if given.redrawn:
        config.model.dream_queries = {"deviation": given.deviation, "redrawn": True}
    config.objective.drop_prob = 0.0
    config.data.corpora.pairs.drop_text = 0.1
    return config
