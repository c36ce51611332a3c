"""PyTorch's side of a comparison with a checkpoint of OpenUni or MetaQuery: the public classes of its towers, of the
shapes that ours have, with the tensors of the file; and their connectors, written out."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamllm_jax.interop import internvl, metaquery, openuni
from dreamllm_jax.interop.files import STATE, find_model, require_beside
from dreamllm_jax.interop.query_models import (
    AUTOENCODER,
    BACKBONE,
    CONNECTOR,
    DENOISER,
    QUERIES,
    layout_name,
)
from dreamllm_jax.interop.source import config_of
from dreamllm_jax.interop.torch_modules import public_class, require_same_tensors
from dreamllm_jax.interop.vision_language import LAYOUTS, STEMS, Layout
from dreamllm_jax.interop.vision_language_modules import parts_of
from dreamllm_jax.model import DreamLLMConfig
from dreamllm_jax.towers.connectors.transformer import TransformerConfig
from dreamllm_jax.towers.public import PublicForm

if TYPE_CHECKING:
    import torch
    from torch import nn

_logger = logging.getLogger(__name__)


def file_of(path: Path) -> Path | None:
    """OpenUni's file at a path or in that directory, if there is one."""
    return next((file for file in (path, path / openuni.FILE) if file.is_file()), None)


@dataclasses.dataclass(frozen=True)
class _State:
    """A program's file, or its shards.

    Attributes:
      program: `openuni` or `metaquery`.
      path: for messages.
      tensors: by name.
    """

    program: Any
    path: Path
    tensors: Mapping[str, "torch.Tensor"]

    @classmethod
    def read(cls, path: Path) -> "_State":
        if file := file_of(path):
            import torch

            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            return cls(openuni, file, content.get(STATE, content))
        from transformers.modeling_utils import load_state_dict

        index, _ = find_model(path, *STEMS)
        shards = sorted(set(require_beside(index).values())) if index.suffix == ".json" else [index.name]
        return cls(metaquery, path, {name: x for shard in shards for name, x in load_state_dict(path / shard).items()})

    def tower(self, tower: str) -> dict[str, "torch.Tensor"]:
        """By their names in a file of their own."""
        prefix = self.program.PREFIXES[tower]
        return {name.removeprefix(prefix): x for name, x in self.tensors.items() if name.startswith(prefix)}

    def others(self) -> dict[str, "torch.Tensor"]:
        """What is of no tower."""
        towers = tuple(self.program.PREFIXES.values())
        return {name: x for name, x in self.tensors.items() if not name.startswith(towers)}


def loaders(config: DreamLLMConfig, path: Path) -> dict[str, Callable[[], "nn.Module"]]:
    """Part -> what loads its torch module; the parts that the file has. The language model, without which there are no
    queries to be compared, has as many tokens as ours.

    Raises:
      ValueError: ours is of no layout of that program. A loader raises it for a tensor that is missing, unexpected or
        wrongly shaped.
    """
    program = openuni if file_of(path) else metaquery
    program.require(config)
    layout = next(layout for layout in LAYOUTS if layout_name(config) in layout.types)
    state = _State.read(path)
    there = {tower for tower, prefix in program.PREFIXES.items() if any(n.startswith(prefix) for n in state.tensors)}
    for tower in sorted(program.PREFIXES.keys() - there):
        _logger.warning("%s has no %s*: that is not compared", path, program.PREFIXES[tower])
    found = {part: functools.partial(_of_diffusers, config, part, state) for part in (DENOISER, AUTOENCODER)}
    found = {part: load for part, load in found.items() if part in there}
    found[CONNECTOR] = functools.partial(_connector, config, state)
    if BACKBONE in there:
        found |= parts_of(config, layout, functools.partial(_backbone, config, layout, state))
        found[QUERIES] = functools.partial(_queries, config, state)
    return found


def _of_diffusers(config: DreamLLMConfig, part: str, state: _State) -> "nn.Module":
    import torch

    tower = config_of(config, part)
    with torch.device("meta"):  # every tensor comes from the file
        module = public_class(tower.public).from_config(tower.to_public())
    return _filled(module, state.tower(part), state.path)


def _filled(module: "nn.Module", tensors: Mapping[str, "torch.Tensor"], path: Path) -> "nn.Module":
    own = module.state_dict()
    shapes = [(name, tensors[name].shape, own[name].shape) for name in own.keys() & tensors.keys()]
    require_same_tensors(path, own.keys() - tensors.keys(), tensors.keys() - own.keys(), shapes)
    module.load_state_dict(dict(tensors), assign=True)
    return module


