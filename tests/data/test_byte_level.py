"""Byte-level tokenizers: their own tokens stay, ours follow, no `<s>`, and images by their own marks."""

import dataclasses
import json

import pytest
from transformers import AutoTokenizer

from dreamllm_jax import convert
from dreamllm_jax.data.document import Document, Image, Text
from dreamllm_jax.data.tokenizer import load_tokenizer
from dreamllm_jax.data.tokens import encode_document
from dreamllm_jax.data.vocabulary import ADDED_TOKENS, OUR_MARKS, ImageMarks
from tests import byte_level
from tests.data.conftest import with_slots

WORDS = ["a red square", "漢字 é e\u0301 🙂\n\n  x = 12345\t", "", " \n", "<think>so</think>", "I'LL don't"]
MARKS = {
    "qwen3": OUR_MARKS,
    "qwen2_5_vl": ImageMarks("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
    "internvl3": ImageMarks("<img>", "<IMG_CONTEXT>", "</img>"),
    "llava_onevision": ImageMarks(None, "<image>", None),
}
A, B = Image(b"A"), Image(b"B")


@pytest.fixture(scope="module", params=MARKS)
def whose(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    return request.param, directory, byte_level.save_tokenizer(directory, request.param)


def test_their_own_tokens_stay_and_ours_follow(whose, tmp_path):
    name, directory, theirs = whose
    older = tmp_path / "older"  # as directories were before tokenizer.json
    older.mkdir()
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (older / file).write_text((directory / file).read_text())
    (older / "added_tokens.json").write_text(json.dumps(theirs.get_added_vocab()))
    load_tokenizer(directory).save(tmp_path / "saved")
    for place in (directory, older, tmp_path / "saved"):
        ours = load_tokenizer(place)
        for token, index in theirs.get_vocab().items():
            assert ours.fast.token_to_id(token) == index
        appended = [token for token in ADDED_TOKENS if ours.fast.token_to_id(token) not in (None, *range(len(theirs)))]
        assert [ours.fast.token_to_id(token) for token in appended] == [*range(len(theirs), ours.vocab_size)]
        assert ours.special.bos is None and ours.special.eos == theirs.eos_token_id and ours.marks == MARKS[name]
        assert [getattr(ours.special, field) for field in ("im_start", "im_patch", "im_end")] == [
            mark and ours.fast.token_to_id(mark) for mark in MARKS[name]
        ]
        assert ours.new_tokens == (() if place == tmp_path / "saved" else tuple(range(len(theirs), ours.vocab_size)))
        for text in WORDS:
            assert ours.encode_text(text) == ours.encode_text(text, prefix=False) == theirs.encode(text)
            assert ours.decode(theirs.encode(text)) == text.replace("e\u0301", "é")
        for text in (*byte_level.CONTROL, *MARKS[name].tokens, "x<|im_end|>"):
            assert not {*ours.encode_text(text)} & {*dataclasses.astuple(ours.special)}
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded.bos_token is None and loaded.get_vocab() == ours.fast.get_vocab()
    assert [loaded.encode(text) for text in WORDS] == [theirs.encode(text) for text in WORDS]


def test_how_images_are_marked_is_a_setting(tmp_path):
    byte_level.save_tokenizer(tmp_path, "internvl3")
    file = tmp_path / "tokenizer_config.json"
    told = json.loads(file.read_text())
    ours = load_tokenizer(tmp_path, OUR_MARKS)
    assert ours.marks == OUR_MARKS and ours.new_tokens == tuple(range(311, 319)) and ours.special.im_start == 314
    ours.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").special == ours.special
    file.write_text(json.dumps(told | {"image_marks": ["<|vision_start|>", "<|image_pad|>", None]}))
    other = load_tokenizer(tmp_path).special
    assert (other.im_start, other.im_patch, other.im_end, other.pad) == (303, 305, None, 311)
    for marks, message in (
        ([None, "<picture>", None], "image_marks <picture>: the tokenizer has no such token"),
        (["<img>", "<img>", None], "image_marks must differ from each other, got <img>, <img>"),
        ("<img>", "image_marks are the tokens before, at and after an image's patches, got '<img>'"),
        ([None, None, None], "image_marks are the tokens before, at and after"),
        (3, "image_marks are the tokens before, at and after"),
    ):
        file.write_text(json.dumps(told | {"image_marks": marks}))
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["ours", "<img>,<IMG_CONTEXT>,</img>", ",<image>,", "<image>", "<img>,,</img>"])
def test_the_flag_for_it(text):
    known = {"ours": OUR_MARKS} | {",".join(mark or "" for mark in marks): marks for marks in MARKS.values()}
    arguments = ["import", "--to=x", f"--image-marks={text}"]
    if text in known:
        assert convert.parser().parse_args(arguments).image_marks == known[text]
    else:
        with pytest.raises(SystemExit):
            convert.parser().parse_args(arguments)


def test_documents_begin_without_a_token(whose, shape):
    """What stands first is predicted from nothing and not learned; an image has its marks, or none."""
    ours, shape = load_tokenizer(whose[1]), with_slots(shape, see=2, dream=2)
    ids, text = ours.special, ours.encode_text("a red square")
    see = [*filter(None, [ids.im_start]), *[ids.im_patch] * 4, *filter(None, [ids.im_end])]
    dream, first = [ids.dream_start, *[ids.im_patch] * 3, ids.dream_end], int(ids.im_start is not None)
    pair, no_text = Document("pair", (Text("a red square"), A)), Document("pair", (Text(""), A))
    story = Document("interleaved", (A, Text("a red square")))
    for document, mode, tokens, weights, places in (
        (Document("text", (Text("a red square"),)), "joint", text, [0] + [1] * (len(text) - 1), ([], [])),
        (pair, "comprehension", see + text, [0] * len(see) + [1] * len(text), ([first], [])),
        (pair, "creation", text + dream, [0] * len(text + dream), ([], [len(text) + 1])),
        (no_text, "creation", dream, [0] * len(dream), ([], [1])),
        (story, "joint", dream + see + text, [0] * len(dream + see) + [1] * len(text), ([5 + first], [1])),
    ):
        encoded = encode_document(document, ours, shape, mode)
        assert encoded.tokens.tolist() == [*tokens, ids.eos]
        assert encoded.loss_weights.tolist() == [*weights, float(mode != "creation")]
        assert tuple([placed.at for placed in images] for images in (encoded.see, encoded.dream)) == places
    assert list(ids.null_document(3)) == [*dream, ids.eos] and ids.null_slot == 1
    tight = dataclasses.replace(shape, length=len(see) + len(dream) + 1)
    assert len(encode_document(story, ours, tight).tokens) == tight.length, "marks that are not there take no room"


def test_files_that_do_not_say_how_text_is_split_are_refused(tmp_path):
    byte_level.save_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "RobertaTokenizer"}))
    with pytest.raises(ValueError, match="do not say how text is split, and neither does its class 'RobertaTokenizer'"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="the tokenizer has no eos_token '</s>'"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(ValueError, match=r"vocab\.json and merges\.txt do not fit each other"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"has a vocab\.json without merges\.txt"):
        load_tokenizer(tmp_path)
