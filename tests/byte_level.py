"""Directories of small byte-level tokenizers, as the authors of today's language models write theirs."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

TEXTS = ["a red square on a green field\n\nuser\nassistant\n", "def what(is_this):\n    return 'it is a bird'\n"] * 10
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# What they have for images, by whose they are.
IMAGES = {
    "qwen3": (),
    "qwen2_5_vl": ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>"),
    "internvl3": ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<img>", "</img>", "<IMG_CONTEXT>"),
    "llava_onevision": ("<image>", "<video>"),
}
BASE = 300


def save_tokenizer(directory: Path, whose: str = "qwen3", **settings) -> Qwen2Tokenizer:
    """Writes a tokenizer.json of transformers' class with `BASE` tokens and these on top, and what goes with it.

    Args:
      settings: of tokenizer_config.json.
    """
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=BASE, initial_alphabet=alphabet, show_progress=False)
    )
    directory.mkdir(parents=True, exist_ok=True)
    model.model.save(str(directory))
    files = [str(directory / name) for name in ("vocab.json", "merges.txt")]
    vocabulary, merges = models.BPE.read_file(*files)
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None, **settings}
    more = [token for token in (*CONTROL, *IMAGES[whose]) if token not in tokens.values()]
    theirs = Qwen2Tokenizer(vocabulary, merges, additional_special_tokens=more, **tokens)
    theirs.add_tokens(["<think>", "</think>"])  # which a text may mean
    theirs.save_pretrained(directory)
    return theirs
