"""DreamLLM in JAX: one causal language model that reads and makes images inside a document."""

__version__ = "0.1.0"
