import dataclasses

import numpy as np
import pytest

from dreamllm_jax.data.document import Document, Image, Text
from dreamllm_jax.data.tokens import VICUNA_SYSTEM, encode_document

A, B = Image(b"A"), Image(b"B")


def user(segment):
    return dataclasses.replace(segment, role="user")


def assistant(segment):
    return dataclasses.replace(segment, role="assistant")


PAIR = Document("pair", (Text("a red square"), A))
STORY = Document("interleaved", (Text(" first. "), A, B, Text("second.")))
TALE = Document("instruct_interleaved", (Text("Tell.", "user"), *map(assistant, STORY.segments)))
CHAT = Document(
    "conversation",
    (
        user(A),
        Text("\nWhat?", "user"),
        Text("a red square.", "assistant"),
        Text("Paint it.", "user"),
        Text("Here: ", "assistant"),
        assistant(B),
    ),
)

# What each document becomes. A text in capitals is a part of the sequence, "DREAM!" learns its start, a pair is a text
# and whether it is learned.
ROWS = {
    "pair read": (PAIR, "comprehension", 0.0, ["BOS", "SEE", ("a red square", True), ("EOS", True)]),
    "pair painted": (PAIR, "creation", 0.9, ["BOS", ("a red square", False), "DREAM", ("EOS", False)]),
    "pair drawn low": (PAIR, "joint", 0.4999, ["BOS", ("a red square", False), "DREAM", ("EOS", False)]),
    "pair drawn high": (PAIR, "joint", 0.5, ["BOS", "SEE", ("a red square", True), ("EOS", True)]),
    "image to image": (Document("image_image", (A, B)), "joint", 0.0, ["BOS", "SEE", "DREAM", ("EOS", False)]),
    "text": (Document("text", (Text("a"), Text("b"))), "joint", 0.0, ["BOS", ("a", True), ("b", True), ("EOS", True)]),
    "interleaved": (
        STORY,
        "joint",
        0.0,
        ["BOS", ("first.", True), "DREAM!", "SEE", "DREAM!", "SEE", ("second.", True), ("EOS", True)],
    ),
    "interleaved read": (
        STORY,
        "comprehension",
        0.0,
        ["BOS", ("first.", True), "SEE", "SEE", ("second.", True), ("EOS", True)],
    ),
    "interleaved painted": (
        STORY,
        "creation",
        0.0,
        ["BOS", ("first.", True), "DREAM!", "DREAM!", ("second.", True), ("EOS", True)],
    ),
    "instruct": (
        TALE,
        "creation",
        0.0,
        [
            "BOS",
            (f"{VICUNA_SYSTEM} USER: Tell. ASSISTANT:", False),
            ("first.", True),
            "DREAM!",
            "DREAM!",
            ("second.", True),
            ("EOS", True),
        ],
    ),
    "conversation": (
        CHAT,
        "joint",
        0.0,
        [
            "BOS",
            (f"{VICUNA_SYSTEM} USER: ", False),
            "SEE",
            ("\nWhat? ASSISTANT:", False),
            ("a red square.", True),
            ("EOS", True),
            ("USER: Paint it. ASSISTANT:", False),
            ("Here: ", True),
            "DREAM",
            "SEE",
            ("EOS", True),
        ],
    ),
}


def expand(parts, tokenizer, shape):
    special = tokenizer.special
    tokens, weights, see, dream = [], [], [], []
    for part in parts:
        text, learn = (part, False) if isinstance(part, str) else part
        if text == "SEE":
            see.append(len(tokens) + 1)
            ids = [special.im_start, *[special.im_patch] * shape.num_patches, special.im_end]
        elif text in ("DREAM", "DREAM!"):
            dream.append(len(tokens) + 1)
            ids = [special.dream_start, *[special.im_patch] * shape.num_queries, special.dream_end]
        elif text in ("BOS", "EOS"):
            ids = [special.bos if text == "BOS" else special.eos]
        else:
            ids = tokenizer.encode_text(text)
        tokens += ids
        weights += [float(learn)] * len(ids)
        if text == "DREAM!":
            weights[dream[-1] - 1] = 1.0
    return tokens, weights, see, dream


