"""A very small model that reads words, in memory and at rest."""

import dataclasses

from etils import epath
from flax.traverse_util import flatten_dict

from dreamllm_jax.checkpoints.saved import write_description, write_params
from dreamllm_jax.data.tokenizer import train_tokenizer
from tests.tiny import tiny_config, tiny_params

SENTENCE = "a red fox sat on the blue barn while ten small birds sang about rain and snow"
WORDS = SENTENCE.split()
TOKENIZER = train_tokenizer([SENTENCE] * 4, 320)
CONFIG = tiny_config(
    special_tokens=TOKENIZER.special,
    language_model=dataclasses.replace(tiny_config().language_model, vocab_size=TOKENIZER.vocab_size),
)
PARAMS = tiny_params(CONFIG)


def save(directory: epath.PathLike, longest: int = 512) -> str:
    """Writes the model, which then reads so many tokens, as an imported one; its name."""
    llama = dataclasses.replace(CONFIG.language_model, max_position_embeddings=longest)
    write_description(epath.Path(directory), dataclasses.replace(CONFIG, language_model=llama), TOKENIZER)
    write_params(epath.Path(directory), flatten_dict(PARAMS, sep="/"))
    return str(directory)
