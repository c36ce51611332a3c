"""The model card of an export: what it is, how it is loaded, and how it compares with PyTorch."""

import json

from dreamllm_jax import __version__
from dreamllm_jax.checkpoints.saved import CONFIG_FILE, MODEL, SavedModel
from dreamllm_jax.interop import verify

_LOADING = {
    "dreamllm": """from transformers import LlamaTokenizer
from omni.models.dreamllm.modeling_dreamllm import DreamLLMForCausalMLM

tokenizer = LlamaTokenizer.from_pretrained(path, padding_side="right")
model = DreamLLMForCausalMLM.from_pretrained(path, tokenizer=tokenizer, reset_plugin_model_name_or_path=True)""",
    "hf": """from transformers import AutoTokenizer, LlamaForCausalLM

tokenizer = AutoTokenizer.from_pretrained(path)
model = LlamaForCausalLM.from_pretrained(path)""",
    "diffusers": """from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPVisionModel

unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet")
vae = AutoencoderKL.from_pretrained(path, subfolder="vae")
scheduler = DDIMScheduler.from_pretrained(path, subfolder="scheduler")
image_encoder = CLIPVisionModel.from_pretrained(path + "/clip")""",
}
_WHAT = {
    "dreamllm": "A DreamLLM in the format of the [original program](https://github.com/RunpeiDong/DreamLLM)",
    "hf": "The language model of a DreamLLM",
    "diffusers": "The diffusion model and the image encoder of a DreamLLM",
}


def model_card(saved: SavedModel, kind: str, differences: list[verify.Difference] | None) -> str:
    """The text of an export's README.md.

    Args:
      kind: its format, "dreamllm", "hf" or "diffusers".
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
{_LOADING[kind]}
```

## Checked

{checked}

## Configuration

```json
{json.dumps(settings, indent=2)}
```
"""
