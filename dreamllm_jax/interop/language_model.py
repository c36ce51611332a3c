"""A language model in Hugging Face's layout: `config.json` and the tensors of a causal language model."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamllm_jax.common import recognise
from dreamllm_jax.data.vocabulary import SpecialTokens
from dreamllm_jax.interop import files
from dreamllm_jax.interop.files import Tensor
from dreamllm_jax.interop.gguf import open_gguf
from dreamllm_jax.interop.source import Part, Stored
from dreamllm_jax.interop.vision_language import LANGUAGE, open_part, settings_of
from dreamllm_jax.model import DreamLLMConfig
from dreamllm_jax.towers import registry
from dreamllm_jax.towers.public import reader
from dreamllm_jax.towers.registry import LanguageModelConfig

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
_BUFFER = "rotary_emb.inv_freq"


def open_language_model(path: Path, stored: Stored | None = None) -> Part:
    """A directory of Hugging Face's layout, of a language model or of one that sees, or a `.gguf` file.

    Args:
      stored: as of `vision_language.open_part`.

    Raises:
      FileNotFoundError, ValueError: naming the file, setting or tensor that is missing or does not fit.
    """
    if path.suffix == ".gguf":
        return dataclasses.replace(open_gguf(path), where=path)
    recognise.require(path, "config.json")
    recognise.require_no_adapter(path)
    config = files.read_config(path / "config.json", _language_model_of)
    found = open_part(path, LANGUAGE, config.public.stems, stored)
    return found.complete(language_model_part(config, found.tensors, stored.where if stored else path))


def _language_model_of(settings: Mapping[str, Any]) -> LanguageModelConfig:
    settings, _ = settings_of(LANGUAGE, settings)
    return reader(registry.LANGUAGE_MODELS, settings).from_public(settings)


def language_model_part(config: LanguageModelConfig, tensors: Mapping[str, Tensor], where: Path) -> Part:
    """The tensors of a causal language model as our part; rotary frequencies, which are computed, are only checked.

    Raises:
      ValueError: the frequencies are those of other heads or another base; two output matrices that should be tied.
    """
    buffers = {name: tensor for name, tensor in tensors.items() if name.endswith(_BUFFER)}
    for name, tensor in buffers.items():
        want = (config.head_dim // 2,)
        if tensor.shape != want:
            raise ValueError(
                f"{where}: {name} has shape {tensor.shape}, expected {want} for num_attention_heads="
                f"{config.num_attention_heads}: config.json is of another model"
            )
        got = tensor.read().astype(np.float32)
        if config.rope_scaling is None and not np.allclose(got, config.rope_frequencies(1), rtol=0.02):
            raise ValueError(f"{where}: {name} does not belong to rope_theta={config.rope_theta} of config.json")
    part = Part.of(config, tensors, where)
    if not (config.tie_word_embeddings and HEAD in part.tensors):
        return part
    rest = dict(part.tensors)
    head = rest.pop(HEAD)
    if EMBEDDING in rest and not np.array_equal(head.read(), rest[EMBEDDING].read()):
        raise ValueError(f"{where}: config.json says tie_word_embeddings, but lm_head.weight is not the embedding")
    return dataclasses.replace(part, tensors=rest, left_out=(*part.left_out, HEAD))


def grow(part: Part, vocab_size: int, new_tokens: Sequence[int], init: str, seed: int) -> Part:
    """Makes room for a larger vocabulary, and initialises the rows of `new_tokens` in embedding and output matrix.

    Args:
      part: as from `open_language_model`.
      vocab_size: ids of the tokenizer: rows wanted; where there are more, as in a vocabulary padded to a multiple, they
        stay.
      new_tokens: ids whose rows are new (also if the matrix had them, unused, before).
      init: "normal" (zero mean, the configuration's `initializer_range`) or "mean" (of all other tokens' rows).

    Raises:
      ValueError: a matrix is not of the configuration's vocabulary.
    """
    config = part.config
    old, known, vocab_size = config.vocab_size, vocab_size, max(vocab_size, config.vocab_size)
    new = np.array(sorted({*new_tokens, *range(old, vocab_size)}), int)
    kept = np.setdiff1d(np.arange(min(old, known)), new)

    def grown(name: str, tensor: Tensor) -> Tensor:
        if tensor.shape != (old, config.hidden_size):
            raise ValueError(
                f"{name} is of shape {tensor.shape}, but by its config.json the model has vocab_size={old} and "
                f"hidden_size={config.hidden_size}: correct config.json"
            )

        def read() -> np.ndarray:
            rows = np.zeros((vocab_size, config.hidden_size), tensor.dtype)
            rows[:old] = tensor.read()
            if init == "mean":
                rows[new] = rows[kept].mean(axis=0, dtype=np.float32)
            else:
                rng = np.random.default_rng([seed, name == HEAD])
                rows[new] = rng.normal(0, config.initializer_range, (len(new), config.hidden_size))
            return rows

        return dataclasses.replace(tensor, shape=(vocab_size, config.hidden_size), read=read)

    tensors = {name: grown(name, t) if name in (EMBEDDING, HEAD) else t for name, t in part.tensors.items()}
    return dataclasses.replace(part, config=dataclasses.replace(config, vocab_size=vocab_size), tensors=tensors)


def hf_settings(config: LanguageModelConfig, special: SpecialTokens, dtype: str) -> dict[str, Any]:
    """The settings of a `config.json`, understood by transformers 4 and 5 alike."""
    return {
        **config.to_public(),
        "bos_token_id": special.bos,
        "eos_token_id": special.eos,
        "pad_token_id": special.pad,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def hf_tensors(config: LanguageModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our part's tensors under the names of its public class."""
    return {config.public.theirs(name): tensor for name, tensor in tensors.items()}


def write_language_model(
    directory: Path, config: DreamLLMConfig, tensors: Mapping[str, Mapping[str, np.ndarray]], max_shard_size: int
) -> None:
    """Writes a directory that `from_pretrained` of the model's public class loads.

    Args:
      tensors: part of the parameter tree -> torch name -> array; `language_model` at least.
    """
    tower, found = config.language_model, tensors["language_model"]
    form = tower.public
    settings = hf_settings(tower, config.special_tokens, str(found[EMBEDDING].dtype))
    settings = {"architectures": [form.torch_class], "model_type": form.types[0], **settings}
    write_hf(directory, settings, hf_tensors(tower, found), max_shard_size)


def write_hf(
    directory: Path, settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray], max_shard_size: int
) -> None:
    """Writes `config.json`, `generation_config.json` (where a text begins and ends) and the tensors."""
    files.write_json(directory / "config.json", settings)
    ids = {name: settings[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files.write_json(directory / "generation_config.json", ids)
    files.write_safetensors(directory, "model", tensors, max_shard_size)
