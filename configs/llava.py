"""LLaVA (arXiv 2304.08485) and LLaVA-1.5 (arXiv 2310.03744), as the original program trains them beside DreamLLM
(`projects/llava`): a model that sees, and paints nothing. The image decoder is not run.

    python -m dreamllm_jax.plan --config=configs/llava.py:version=1.5,stage=finetune --topology=v5p-16
    python -m dreamllm_jax.train --config=configs/llava.py:version=1.5,stage=pretrain --workdir=gs://… \
        --config.parameters.init_from=IMPORTED_MODEL --config.data.path=DOCUMENTS
    python -m dreamllm_jax.train --config=configs/llava.py:version=1.5,stage=finetune --workdir=gs://… \
        --config.parameters.init_from=RUN_OF_PRETRAIN --config.data.path=DOCUMENTS

Arguments: `version`, 1 (Vicuna v1.1, CLIP at 224 pixels, a linear projector) or 1.5 (Vicuna v1.5, CLIP at 336, a
projector of two layers); `stage`, pretrain (the projector alone, on LLaVA's 558K captions) or finetune (the language
model too, on LLaVA-1.5's 665K instructions); `llm`, `vision`, `decoder` to have others. The documents are LLaVA's files
(`data import llava`). The original's own file of 1.5 keeps CLIP at 224: `vision=clip-l-224`. Rates, warm-up and batches
of some 128 documents are the original's; LLaVA-1.5's authors pretrain at 1e-3 in batches of 256 and finetune at 2e-5.

Slice: pretrain v5e-8 (7.2 of 15.8 GiB a chip); 3,355 TFLOP a step to stage1_comprehension's 5,356, so 33 chip-hours at
the same rate. Finetune v5p-16 (21 of 96 GiB); 7,100 TFLOP a step to stage2_igpt's 7,756, so 32 chip-hours likewise.
Both of 1.5, planned at low effort; the rates are the compiler's estimates.

Curves, as expected (not run here): pretraining's loss falls steeply within the first few hundred steps, then slowly;
finetuning's begins below where that ended, for an answer follows from its question, and falls for the whole epoch.
"""

from ml_collections import ConfigDict

from dreamllm_jax.experiment import published, recipes

TOWERS = {
    "1": {"llm": "7b", "vision": "clip-l-224", "projector": {"kind": "linear"}},
    "1.5": {"llm": "vicuna15-7b", "vision": "clip-l-336", "projector": {"kind": "mlp", "depth": 2}},
}
# (version, stage) -> rows of a step, images of a row: as many documents as fit into 2048 tokens; and steps, one epoch.
BATCHES = {
    ("1", "pretrain"): (16, 7, 4_980),
    ("1.5", "pretrain"): (40, 3, 4_650),
    ("1", "finetune"): (40, 4, 5_540),
    ("1.5", "finetune"): (64, 3, 5_200),
}
CHOICES = {"version": tuple(TOWERS), "stage": ("pretrain", "finetune")}


def get_config(arg: str = "") -> ConfigDict:
    towers = {name: published.CHOICES[name] for name in ("llm", "vision", "decoder")}
    given = recipes.parse(arg, CHOICES | towers, version="1.5", stage="pretrain", llm="", vision="", decoder="sd21")
    own = TOWERS[given.version]
    llm, vision = given.llm or own["llm"], given.vision or own["vision"]
    config = published.alignment(f"llm={llm},vision={vision},decoder={given.decoder}")
    config.model.visual_projector = own["projector"]
    config.rows.per_step, config.rows.see_slots, config.steps = BATCHES[given.version, given.stage]
    config.rows.dream_slots = 0
    config.objective.lm_weight, config.objective.dm_weight = 1.0, 0.0
    pretrain = given.stage == "pretrain"
    trained = "visual_projector" if pretrain else "(language_model|visual_projector)"
    config.parameters.trainable = ((f"{trained}/.*", True), (".*", False))
    config.optimizer.learning_rate = 2e-3 if pretrain else 4e-5
    config.data = {"path": "", "corpora": {"conversations": {"mode": "comprehension", "weight": 1.0}}}
    return config
