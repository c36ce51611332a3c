"""Which documents a run reads, and how."""

import dataclasses
from collections.abc import Mapping

from dreamllm_jax.data import stored
from dreamllm_jax.data.templates import NAMES
from dreamllm_jax.data.tokens import MODES, Dropped, Mode


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """How a corpus is used.

    Attributes:
      mode: joint, comprehension or creation.
      weight: its share of the documents, relative to the others'.
      epochs: instead of a weight, how often each of its documents is taken relative to the others': 2 for all but 1
        here means that this corpus is seen twice while each of the others is seen once.
      limit: use so many of its documents, the first ones; 0 for all.
      template: how conversations are written: vicuna_v1, llama_2, chatml, qwen2, qwen2_5, internvl3, llava_onevision,
        smollm2, or chat_template for the one that comes with the tokenizer.
      learn_dream_start: in conversations, learn the decision to paint too.
      see_first: where an image is both painted and read, read it first, so that it is painted from itself.
      drop_text, drop_images, drop_both: shares of its documents (pairs, edits, source and target images) whose image is
        painted without the text, with black images in place of those that are read, or both, for guidance to lead away
        from; no document is of two of the shares.
    """

    mode: Mode = "joint"
    weight: float = 1.0
    epochs: float = 0.0
    limit: int = 0
    template: str = "vicuna_v1"
    learn_dream_start: bool = False
    see_first: bool = False
    drop_text: float = 0.0
    drop_images: float = 0.0
    drop_both: float = 0.0

    def __post_init__(self):
        shares = self.drop_text, self.drop_images, self.drop_both
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(f"drop_text, drop_images and drop_both are disjoint shares of a corpus, got {shares}")
        if self.mode not in MODES:
            raise ValueError(f"unknown mode {self.mode!r}; known are {', '.join(MODES)}")
        if self.template not in NAMES:
            raise ValueError(f"unknown template {self.template!r}; known are {', '.join(NAMES)}")
        if not self.weight > 0:
            raise ValueError(f"the weight of a corpus must be positive, got {self.weight}")
        if self.epochs < 0 or self.limit < 0:
            raise ValueError(f"epochs and limit of a corpus must not be negative, got {self.epochs} and {self.limit}")
        if self.epochs and self.weight != 1:
            raise ValueError(f"a corpus has a weight ({self.weight}) or epochs ({self.epochs}), not both")

    @property
    def drops(self) -> bool:
        """Whether anything is dropped."""
        return bool(self.drop_text or self.drop_images or self.drop_both)

    def dropped(self, draw: float) -> Dropped:
        """What is dropped of the document with this draw, uniform in [0, 1)."""
        if draw < self.drop_text:
            return "text"
        if draw < self.drop_text + self.drop_both:
            return "both"
        return "images" if draw < self.drop_text + self.drop_both + self.drop_images else ""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on.

    Attributes:
      path: the data set's directory, as `python -m dreamllm_jax.data` leaves it; or what a training run is to prepare
        by itself: openmoji, photographs, scenes, or a folder of pictures with captions.
      pairs: how many captioned pictures to prepare then; 0 for all of a folder, 24 of openmoji and photographs, 8,000
        scenes.
      tokenizer: a SentencePiece model, a tokenizer.json, Qwen's .tiktoken or a directory; empty for the data set's own.
      corpora: which of its corpora, and how; empty for all of them but those that are held out.
      window: documents that wait to be packed into each row.
      workers: threads that tokenise, pack and decode ahead; 0 does it, and reads, in the training thread.
      readers: documents being read at once for a host, each by a thread that waits for the storage: as many as make up
        for its latency.
      flip: probability of mirroring the pictures of a document that only paints.
      shuffle: shuffle the documents anew in each epoch.
      pack: put several documents in a row.
      stored: what was computed beforehand (`python -m dreamllm_jax.data precompute`) and replaces pixels: moments (of
        images to paint), features (of images to see).
      stored_dtype: the type they were stored in, bfloat16 or float32.
      max_bad: the largest share of documents that may be left out before the run ends.
    """

    path: str
    pairs: int = 0
    tokenizer: str = ""
    corpora: Mapping[str, CorpusConfig] = dataclasses.field(default_factory=dict)
    window: int = 64
    workers: int = 4
    readers: int = 64
    flip: float = 0.0
    shuffle: bool = True
    pack: bool = True
    stored: tuple[str, ...] = ()
    stored_dtype: str = "bfloat16"
    max_bad: float = 0.1

    def __post_init__(self):
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        for name in ("workers", "pairs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.readers < 1:
            raise ValueError(f"readers must be at least 1, got {self.readers}")
        for name in ("flip", "max_bad"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is between 0 and 1, got {getattr(self, name)}")
        without = [name for name, corpus in self.corpora.items() if not corpus.epochs]
        if 0 < len(without) < len(self.corpora):
            raise ValueError(f"give epochs to all corpora or to none: {', '.join(without)} has none")
        if unknown := set(self.stored) - set(stored.NAMES):
            raise ValueError(f"stored may name {' and '.join(stored.NAMES)}, got {', '.join(sorted(unknown))}")
        if self.stored_dtype not in stored.DTYPES:
            raise ValueError(f"stored_dtype is {' or '.join(stored.DTYPES)}, got {self.stored_dtype!r}")
        if self.flip and "moments" in self.stored:
            raise ValueError("stored moments cannot be mirrored: set flip=0 or leave moments out of stored")
        black = [name for name, corpus in self.corpora.items() if corpus.drop_images or corpus.drop_both]
        if black and "features" in self.stored:
            raise ValueError(
                f"corpora.{black[0]} drops images, which are then black, but their features are stored: set its "
                "drop_images and drop_both to 0, or leave features out of stored"
            )
