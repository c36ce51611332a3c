"""Small random checkpoints as OpenUni's and MetaQuery's programs save them, beside the directories of their towers."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests import byte_level, public_models

WIDTH, ROWS, QUERIES = 64, 320, 3
TEXT = {"vocab_size": ROWS, "hidden_size": WIDTH}
CAPTIONS = {"sana": 24, "stable_diffusion-v1-5": 24}  # channels of what they are painted from
# OpenUni's placements of its projectors: width of the connector, and the projectors' shapes.
PLACEMENTS = {
    "enc_proj": (WIDTH, {"projector": (24, WIDTH)}),
    "proj_enc": (24, {"projector": (24, WIDTH)}),
    "proj_enc_proj": (16, {"projector.0": (16, WIDTH), "projector.1": (24, 16)}),
}


def save_openuni(root: Path, placement: str, towers: bool) -> Path:
    """The file; its connector has heads of 8 channels.

    Args:
      root: where `save_openuni_towers` were written.
      towers: are in the file too.
    """
    width, projectors = PLACEMENTS[placement]
    shapes = {"meta_queries": (QUERIES, WIDTH), **linear(projectors)}
    for layer in range(2):
        prefix = f"connector.layers.{layer}."
        attention = {f"self_attn.{name}": (width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        products = attention | {"mlp.fc1": (40, width), "mlp.fc2": (width, 40)}
        norms = {f"{name}.{kind}": (width,) for name in ("layer_norm1", "layer_norm2") for kind in ("weight", "bias")}
        shapes |= {prefix + name: shape for name, shape in {**linear(products), **norms}.items()}
    tensors = drawn(shapes)
    if towers:
        for folder, prefix in (("lmm", "lmm."), ("Sana/transformer", "transformer."), ("Sana/vae", "vae.")):
            tensors |= {prefix + name: tensor for name, tensor in of(root / folder).items()}
    file = root / f"{placement}{'' if towers else '_alone'}.pth"
    torch.save({"state_dict": tensors}, file)
    return file


def save_openuni_towers(root: Path) -> None:
    """An InternVL in `lmm/`, a SANA in `Sana/`."""
    public_models.save_internvl(root / "lmm", chat=True, **TEXT)
    words_of(root / "lmm", "internvl3")
    public_models.save_sana(root / "Sana", version="1.0")


def save_metaquery(root: Path, backbone: str) -> Path:
    """The directory `metaquery/`, of a `backbone` "llava" over SANA, or a "Qwen2.5-VL" whose output matrix is not its
    embedding over Stable Diffusion 1.5."""
    qwen = backbone == "Qwen2.5-VL"
    whose, decoder = ("qwen2_5_vl", "stable-diffusion-v1-5") if qwen else ("llava_onevision", "Sana")
    if qwen:
        heads = {"num_attention_heads": 8, "tie_word_embeddings": False}
        public_models.save_qwen25_vl(root / backbone, **TEXT, **heads)
        public_models.save_diffusion(root / decoder, version="1.5")
    else:
        public_models.save_onevision(root / backbone, **TEXT)
        public_models.save_sana(root / decoder, version="1.0")
    words_of(root / backbone, whose)
    shapes = linear({"1": (24, WIDTH), "3": (24, 24)}) | {"4.weight": (24,)}
    for layer in range(2):
        prefix, square = f"0.layers.{layer}.", (WIDTH, WIDTH)
        attention = {f"self_attn.{name}": square for name in ("q_proj", "k_proj", "v_proj")}
        gated = {f"mlp.{name}.weight": (4 * WIDTH, WIDTH) for name in ("gate_proj", "up_proj")}
        others = {"self_attn.o_proj.weight": square, "mlp.down_proj.weight": (WIDTH, 4 * WIDTH)}
        norms = {f"{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")}
        gammas = {f"self_attn.{name}.gamma": (1, 1, 64) for name in ("q_norm", "k_norm")}
        every = linear(attention) | gated | others | norms | gammas
        shapes |= {prefix + name: shape for name, shape in every.items()}
    tensors = {f"model.connector.{name}": tensor for name, tensor in drawn(shapes).items()}
    for name, tensor in of(root / backbone).items():
        if name.endswith("embed_tokens.weight"):
            tensor = torch.cat([tensor, *drawn({"more": (2 + QUERIES, WIDTH)}).values()])
        if not name.endswith("lm_head.weight"):
            tensors[f"model.mllm_backbone.{name}"] = tensor
    tensors |= {
        f"model.transformer.{name}": x for name, x in of(root / decoder / ("unet" if qwen else "transformer")).items()
    }
    tensors |= {f"vae.{name}": x for name, x in of(root / decoder / "vae").items()}
    directory = root / "metaquery"
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    settings = {
        **{"model_type": "metaquery", "mllm_id": f"somewhere/{backbone}", "num_metaqueries": QUERIES},
        **{f"{name}_id": f"somewhere/{decoder}" for name in ("diffusion_model", "vae", "noise_scheduler", "scheduler")},
        **{"max_input_text_tokens": 17, "system_prompt": "Describe it."},
    }
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


def linear(shapes: dict[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    """Weights and biases."""
    return {f"{n}.weight": shape for n, shape in shapes.items()} | {
        f"{n}.bias": shape[:1] for n, shape in shapes.items()
    }


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Random tensors of a size that keeps activations alive."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) / math.sqrt(shape[-1]) for name, shape in shapes.items()}


def of(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of a public class that lies there, by the names of transformers up to 4.51."""
    (file,) = directory.glob("*.safetensors")
    before = "vision_tower."
    return {
        (before + "vision_model." + name.removeprefix(before))
        if name.startswith(before) and "vision_model" not in name
        else name: tensor
        for name, tensor in load_file(file).items()
    }


def words_of(directory: Path, whose: str) -> None:
    """A byte-level tokenizer in the place of the other."""
    (directory / "tokenizer.model").unlink()
    byte_level.save_tokenizer(directory, whose)
