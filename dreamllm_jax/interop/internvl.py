"""InternVL's own layout as transformers' `InternVLForConditionalGeneration` has it, for the comparison with that;
and the other way."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

# Of the vision tower: settings by their names there, and what they are called by transformers.
_SETTINGS = {
    **{name: name for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
    **{name: name for name in ("hidden_act", "image_size", "patch_size", "norm_type", "layer_norm_eps")},
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
}
_KNOWN = (*_SETTINGS, "attention_bias", "use_qk_norm")
_PAINTING = r"model\.(?!(language_model|vision_tower|multi_modal_projector)\.)"  # what of UniLIP is of no InternVL
_NAMES = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^multi_modal_projector\.", "mlp1."),  # UniLIP's
    (r"^mlp1\.0\.", "model.multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "model.multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "model.multi_modal_projector.linear_2."),
    (r"^(vision_model|vision_tower)\.", "model.vision_tower."),
    (r"\.class_embedding$", ".cls_token"),
    (r"\.position_embedding$", ".position_embeddings"),
    (r"\.patch_embedding\.", ".patch_embeddings.projection."),
    (r"\.encoder\.layers\.", ".encoder.layer."),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.", ".attention."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.ls([12])$", r".lambda_\1"),
)


def converted(settings: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings and the tensors (of torch, or numpy's arrays) of a directory in InternVL's own layout, or UniLIP's,
    as the class of transformers has them."""
    language = settings.get("llm_config") or settings["text_config"]
    vision = {_SETTINGS.get(name, name): value for name, value in settings["vision_config"].items() if name in _KNOWN}
    whole = {
        "vision_config": vision,
        "text_config": dict(language),
        "downsample_ratio": settings.get("downsample_ratio", 0.5),
        "tie_word_embeddings": language.get("tie_word_embeddings", settings.get("tie_word_embeddings", False)),
    }
    return whole, as_transformers({name: x for name, x in tensors.items() if not re.match(_PAINTING, name)})


def as_transformers(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors alone."""
    found = {}
    for name, tensor in tensors.items():
        for pattern, instead in _NAMES:
            name = re.sub(pattern, instead, name)
        if ".attention.qkv." in name:
            size = tensor.shape[0] // 3
            for at, part in enumerate("qkv"):
                found[name.replace(".qkv.", f".{part}_proj.")] = tensor[at * size : (at + 1) * size]
        else:
            found[name] = tensor
    return found


# Of the vision tower alone, the other way.
_PUBLISHED = (
    (r"\.cls_token$", ".class_embedding"),
    (r"\.position_embeddings$", ".position_embedding"),
    (r"\.patch_embeddings\.projection\.", ".patch_embedding."),
    (r"^encoder\.layer\.", "encoder.layers."),
    (r"\.attention\.projection_layer\.", ".attn.proj."),
    (r"\.attention\.", ".attn."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.lambda_([12])$", r".ls\1"),
)


def as_published(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of transformers' vision tower as InternVL's own layout has them."""
    found = {}
    for name, tensor in tensors.items():
        if re.search(r"\.[kv]_proj\.", name):
            continue  # with the queries'
        if ".q_proj." in name:
            tensor = np.concatenate([tensors[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            name = name.replace(".q_proj.", ".qkv.")
        for pattern, instead in _PUBLISHED:
            name = re.sub(pattern, instead, name)
        found[name] = tensor
    return found
