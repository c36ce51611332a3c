"""A DreamLLM of today, our own recommendation: Qwen3 or Qwen2.5-VL, SigLIP 2 or that model's own vision encoder,
OpenUni's transformer and SANA, trained to see, write and paint at once, in packed interleaved rows.

    python -m dreamllm_jax.plan --config=configs/dreamllm3.py:4b --topology=v5p-16
    python -m dreamllm_jax.train --config=configs/dreamllm3.py:4b,stage=align --workdir=gs://… \
        --config.parameters.init_from=IMPORTED_MODEL --config.data.path=DOCUMENTS
    python -m dreamllm_jax.train --config=configs/dreamllm3.py:4b,stage=joint --workdir=gs://… \
        --config.parameters.init_from=RUN_OF_ALIGN --config.data.path=DOCUMENTS

Arguments: `size`, 2b (Qwen3-1.7B), 4b (Qwen3-4B), 8b (Qwen3-8B) or vl-3b, vl-7b (Qwen2.5-VL); `stage`, align
(projector, queries and connector; everything else is frozen) or joint (language model and SANA too, SANA at a tenth of
the rate); `decoder` another image decoder than sana-1.6b-512.

OpenUni, MetaQuery and UniLIP learn to paint alone, one document a row. Here every step learns both losses of DreamLLM
(arXiv 2309.11499) on pairs, interleaved documents and conversations, as its stages I and II do.

Slice: v5p-16 (4b 32.4, 8b 43.3 of 95.7 GiB a chip, planned at low effort).

Curves, as expected (not run here): `lm_loss` as of the language model on such text; `dm_loss` from about 1 slowly to
about 0.6 or below, noisy from step to step.
"""

from ml_collections import ConfigDict

from dreamllm_jax.experiment import family, published, recipes

# size -> language model, vision encoder
TOWERS = {
    "2b": ("qwen3-1.7b", "siglip2-so400m-384"),
    "4b": ("qwen3-4b", "siglip2-so400m-384"),
    "8b": ("qwen3-8b", "siglip2-so400m-384"),
    "vl-3b": ("qwen25-vl-3b", "qwen25-vl-3b"),
    "vl-7b": ("qwen25-vl-7b", "qwen25-vl-7b"),
}
CHOICES = {"size": tuple(TOWERS), "stage": ("align", "joint"), "decoder": published.CHOICES["decoder"]}
CORPORA = {
    "align": {"pairs": {"mode": "joint", "weight": 1.0}},
    "joint": {
        "pairs": {"mode": "joint", "weight": 1.0},
        "interleaved": {"mode": "joint", "weight": 2.0},
        "conversations": {"mode": "comprehension", "weight": 1.0, "template": "chatml"},
    },
}


def get_config(arg: str = "") -> ConfigDict:
    given = recipes.parse(arg, CHOICES, size="4b", stage="joint", decoder="sana-1.6b-512")
    align = given.stage == "align"
    more = {} if given.size.startswith("vl") else {"visual_projector": {"kind": "mlp", "depth": 2}}
    model = family.towers(*TOWERS[given.size], given.decoder, "openuni-l", num_queries=128, **more)
    trained = "(visual_projector|dream_queries|connector)/.*"
    if not align:
        trained = "(language_model|visual_projector|dream_queries|connector|image_decoder/denoiser)/.*"
    config = family.painting(model, trained, pictures=256, slots=4, length=4096)
    config.rows.see_slots = 4
    config.steps = 20_000 if align else 60_000
    config.data.corpora = CORPORA[given.stage]
    config.objective.update(lm_weight=1.0, drop_prob=0.1)
    config.optimizer.update(learning_rate=1e-3 if align else 2e-5, warmup_ratio=0.01, end_value=0.1)
    if not align:
        config.optimizer.learning_rates = (("image_decoder/denoiser/.*", 0.1), ("(dream_queries|connector)/.*", 5.0))
    return config
