"""PyTorch's side of a comparison with a vision-language model: the parts of its public class."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from dreamllm_jax.data.vocabulary import SpecialTokens
from dreamllm_jax.interop.files import find_model, require_beside
from dreamllm_jax.interop.torch_modules import pretrained, public_class, require_same_tensors
from dreamllm_jax.interop.vision_language import LANGUAGE, PROJECTOR, STEMS, VISION, Layout, layout_of
from dreamllm_jax.model import DreamLLMConfig
from dreamllm_jax.towers.public import PublicForm

if TYPE_CHECKING:
    import torch
    from torch import nn


def common_tokens(config: DreamLLMConfig, settings: Mapping[str, Any]) -> int:
    """How many of the first tokens are the model's own on both sides: ours has new rows for its special tokens."""
    theirs = layout_of(settings).settings(LANGUAGE, settings).get("vocab_size", config.language_model.vocab_size)
    added = (index for name, index in dataclasses.asdict(config.special_tokens).items() if name not in ("bos", "eos"))
    return min(theirs, config.language_model.vocab_size, *added)


def cut(
    config: DreamLLMConfig, params: Callable[[str], Mapping[str, Any]], tokens: int
) -> tuple[DreamLLMConfig, Callable[[str], Mapping[str, Any]]]:
    """A model and the parameters of its parts, as of `verify.compare`, with so many tokens alone."""
    rows = config.language_model.vocab_size
    language = dataclasses.replace(config.language_model, vocab_size=tokens)

    def fewer(part: str) -> Mapping[str, Any]:
        found = params(part)
        return jax.tree.map_with_path(shortened, found) if part == LANGUAGE else found

    def shortened(path: tuple, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in ("embed_tokens/embedding", "lm_head/kernel"):
            return leaf[:tokens] if leaf.shape[0] == rows else leaf[..., :tokens]
        return leaf

    special = SpecialTokens.last_of(tokens)
    return dataclasses.replace(config, language_model=language, special_tokens=special), fewer


def stored_tensors(directory: Path) -> dict[str, "torch.Tensor"]:
    """All tensors of a directory, by their names in the files, as transformers reads these."""
    from transformers.modeling_utils import load_state_dict

    path, _ = find_model(directory, *STEMS)
    shards = sorted(set(require_beside(path).values())) if path.suffix == ".json" else [path.name]
    return {name: tensor for shard in shards for name, tensor in load_state_dict(directory / shard).items()}


def _whole(layout: Layout, directory: Path, settings: Mapping[str, Any]) -> "nn.Module":
    """The public class with the tensors of the directory; errors as of `torch_modules.pretrained`."""
    form = PublicForm("transformers", layout.torch_class, layout.types, beside=layout.beside)
    if layout.converted is None:
        return pretrained(form, directory)
    import torch

    settings, stored = layout.converted(settings, stored_tensors(directory))
    cls = public_class(form)
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in stored.values()))
    module = cls._from_config(cls.config_class(**settings), dtype=dtype, attn_implementation="eager")
    own = module.state_dict()
    shapes = [(name, stored[name].shape, own[name].shape) for name in own.keys() & stored.keys()]
    require_same_tensors(directory, own.keys() - stored.keys(), stored.keys() - own.keys(), shapes)
    module.load_state_dict(stored, assign=True)
    return module


def loaders(
    config: DreamLLMConfig, directory: Path, settings: Mapping[str, Any]
) -> dict[str, Callable[[], "nn.Module"]]:
    """Part -> what loads its torch module, out of the whole model; the language model has the first tokens alone, as
    many as ours. Errors as of `torch_modules.pretrained`."""
    layout = layout_of(settings)
    return parts_of(config, layout, functools.partial(_whole, layout, directory, settings))


def parts_of(
    config: DreamLLMConfig, layout: Layout, whole_model: Callable[[], "nn.Module"]
) -> dict[str, Callable[[], "nn.Module"]]:
    """What `loaders` gives, out of what loads the whole model."""
    import torch
    from torch import nn

    tokens = config.language_model.vocab_size

    class Projector(nn.Module):
        """The whole model without its towers, as which its own code makes of features what the other is given."""

        def __init__(self, whole: nn.Module):
            super().__init__()
            self.whole = whole

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return layout.project(self.whole, states)

    def language_model() -> nn.Module:
        whole = whole_model()
        with torch.device("meta"):  # for what it has of its own is replaced
            causal = public_class(config.language_model.public)(whole.config.get_text_config())
        causal.model, causal.lm_head = whole.get_submodule(layout.towers[LANGUAGE]), whole.lm_head
        for matrix in (causal.get_input_embeddings(), causal.lm_head):
            matrix.weight.data = matrix.weight.data[:tokens]
        causal.config.vocab_size = tokens
        return causal

    def vision_encoder() -> nn.Module:
        return whole_model().get_submodule(layout.towers[VISION])

    def visual_projector() -> nn.Module:
        whole = whole_model()
        for path in (*layout.towers.values(), "lm_head"):
            parent, _, name = path.rpartition(".")
            setattr(whole.get_submodule(parent), name, nn.Identity())
        return Projector(whole)

    return {LANGUAGE: language_model, VISION: vision_encoder, PROJECTOR: visual_projector}
