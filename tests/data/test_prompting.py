"""How a model is asked to paint, and what is left out of that for guidance."""

import collections
import dataclasses
import io
import json

import jax
import numpy as np
import PIL.Image
import pytest

from dreamllm_jax.data import images
from dreamllm_jax.data.document import Document, Image, Text
from dreamllm_jax.data.loader import Loader
from dreamllm_jax.data.mixture import Mixture
from dreamllm_jax.data.prompting import PUBLISHED, Prompting
from dreamllm_jax.data.settings import CorpusConfig, DataConfig
from dreamllm_jax.data.templates import VICUNA_SYSTEM
from dreamllm_jax.data.tokenizer import load_tokenizer
from dreamllm_jax.data.tokens import encode_asked, encode_document
from tests import byte_level
from tests.data.conftest import CROPS, png, row_shape, write

SEEN = Image(png((9, 90, 200), (12, 30)))
PAIR = Document("pair", (Image(png((1, 2, 3))), Text(" a red square\n")))
EDIT = Document("edit", (SEEN, SEEN, Text("it is a bird"), Image(png((200, 0, 0)))))
MIRROR = Document("image_image", (SEEN, Image(png((200, 0, 0)))))
SHAPE = row_shape(500, 2, 2)
LLAVA = dataclasses.replace(PUBLISHED["metaquery"], template="llava_onevision")
SYSTEM = PUBLISHED["metaquery"].system
# Whose words, which tokenizer's images; what a pair, the same without its text, and an edit become before the picture.
WORDS = {
    "openuni": (
        *(PUBLISHED["openuni"], "internvl3"),
        "<|im_start|>user\nGenerate an image: a red square<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nGenerate an image.<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\n@@\nit is a bird<|im_end|>\n<|im_start|>assistant\n",
    ),
    "metaquery": (
        *(PUBLISHED["metaquery"], "qwen2_5_vl"),
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\na red square<|im_end|>\n<|im_start|>assistant\n\n",
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n\n",
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n@@it is a bird<|im_end|>\n"
        "<|im_start|>assistant\n\n",
    ),
    "metaquery over llava": (
        *(LLAVA, "llava_onevision"),
        f"<|im_start|>system \n{SYSTEM}<|im_end|><|im_start|>user \na red square<|im_end|><|im_start|>assistant\n\n",
        f"<|im_start|>system \n{SYSTEM}<|im_end|><|im_start|>user \n<|im_end|><|im_start|>assistant\n\n",
        f"<|im_start|>system \n{SYSTEM}<|im_end|><|im_start|>user @@\nit is a bird<|im_end|><|im_start|>assistant\n\n",
    ),
    "unilip": (
        *(PUBLISHED["unilip"], "internvl3"),
        "<|im_start|>user\nGenerate an image: a red square<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nGenerate an image.<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nEdit the image: it is a bird\n@@<|im_end|>\n<|im_start|>assistant\n",
    ),
}


@pytest.mark.parametrize("case", WORDS)
def test_published_words(case, tmp_path):
    """As transformers encodes them as one text; where a picture is read there is an @."""
    prompting, whose, *want = WORDS[case]
    theirs = byte_level.save_tokenizer(tmp_path, whose)
    ours = load_tokenizer(tmp_path)
    seen = "".join((mark * 4 if mark == ours.marks.patch else mark) for mark in ours.marks.tokens)
    end = ours.fast.token_to_id("<|im_end|>")
    for document, drop, text in ((PAIR, "", want[0]), (PAIR, "text", want[1]), (EDIT, "", want[2])):
        encoded = encode_document(document, ours, SHAPE, "creation", prompting=prompting, drop=drop)
        before = theirs(text.replace("@", seen))["input_ids"]
        assert encoded.tokens.tolist() == [*before, *ours.special.painted(3), end]
        assert encoded.dream[0].at == len(before) + 1 and encoded.dream[0].image == document.images[-1]
        assert not encoded.loss_weights.any() and encoded.learns
        assert [placed.image.data for placed in encoded.see] == [one.data for one in document.images[:-1]]
        asked = document.texts[0].text if not drop else None
        alone = encode_asked(asked, document.images[:-1], ours, SHAPE, prompting)
        assert alone.tokens.tolist() == before and [one.at for one in alone.see] == [one.at for one in encoded.see]