@pytest.mark.parametrize("case", ROWS)
def test_what_a_document_becomes(case, text_tokenizer, shape):
    document, mode, draw, parts = ROWS[case]
    shape = dataclasses.replace(shape, length=400)
    encoded = encode_document(document, text_tokenizer, shape, mode, draw=draw)
    tokens, weights, see, dream = expand(parts, text_tokenizer, shape)
    assert encoded.tokens.tolist() == tokens
    assert encoded.loss_weights.tolist() == weights
    assert encoded.see_slots.tolist() == see and encoded.dream_slots.tolist() == dream
    assert len(encoded.see) == len(see) and len(encoded.dream) == len(dream)
    assert encoded.tokens.dtype == np.int32 and encoded.loss_weights.dtype == np.float32


def test_images_keep_their_order(text_tokenizer, shape):
    shape = dataclasses.replace(shape, length=400)
    assert [image.data for image in encode_document(STORY, text_tokenizer, shape).see] == [b"A", b"B"]
    chat = encode_document(CHAT, text_tokenizer, shape)
    assert [image.data for image in chat.see] == [b"A", b"B"] and [image.data for image in chat.dream] == [b"B"]


def test_the_decision_to_paint_in_a_conversation_is_an_option(text_tokenizer, shape):
    shape = dataclasses.replace(shape, length=400)
    plain = encode_document(CHAT, text_tokenizer, shape)
    learned = encode_document(CHAT, text_tokenizer, shape, learn_dream_start=True)
    (changed,) = np.nonzero(plain.loss_weights != learned.loss_weights)
    assert changed.tolist() == [plain.dream_slots[0] - 1]
    assert learned.tokens[changed[0]] == text_tokenizer.special.dream_start


def test_an_image_may_be_read_before_it_is_painted(text_tokenizer, shape):
    shape = dataclasses.replace(shape, length=400)
    encoded = encode_document(STORY, text_tokenizer, shape, see_first=True)
    parts = ["BOS", ("first.", True), "SEE", "DREAM!", "SEE", "DREAM!", ("second.", True), ("EOS", True)]
    tokens, weights, see, dream = expand(parts, text_tokenizer, shape)
    assert encoded.tokens.tolist() == tokens and encoded.loss_weights.tolist() == weights
    assert encoded.see_slots.tolist() == see and encoded.dream_slots.tolist() == dream
    pair = encode_document(PAIR, text_tokenizer, shape, "creation", see_first=True)
    assert pair.tokens.tolist() == encode_document(PAIR, text_tokenizer, shape, "creation").tokens.tolist()


def test_a_system_message_replaces_the_template_s(text_tokenizer, shape):
    chat = Document("conversation", (Text("Be brief.", "system"), Text("Hi", "user"), Text("Ho", "assistant")))
    encoded = encode_document(chat, text_tokenizer, shape)
    parts = ["BOS", ("Be brief. USER: Hi ASSISTANT:", False), ("Ho", True), ("EOS", True)]
    assert encoded.tokens.tolist() == expand(parts, text_tokenizer, shape)[0]


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_llama_2_writes_dialogues_its_own_way(system, text_tokenizer, shape):
    shape = dataclasses.replace(shape, length=400)
    turns = (
        Image(b"A", "user"),
        Text("Who?", "user"),
        Text("Me.", "assistant"),
        Text("Why?", "user"),
        Text("So.", "assistant"),
    )
    chat = Document("conversation", ((Text(system, "system"),) if system else ()) + turns)
    encoded = encode_document(chat, text_tokenizer, shape, template="llama_2")
    told = f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n" if system else "[INST] "
    parts = ["BOS", (told, False), "SEE", ("Who? [/INST]", False), ("Me. ", True), ("EOS", True)]
    parts += ["BOS", ("[INST] Why? [/INST]", False), ("So. ", True), ("EOS", True)]
    tokens, weights, see, _ = expand(parts, text_tokenizer, shape)
    assert encoded.tokens.tolist() == tokens and encoded.loss_weights.tolist() == weights
    assert encoded.see_slots.tolist() == see
    prompt = encode_document(
        Document("conversation", chat.segments[:-1]), text_tokenizer, shape, template="llama_2", complete=False
    )
    assert (
        prompt.tokens.tolist() == tokens[: len(prompt.tokens)]
        and tokens[len(prompt.tokens)] == (text_tokenizer.encode_text("So. ")[0])
    )