def _backbone(config: DreamLLMConfig, layout: Layout, state: _State) -> "nn.Module":
    """The vision-language model's class; the library's own loader knows the names that it has had."""
    tensors = state.tower(BACKBONE)
    form = PublicForm("transformers", layout.torch_class, layout.types, beside=layout.beside)
    if layout.converted is not None:
        tensors = internvl.as_transformers(tensors)
    cls = public_class(form)
    settings = cls.config_class(**_whole_settings(config, layout))
    text = settings.get_text_config()
    text.vocab_size = next(x for name, x in tensors.items() if name.endswith("embed_tokens.weight")).shape[0]
    module, info = cls.from_pretrained(
        None,
        config=settings,
        state_dict=tensors,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        dtype="auto",
        attn_implementation="eager",
    )
    missing, unexpected, mismatched = (info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    require_same_tensors(state.path, set(missing) - {"lm_head.weight"}, unexpected, mismatched)
    if "lm_head.weight" in missing:
        module.lm_head.weight = module.get_input_embeddings().weight
    return module


def _whole_settings(config: DreamLLMConfig, layout: Layout) -> dict[str, Any]:
    """What the class of the whole model is made with."""
    language, vision, (kind,) = config.language_model, config.vision_encoder, layout.types
    text, see = language.to_public(), {**vision.to_public(), "model_type": vision.public.types[0]}
    tied = {"tie_word_embeddings": language.tie_word_embeddings}
    if kind == "qwen2_5_vl":
        rope = {"rope_type": "default", "rope_theta": language.rope_theta, "mrope_section": [*language.mrope_section]}
        return {"text_config": {**text, "rope_scaling": None, "rope_parameters": rope}, "vision_config": see, **tied}
    text["model_type"] = language.public.types[0]
    if kind == "llava_onevision":
        more = {"image_grid_pinpoints": [[vision.image_size] * 2], "vision_feature_layer": vision.select_layer}
    else:
        more = {"downsample_ratio": 1 / vision.downsample}
    return {"text_config": text, "vision_config": see, **tied, **more}


def _queries(config: DreamLLMConfig, state: _State) -> "nn.Module":
    """The one tensor that the comparison takes."""
    from torch import nn

    if state.program is openuni:
        found = state.tensors[openuni.META_QUERIES]
    else:
        rows = next(x for name, x in state.tower(BACKBONE).items() if name.endswith("embed_tokens.weight"))
        found = rows[config.language_model.vocab_size :]
    return nn.ParameterDict({QUERIES: found[None]})


def _connector(config: DreamLLMConfig, state: _State) -> "nn.Module":
    import torch

    make = _openuni_connector if state.program is openuni else _metaquery_connector
    with torch.device("meta"):
        module = make(config.connector, config.language_model.width, config.image_decoder.condition_width)
    own = {name.removeprefix("model."): x for name, x in state.others().items() if name != openuni.META_QUERIES}
    return _filled(module, own, state.path)


def _openuni_connector(chosen: TransformerConfig, width: int, out: int) -> "nn.Module":
    """SigLIP's layers, and the projectors where they stand."""
    import torch
    from torch import nn
    from torch.nn.functional import gelu, scaled_dot_product_attention

    inner_width = chosen.hidden_size or width
    heads, _ = chosen.heads(inner_width)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                setattr(self, name, nn.Linear(inner_width, inner_width))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
            q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
            return self.out_proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            inner = chosen.intermediate_size or 4 * inner_width
            self.fc1, self.fc2 = nn.Linear(inner_width, inner), nn.Linear(inner, inner_width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(gelu(self.fc1(x), approximate="tanh"))

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(inner_width, chosen.norm_eps) for _ in range(2))
            self.self_attn, self.mlp = Attention(), MLP()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.self_attn(self.layer_norm1(x))
            return x + self.mlp(self.layer_norm2(x))

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(chosen.num_hidden_layers))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    class Connector(nn.Module):
        def __init__(self):
            super().__init__()
            self.connector, self.placement = Encoder(), openuni.placement_of(chosen)
            ends = {"enc_proj": (width, out), "proj_enc": (width, inner_width)}
            if self.placement in ends:
                self.projector = nn.Linear(*ends[self.placement])
            else:
                self.projector = nn.ModuleList([nn.Linear(width, inner_width), nn.Linear(inner_width, out)])

        def forward(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
            if self.placement == "enc_proj":
                return {"sequence": self.projector(self.connector(hidden))}
            if self.placement == "proj_enc":
                return {"sequence": self.connector(self.projector(hidden))}
            before, behind = self.projector
            return {"sequence": behind(self.connector(before(hidden)))}

    return Connector()


def _metaquery_connector(chosen: TransformerConfig, width: int, out: int) -> "nn.Module":
    """Qwen2's layers without a causal mask, queries and keys normalised after they are rotated."""
    import torch
    from torch import nn
    from torch.nn.functional import normalize, scaled_dot_product_attention
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RotaryEmbedding, apply_rotary_pos_emb

    heads, _ = chosen.heads(width)
    settings = Qwen2Config(
        hidden_size=width,
        intermediate_size=chosen.intermediate_size or 4 * width,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        rope_parameters={"rope_type": "default", "rope_theta": chosen.rope_theta},
    )

    class HeadNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(heads, 1, chosen.head_dim))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return normalize(x, dim=-1) * self.gamma * chosen.head_dim**0.5

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
            self.o_proj = nn.Linear(width, width, bias=False)
            self.q_norm, self.k_norm = HeadNorm(), HeadNorm()

        def forward(self, x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
            q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
            q, k = apply_rotary_pos_emb(q, k, *turn)
            seen = scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
            return self.o_proj(seen.transpose(1, 2).flatten(2))

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(width, chosen.norm_eps) for _ in range(2))
            self.self_attn, self.mlp = Attention(), Qwen2MLP(settings)

        def forward(self, x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            x = x + self.self_attn(self.input_layernorm(x), turn)
            return x + self.mlp(self.post_attention_layernorm(x))

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(chosen.num_hidden_layers))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            places = torch.arange(x.shape[1])[None]
            turn = Qwen2RotaryEmbedding(settings)(x, places)
            for layer in self.layers:
                x = layer(x, turn)
            return x

    class Connector(nn.Module):
        def __init__(self):
            super().__init__()
            norm = nn.RMSNorm(out, 1e-5)
            layers = [Encoder(), nn.Linear(width, out), nn.GELU("tanh"), nn.Linear(out, out), norm]
            self.connector = nn.Sequential(*layers)

        def forward(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"sequence": self.connector(hidden)}

    return Connector()