def test_without_words_of_its_own_and_in_plain_turns(text_tokenizer):
    special, text = text_tokenizer.special, text_tokenizer.encode_text
    see, dream = special.seen(4), special.painted(3)
    tokens = [special.bos, *see, *see, *text("it is a bird"), *dream, special.eos]
    assert encode_document(EDIT, text_tokenizer, SHAPE).tokens.tolist() == tokens
    blind = encode_document(EDIT, text_tokenizer, SHAPE, drop="both")
    assert blind.tokens.tolist() == [special.bos, *see, *see, *dream, special.eos]
    null = encode_document(PAIR, text_tokenizer, SHAPE, "creation", drop="text")
    assert null.tokens.tolist() == list(special.null_document(3))
    prompting = Prompting("vicuna_v1", edit="{image}\n{text}!", edit_null="Of {image}", answer=" Here:")
    opening = f"{VICUNA_SYSTEM} USER: "
    for document, before, after in ((EDIT, (), "\nit is a bird! ASSISTANT:"), (MIRROR, "Of ", " ASSISTANT:")):
        tokens = [special.bos, *text(opening + (before or "")), *see * len(document.images[:-1])]
        tokens += [*text_tokenizer.encode_text(after, prefix=text_tokenizer.legacy)]
        tokens += [*text_tokenizer.encode_text(" Here:", prefix=False), *dream, special.eos]
        assert encode_document(document, text_tokenizer, SHAPE, prompting=prompting).tokens.tolist() == tokens


def test_what_is_too_long_is_cut_in_its_text(tmp_path):
    byte_level.save_tokenizer(tmp_path, "internvl3")
    ours, prompting = load_tokenizer(tmp_path), PUBLISHED["openuni"]
    long = Document("edit", (SEEN, Text("a red sqüare 图 " * 60), SEEN))

    def words(encoded):
        first = encoded.see[0].at + 5  # </img>, the new line
        return ours.decode(encoded.tokens[first + 1 : encoded.dream[0].at - 1].tolist()).split("user")[-1]

    whole = encode_document(long, ours, row_shape(2000, 1, 1), prompting=dataclasses.replace(prompting, max_tokens=0))
    cut = encode_document(long, ours, row_shape(2000, 1, 1), prompting=prompting)
    count = len(ours.encode_text(long.texts[0].text.strip()))
    assert 0 <= len(whole.tokens) - (count - 128) - len(cut.tokens) <= 2  # whole characters
    for length in range(60, 200):
        fitted = encode_document(long, ours, row_shape(length, 1, 1), prompting=prompting)
        assert 0 <= length - len(fitted.tokens) <= 2 or len(fitted.tokens) == len(cut.tokens)
        assert fitted.tokens[-9:].tolist() == cut.tokens[-9:].tolist()
        assert words(fitted)[:10] == words(cut)[:10]
    nothing = dataclasses.replace(long, segments=(SEEN, Text(""), SEEN))
    least = len(encode_document(nothing, ours, SHAPE, prompting=prompting).tokens)
    assert len(encode_document(long, ours, row_shape(least, 1, 1), prompting=prompting).tokens) == least
    with pytest.raises(ValueError, match=r"what asks for an image takes \d+ tokens, there is room for"):
        encode_document(long, ours, row_shape(least - 1, 1, 1), prompting=prompting)
    with pytest.raises(ValueError, match="no room for 2 images to read and 1 to paint"):
        encode_document(EDIT, ours, row_shape(500, 1, 1), prompting=prompting)


