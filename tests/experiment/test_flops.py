"""The arithmetic of a step's FLOPs equals what the compiled program multiplies, for every part and every option."""

import dataclasses

import jax
import pytest

from dreamllm_jax.experiment.experiment import read_experiment
from dreamllm_jax.experiment.flops import model_flops, step_flops
from dreamllm_jax.layers.lora import LoraConfig
from dreamllm_jax.planning.program import read_program
from dreamllm_jax.planning.step import lower_step
from dreamllm_jax.towers.connectors.projector import ProjectorConfig
from dreamllm_jax.towers.connectors.transformer import TransformerConfig
from dreamllm_jax.towers.image_decoders.unet_transformer import UNetLora
from dreamllm_jax.towers.vision_encoders.intern_vit import InternVitConfig
from tests.public_models import INTERN_VIT
from tests.tiny import DECODER, DECODER_UNILIP, DECODER_XL, DREAM_SIZE, DREAM_SLOTS, LENGTH, SEE_SLOTS, tiny_config

STAGE_2 = (("(language_model|visual_projector|dream_queries|connector)/.*", True), (".*", False))
ALIGNMENT = (("(visual_projector|dream_queries|connector)/.*", True), (".*", False))
EVERYTHING = ((".*", True),)
ADAPTED = tiny_config(
    language_model=dataclasses.replace(
        tiny_config().language_model, lora=LoraConfig(8, 8.0, ("q_proj", "o_proj", "up_proj"))
    ),
    image_decoder=dataclasses.replace(DECODER, denoiser=dataclasses.replace(DECODER.denoiser, lora=UNetLora(4, 4.0))),
    remat="full",
)
# Where a compiled multiplication was traced.
SCOPES = {
    "DreamLLM.see": "vision_encoder",
    "DreamLLM.embed": "language_model",
    "DreamLLM.decode": "language_model",
    "DreamLLM.null_hidden": "language_model",
    "DreamLLM.condition": "connector",
    "Sana.stored": "autoencoder",
    "Sana.decode": "autoencoder",
    "Sana.reconstruct": "autoencoder",
    "Sana.denoise": "denoiser",
    "StableDiffusion.stored": "autoencoder",
    "StableDiffusion.denoise": "denoiser",
    "StableDiffusionXL.stored": "autoencoder",
    "StableDiffusionXL.denoise": "denoiser",
}
PARTS = {*SCOPES.values(), "head"}


def experiment(trainable=STAGE_2, remat="none", rows=None, objective=None, model=None, stored=()):
    model = tiny_config(remat=remat) if model is None else model
    settings = {
        "model": dataclasses.asdict(model) | {"special_tokens": None},
        "parameters": {"trainable": trainable, "init_from": "anything" if model.teacher else ""},
        "data": {"path": "", "corpora": {"pairs": {}}, "stored": stored},
        "rows": {
            "per_step": 4,
            "length": LENGTH,
            "see_slots": SEE_SLOTS,
            "dream_slots": DREAM_SLOTS,
            "dream_size": DREAM_SIZE,
            **(rows or {}),
        },
        "objective": {"kind": "joint"} | (objective or {}),
        "optimizer": {},
        "steps": 10,
    }
    return read_experiment(settings)


def compiled_flops(experiment):
    """Part -> FLOPs of the program compiled for one device."""
    _, _, lowered = lower_step(experiment, jax.devices()[:1])
    program = read_program(lowered.compile().as_text(), {"data": 1})
    found = dict.fromkeys((*PARTS, "elsewhere"), 0.0)
    for name, flops in program.flops_by_name.items():
        part = next((part for scope, part in SCOPES.items() if scope in name), "elsewhere")
        found["head" if "ev->blv" in name else part] += flops
    assert not program.unknown_loops
    return found