def test_open_documents_are_prompts(text_tokenizer, shape):
    shape = dataclasses.replace(shape, length=400)
    prompt = encode_document(Document("pair", (Text(""), A)), text_tokenizer, shape, "comprehension", complete=False)
    assert prompt.tokens.tolist() == expand(["BOS", "SEE"], text_tokenizer, shape)[0]
    whole = encode_document(CHAT, text_tokenizer, shape).tokens.tolist()
    asked = Document("conversation", CHAT.segments[:4])
    opened = encode_document(asked, text_tokenizer, shape, complete=False).tokens.tolist()
    assert whole[: len(opened)] == opened and whole[len(opened) :][: len(text_tokenizer.encode_text("Here: "))] == (
        text_tokenizer.encode_text("Here: ")
    )


def test_the_text_of_a_pair_is_cut_and_its_image_kept(text_tokenizer, shape):
    shape = dataclasses.replace(shape, length=16)
    ids = text_tokenizer.encode_text("a red square " * 20)
    document = Document("pair", (Text("a red square " * 20), A))
    special = text_tokenizer.special
    read = encode_document(document, text_tokenizer, shape, "comprehension").tokens.tolist()
    assert len(read) == 16 and read[-1] == special.eos and read[7:-1] == ids[:8]
    painted = encode_document(document, text_tokenizer, shape, "creation").tokens.tolist()
    assert len(painted) == 16 and painted[-2:] == [special.dream_end, special.eos] and painted[1:10] == ids[:9]


@pytest.mark.parametrize("lacking", ["tokens", "see", "dream"])
def test_an_interleaved_document_is_cut_before_what_does_not_fit(lacking, text_tokenizer, shape):
    first = expand(["BOS", ("first.", True), "DREAM!", "SEE"], text_tokenizer, shape)[0]
    change = {"tokens": {"length": len(first) + 11}, "see": {"see_slots": 1}, "dream": {"dream_slots": 1}}[lacking]
    encoded = encode_document(STORY, text_tokenizer, dataclasses.replace(shape, **change))
    assert encoded.tokens.tolist() == [*first, text_tokenizer.special.eos]
    assert encoded.loss_weights[-1] == 1 and len(encoded.see) == len(encoded.dream) == 1


def test_a_conversation_ends_before_the_image_that_does_not_fit(text_tokenizer, shape):
    long = encode_document(CHAT, text_tokenizer, dataclasses.replace(shape, length=400))
    start = int(long.dream_slots[0]) - 1
    for length in (start, start + 1, start + shape.num_queries + shape.num_patches + 3):
        cut = encode_document(CHAT, text_tokenizer, dataclasses.replace(shape, length=length))
        assert cut.tokens.tolist() == long.tokens[:start].tolist() and not cut.dream and len(cut.see) == 1
    inside = encode_document(CHAT, text_tokenizer, dataclasses.replace(shape, length=start - 2))
    assert inside.tokens.tolist() == long.tokens[: start - 2].tolist()


def test_a_row_without_room_for_the_image_is_an_error(text_tokenizer, shape):
    for change in ({"length": 7}, {"see_slots": 0}):
        with pytest.raises(ValueError, match="no room for 1 images of 4 patches to read and 0"):
            encode_document(PAIR, text_tokenizer, dataclasses.replace(shape, **change), "comprehension")
    with pytest.raises(ValueError, match="and 1 of 3 queries to paint"):
        encode_document(PAIR, text_tokenizer, dataclasses.replace(shape, dream_slots=0), "creation")