def test_dropped_images_are_black_ones(text_tokenizer):
    for drop in ("images", "both"):
        encoded = encode_document(EDIT, text_tokenizer, SHAPE, drop=drop)
        for placed in encoded.see:
            assert images.size_of(placed.image.data) == (12, 30)
            assert not np.asarray(PIL.Image.open(io.BytesIO(placed.image.data))).any()
        assert encoded.dream[0].image == EDIT.images[-1]
    read = encode_document(PAIR, text_tokenizer, SHAPE, "comprehension", drop="both")
    assert read.see[0].image == PAIR.images[0] and read.learns  # where nothing is painted nothing is dropped
    alone = Document("text", (Text("a"),))
    kept, whole = (encode_document(alone, text_tokenizer, SHAPE, drop=drop) for drop in ("text", ""))
    np.testing.assert_array_equal(kept.tokens, whole.tokens)


def test_shares_are_disjoint_and_functions_of_the_record(text_tokenizer, tmp_path):
    use = CorpusConfig(drop_text=0.2, drop_images=0.3, drop_both=0.1)
    path = write(tmp_path / "set", text_tokenizer, edits=[EDIT, MIRROR])
    config = DataConfig(path=str(path), corpora={"edits": use}, workers=0, window=4)

    def loader(**settings):
        with_settings = dataclasses.replace(config, **settings)
        shape = row_shape(60, 4, 2)
        prompting = Prompting("vicuna_v1", system="s", edit_null="{image}", max_tokens=9)
        return Loader(with_settings, shape, text_tokenizer, *CROPS, rows_per_step=4, seed=3, prompting=prompting)

    mixture = Mixture({"edits": [EDIT, MIRROR]}, {"edits": use}, streams=4, seed=3, shuffle=True)
    found = collections.Counter(use.dropped(mixture.draws(record)[2]) for record in range(4000))
    for drop, share in (("text", 0.2), ("images", 0.3), ("both", 0.1), ("", 0.4)):
        assert abs(found[drop] / 4000 - share) < 0.03
    first, states, batches = loader(), [], []
    for _ in range(6):
        states.append(json.dumps(first.get_state()))
        batches.append(next(first))
        for row, records in enumerate(first.records):
            for segment, record in enumerate(records, 1):
                encoded = first._item(record, None, *first._read(record)).encoded
                used = batches[-1].segment_ids[row] == segment
                np.testing.assert_array_equal(batches[-1].tokens[row, used], encoded.tokens)
                black = use.dropped(mixture.draws(record)[2]) in ("images", "both")
                at = np.isin(batches[-1].see[0].at[row], np.flatnonzero(used))
                assert (batches[-1].see[0].images[row, at].max() == 0) == black
    again = loader(workers=2)
    again.set_state(json.loads(states[3]))
    for batch in batches[3:]:
        jax.tree.map(np.testing.assert_array_equal, batch, next(again))
    again.close()
    other = Loader(config, row_shape(60, 4, 2), text_tokenizer, *CROPS, rows_per_step=4, seed=3)
    with pytest.raises(ValueError, match="the saved data state has prompting="):
        other.set_state(json.loads(states[3]))


def test_what_cannot_be_is_refused():
    for settings, message in (
        ({"paint": "an image"}, r"prompting\.paint must have \{text\}, once"),
        ({"edit": "{image}{image}{text}"}, r"prompting\.edit must have \{text\} and \{image\}, once"),
        ({"paint_null": "{text}"}, r"prompting\.paint_null must have neither"),
        ({"max_tokens": -1}, "must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            Prompting("chatml", **settings)
    with pytest.raises(ValueError, match=r"prompting\.template must be one of vicuna_v1.*got 'qwen'"):
        Prompting("qwen")
    with pytest.raises(ValueError, match="disjoint shares of a corpus"):
        CorpusConfig(drop_text=0.6, drop_both=0.5)
    with pytest.raises(ValueError, match=r"corpora\.edits drops images, .* features are stored"):
        DataConfig("x", corpora={"edits": CorpusConfig(drop_images=0.1)}, stored=("features",))
    for segments in ((SEEN, Text("a")), (Text("a"), SEEN), (SEEN, SEEN, Text("a")), (SEEN, Text("a"), Text("b"), SEEN)):
        with pytest.raises(ValueError, match="an edit has images to read, one text and last the image to paint, got"):
            Document("edit", segments)