NO_IMAGES = {"see_slots": 0, "dream_slots": 0}
CASES = {
    "stage 2": {},
    "stage 2, recomputed, painted in two sizes": {
        "remat": "full",
        "objective": {"drop_prob": 0.5},
        "rows": {"dream": tuple({"slots": 1, "height": DREAM_SIZE, "width": DREAM_SIZE * n} for n in (1, 2))},
    },
    "alignment": {"trainable": ALIGNMENT, "model": tiny_config(visual_projector=ProjectorConfig(kind="conv"))},
    "everything, recomputed": {
        "trainable": EVERYTHING,
        "model": tiny_config(connector=TransformerConfig(num_hidden_layers=2, head_dim=8), remat="full"),
    },
    "adapters": {"model": ADAPTED, "trainable": ((".*lora_.", True), (".*", False)), "remat": "full"},
    "text alone, chunks": {"rows": NO_IMAGES, "objective": {"loss_chunk": 8}, "remat": "attention+up"},
    "images computed beforehand": {"stored": ("moments", "features"), "trainable": ALIGNMENT},
    "sizes are told": {"model": tiny_config(image_decoder=DECODER_XL, connector=ProjectorConfig("mlp", 2))},
    "seen alone": {"rows": {"dream_slots": 0}},
    "seen in tiles, recomputed": {
        "trainable": EVERYTHING,
        "model": tiny_config(
            vision_encoder=InternVitConfig(**INTERN_VIT),
            visual_projector=ProjectorConfig("mlp", 2, pre_layernorm=True),
            remat="full",
        ),
        "rows": {"dream_slots": 0, "see": tuple({"slots": 1, "height": 16, "width": width} for width in (16, 32))},
    },
    "painted from features": {
        "model": tiny_config(image_decoder=DECODER_UNILIP),
        "trainable": EVERYTHING,
        "objective": {"lm_weight": 0.0, "image_chunk": 0},
        "rows": {"see_slots": 0},
    },
    "reconstruction": {
        "model": tiny_config(image_decoder=DECODER_UNILIP, teacher=True),
        "trainable": (("(vision_encoder|image_decoder/autoencoder)/.*", True), (".*", False)),
        "objective": {"kind": "reconstruction", "distill_weight": 1.0, "image_chunk": 0},
        "rows": {"see_slots": 0},
    },
    "painted alone, detached": {
        "rows": {"see_slots": 0},
        "objective": {"lm_weight": 0.0, "detach_condition": True},
    },
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_executed_flops_are_the_compiled_ones(case):
    given = experiment(**CASES[case])
    got, want = {name: part.executed for name, part in step_flops(given, "cpu").items()}, compiled_flops(given)
    assert sum(got.values()) == pytest.approx(sum(want.values()), rel=0.03)
    assert got.keys() <= PARTS
    for part in PARTS:  # a product that XLA has rewritten may have lost its name
        assert 0.97 * want[part] <= got.get(part, 0.0) <= 1.03 * (want[part] + want["elsewhere"]), part


def test_model_flops_follow_from_parameters():
    """PaLM's appendix B: 6 FLOPs a weight and token, and 12 a layer, channel, query and key."""
    rows, model = 4, tiny_config()
    given = experiment(rows={**NO_IMAGES, "per_step": rows})
    llama, tokens = model.language_model, rows * LENGTH
    width, inner = llama.hidden_size, llama.intermediate_size
    weights = llama.num_hidden_layers * (3 * width**2 + 3 * width * inner) + width * llama.vocab_size  # 2 of 4 kv heads
    attention = 12 * llama.num_hidden_layers * width * LENGTH
    assert model_flops(given) == tokens * (6 * weights + attention)
    masked = step_flops(given)["language_model"].masked
    assert masked == pytest.approx(tokens * attention / 2, rel=1 / LENGTH)


def test_recomputation_is_no_model_flops():
    assert len({model_flops(experiment(remat=remat)) for remat in ("none", "dots", "full")}) == 1
    policies = ("none", "dots", "attention+gate", "attention", "full")
    executed = [step_flops(experiment(remat=remat))["language_model"].executed for remat in policies]
    assert executed == sorted(set(executed))


def test_a_causal_kernel_skips_what_lies_above_the_diagonal():
    """Of 4096 tokens in tiles of 1024, 10 of 16; two products forward, five backward, two again."""
    wide = dataclasses.replace(
        tiny_config().language_model, num_attention_heads=2, head_dim=128, max_position_embeddings=4096
    )
    model = tiny_config(language_model=wide, remat="full")
    given = experiment(rows={**NO_IMAGES, "length": 4096}, model=model)
    on_tpu, elsewhere = step_flops(given)["language_model"], step_flops(given, "cpu")["language_model"]
    square = wide.num_hidden_layers * 2 * 4 * 4096**2 * 256
    assert on_tpu.kernels == square * 10 / 16 * (2 + 5 + 2) and elsewhere.kernels == 0
    assert on_tpu.model == elsewhere.model and on_tpu.executed < elsewhere.executed
