"""A tiny model that paints of its own accord, for the tests of documents and of the chat page."""

import dataclasses

import numpy as np

from dreamllm_jax.data.tokenizer import train_tokenizer
from dreamllm_jax.model import DreamLLM
from tests.tiny import tiny_config, tiny_params

TOKENIZER = train_tokenizer(["a story of a red fox and a blue bird", "USER: ASSISTANT:"] * 20, 330)


def model_that_paints() -> tuple[DreamLLM, dict]:
    """Random weights, with which images are often asked for and documents sometimes end."""
    config = tiny_config()
    llama = dataclasses.replace(config.language_model, vocab_size=TOKENIZER.vocab_size, max_position_embeddings=512)
    config = dataclasses.replace(config, language_model=llama, special_tokens=TOKENIZER.special)
    params = tiny_params(config)
    head = np.array(params["language_model"]["lm_head"]["kernel"])
    ids, words = TOKENIZER.special, [TOKENIZER.fast.id_to_token(i) for i in range(TOKENIZER.vocab_size)]
    silent = [i for i, word in enumerate(words) if i >= ids.pad or word.startswith("<0x")]
    head[:, np.setdiff1d(silent, [ids.dream_start, ids.eos])] = 0
    head[:, ids.dream_start] *= 4
    head[:, ids.eos] *= 3
    params["language_model"]["lm_head"]["kernel"] = head
    return DreamLLM(config), params
