"""LLaMA, Qwen2 and Qwen3 in llama.cpp's layout: one `.gguf` file."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

from dreamllm_jax.common import gguf_reader
from dreamllm_jax.interop.files import Tensor
from dreamllm_jax.interop.source import Part
from dreamllm_jax.towers.language_models.llama import LlamaConfig
from dreamllm_jax.towers.language_models.qwen2 import Qwen2Config
from dreamllm_jax.towers.language_models.qwen3 import Qwen3Config

# What a file calls its architecture -> the family; those of `_PAIRWISE` have queries and keys stored for rotating
# neighbours.
_FAMILIES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
_PAIRWISE = ("llama",)
_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}


def open_gguf(path: Path) -> Part:
    """Reads the model; quantised weights are dequantised to float32.

    Raises:
      FileNotFoundError, ValueError, ImportError: as `gguf_reader.open_gguf_reader`.
      ValueError: another architecture, or rotary frequencies that are scaled.
    """
    reader = gguf_reader.open_gguf_reader(path)
    field = functools.partial(gguf_reader.field, reader)
    architecture = field("general.architecture")
    if (family := _FAMILIES.get(architecture)) is None:
        raise ValueError(f"{path}: architecture {architecture!r} is not supported: only {', '.join(_FAMILIES)} are")

    def own(name: str, default: Any = None) -> Any:
        return field(f"{architecture}.{name}", default)

    stretched = (
        own("rope.scaling.type", "none") != "none"
        or own("rope.scaling.factor", 0.0) not in (0.0, 1.0)
        or own("rope.scale_linear", 1.0) != 1.0  # in older files
        or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors)
    )
    if stretched:
        raise ValueError(f"{path}: scaled rotary frequencies are not read from GGUF; give the Hugging Face directory")
    embedding = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    names = {tensor.name for tensor in reader.tensors}
    biases = {"attention_bias": "blk.0.attn_q.bias" in names, "mlp_bias": "blk.0.ffn_up.bias" in names}
    heads = own("attention.head_count")
    config = family(
        vocab_size=int(embedding.shape[1]),
        hidden_size=own("embedding_length"),
        intermediate_size=own("feed_forward_length"),
        num_hidden_layers=own("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=own("attention.head_count_kv", heads),
        head_dim=own("attention.key_length"),
        max_position_embeddings=own("context_length"),
        rms_norm_eps=float(np.float32(own("attention.layer_norm_rms_epsilon")).astype(str)),
        rope_theta=own("rope.freq_base", 10000.0),
        tie_word_embeddings="output.weight" not in names,
        **{name: biases[name] for name in family.own},
    )
    pairwise = architecture in _PAIRWISE
    heads_of = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads} if pairwise else {}
    tensors = {}
    for tensor in reader.tensors:
        name = _torch_name(tensor.name)
        kind = tensor.name.split(".")[-2]
        tensors[name] = dataclasses.replace(_tensor(tensor, heads_of.get(kind)), where=f"{path}: {tensor.name}")
    return Part(config, tensors)


def _torch_name(name: str) -> str:
    """`blk.0.attn_q.weight` -> `layers.0.self_attn.q_proj.weight`; names of no such model stay, to be reported."""
    *place, module, leaf = name.split(".")
    if not place and module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.{leaf}"
    if len(place) == 2 and place[0] == "blk" and module in _MODULES:
        return f"layers.{place[1]}.{_MODULES[module]}.{leaf}"
    return name


def _tensor(tensor, heads: int | None) -> Tensor:
    """GGUF counts dimensions from the innermost; with `heads`, rows are stored for rotating neighbours."""
    import gguf

    shape = tuple(int(size) for size in reversed(tensor.shape))
    plain = tensor.tensor_type in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)

    def read() -> np.ndarray:
        array = tensor.data if plain else gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        array = np.asarray(array).reshape(shape)
        if heads is None:
            return array
        return array.reshape(heads, -1, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)

    return Tensor(shape, np.dtype(tensor.data.dtype if plain else np.float32), read)
