"""DreamLLM in JAX: one causal language model that reads and makes images inside a document."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Where each public name comes from. It is imported when it is first asked for: programs of launch/ import parts of this
# package where there is no JAX.
_WHERE = {
    "Image": "data.document",
    "Sampling": "generation.text",
    "SamplerConfig": "diffusion.samplers",
    "Text": "data.document",
    "generate_documents": "generation.documents",
    "generate_images": "generation.images",
    "generate_texts": "generation.texts",
    "load_document": "generation.documents",
    "load_model": "runs.load",
    "save_document": "generation.documents",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
