"""The model card of an export: what it is, how it is loaded, and how it compares with PyTorch."""

import json

from dreamllm_jax import __version__
from dreamllm_jax.checkpoints.saved import CONFIG_FILE, MODEL, SavedModel
from dreamllm_jax.interop import verify
from dreamllm_jax.interop.image_decoder import public_parts
from dreamllm_jax.interop.openuni import FILE, placement_of
from dreamllm_jax.model import DreamLLMConfig

_ORIGINAL = """from transformers import LlamaTokenizer
from omni.models.dreamllm.modeling_dreamllm import DreamLLMForCausalMLM

tokenizer = LlamaTokenizer.from_pretrained(path, padding_side="right")
model = DreamLLMForCausalMLM.from_pretrained(path, tokenizer=tokenizer, reset_plugin_model_name_or_path=True)"""
_UNILIP = """from transformers import AutoTokenizer
from unilip.model.language_model.unilip_internvl import UniLIP_InternVLForCausalLM

tokenizer = AutoTokenizer.from_pretrained(path)
model = UniLIP_InternVLForCausalLM.from_pretrained(path)  # config.json names directories that it reads, too"""
_METAQUERY = """from models.metaquery import MetaQuery

model = MetaQuery.from_pretrained(path)  # which takes the towers' shapes from where config.json names them"""
_WHAT = {
    "dreamllm": "A DreamLLM in the format of the [original program](https://github.com/RunpeiDong/DreamLLM)",
    "openuni": "A model in the format of [OpenUni's program](https://github.com/wusize/OpenUni)",
    "metaquery": "A model in the format of [MetaQuery's program](https://github.com/facebookresearch/metaquery)",
    "unilip": "A DreamLLM in the format of [UniLIP](https://github.com/nnnth/UniLIP)'s program",
    "hf": "The language model of a DreamLLM",
    "diffusers": "The image decoder and the vision encoder of a DreamLLM",
}


def model_card(saved: SavedModel, kind: str, differences: list[verify.Difference] | None) -> str:
    """The text of an export's README.md.

    Args:
      kind: its format, of `conversion.FORMATS`.
      differences: from PyTorch, as `verify.compare` found them; None if they were not looked for.
    """
    run = saved.directory / CONFIG_FILE
    trained = f"trained for {saved.step:,} steps" if saved.step else "as imported, not trained further"
    checked = (
        "Not compared with PyTorch when it was written; `python -m dreamllm_jax.convert verify` does."
        if differences is None
        else f"Differences between JAX and PyTorch on the same inputs:\n\n```\n{verify.table(differences)}\n```"
    )
    settings = json.loads((run if run.exists() else saved.directory / MODEL).read_text())
    return f"""---
library_name: {"diffusers" if kind == "diffusers" else "transformers"}
tags: [dreamllm]
---

# DreamLLM

{_WHAT[kind]} ([arXiv 2309.11499](https://arxiv.org/abs/2309.11499)), {trained}, written by dreamllm_jax {__version__}.

```python
{_loading(saved.config, kind)}
```

## Checked

{checked}

## Configuration

```json
{json.dumps(settings, indent=2)}
```
"""


def _loading(config: DreamLLMConfig, kind: str) -> str:
    """How an export is loaded."""
    if kind == "dreamllm":
        return _ORIGINAL
    if kind == "metaquery":
        return _METAQUERY
    if kind == "openuni":
        return _openuni(config)
    if kind == "unilip":
        return _UNILIP
    if kind == "hf":
        cls = config.language_model.public.torch_class
        return f"""from transformers import AutoTokenizer, {cls}

tokenizer = AutoTokenizer.from_pretrained(path)
model = {cls}.from_pretrained(path)"""
    decoder, vision = config.image_decoder, config.vision_encoder.public
    sampler = decoder.to_public_scheduler().get("_class_name", decoder.public_sampler)
    forms = [tower.public for tower in public_parts(decoder).values()]
    classes = sorted([sampler, *(form.torch_class for form in forms)])
    loads = [f'{form.folder} = {form.torch_class}.from_pretrained(path, subfolder="{form.folder}")' for form in forms]
    return "\n".join(
        [
            f"from diffusers import {', '.join(classes)}",
            f"from transformers import {vision.torch_class}\n",
            *loads,
            f'scheduler = {sampler}.from_pretrained(path, subfolder="scheduler")',
            f'vision_encoder = {vision.torch_class}.from_pretrained(path + "/{vision.folder}")',
        ]
    )


def _openuni(config: DreamLLMConfig) -> str:
    """How OpenUni's program loads its file: the settings are those of a configuration of its `configs/models`."""
    connector = config.connector
    width = connector.hidden_size or config.language_model.width
    settings = {
        "hidden_size": width,
        "intermediate_size": connector.intermediate_size or 4 * width,
        "num_hidden_layers": connector.num_hidden_layers,
        "num_attention_heads": connector.heads(width)[0],
        "layer_norm_eps": connector.norm_eps,
    }
    return f"""# with connector={settings},
# num_queries={config.num_queries}, proj_type={placement_of(connector)!r}
model = BUILDER.build(config.model)
model.load_state_dict(guess_load_checkpoint("{FILE}"))"""
