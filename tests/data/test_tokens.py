import dataclasses

import numpy as np
import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from dreamllm_jax.data.document import Document, Image, Text
from dreamllm_jax.data.templates import VICUNA_SYSTEM
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.data.tokens import encode_document
from dreamllm_jax.data.vocabulary import ADDED_TOKENS
from tests.data.conftest import with_slots

A, B = Image(b"A"), Image(b"B")


def user(segment):
    return dataclasses.replace(segment, role="user")


def assistant(segment):
    return dataclasses.replace(segment, role="assistant")


PAIR = Document("pair", (Text("a red square"), A))
STORY = Document("interleaved", (Text(" first. "), A, B, Text("second.")))
TALE = Document("instruct_interleaved", (Text("Tell.", "user"), *map(assistant, STORY.segments)))
ASKED = (user(A), Text("\nWhat?", "user"), Text("a red square.", "assistant"), Text("Paint it.", "user"))
CHAT = Document("conversation", (*ASKED, Text("Here: ", "assistant"), assistant(B)))

FIRST, SECOND = ("first.", True), ("second.", True)
PROMPT, OPENING = f"{VICUNA_SYSTEM} USER: Tell. ASSISTANT:", f"{VICUNA_SYSTEM} USER: "
# What each document becomes, by itself or with options. Words in capitals are parts of the sequence, those with a ! are
# learned (of DREAM its start alone); other texts are written as they stand, a pair says whether one is learned.
ROWS = {
    "pair read": (PAIR, {"mode": "comprehension"}, "BOS", "SEE", ("a red square", True), "EOS!"),
    "pair painted": (PAIR, {"mode": "creation", "draw": 0.9}, "BOS", "a red square", "DREAM", "EOS"),
    "pair drawn low": (PAIR, {"draw": 0.4999}, "BOS", "a red square", "DREAM", "EOS"),
    "pair drawn high": (PAIR, {"draw": 0.5}, "BOS", "SEE", ("a red square", True), "EOS!"),
    "pair painted, see first": (PAIR, {"mode": "creation", "see_first": True}, "BOS", "a red square", "DREAM", "EOS"),
    "image to image": (Document("image_image", (A, B)), {}, "BOS", "SEE", "DREAM", "EOS"),
    "text": (Document("text", (Text("a"), Text("b"))), {}, "BOS", ("a", True), ("b", True), "EOS!"),
    "interleaved": (STORY, {}, "BOS", FIRST, "DREAM!", "SEE", "DREAM!", "SEE", SECOND, "EOS!"),
    "interleaved read": (STORY, {"mode": "comprehension"}, "BOS", FIRST, "SEE", "SEE", SECOND, "EOS!"),
    "interleaved painted": (STORY, {"mode": "creation"}, "BOS", FIRST, "DREAM!", "DREAM!", SECOND, "EOS!"),
    "see first": (STORY, {"see_first": True}, "BOS", FIRST, "SEE", "DREAM!", "SEE", "DREAM!", SECOND, "EOS!"),
    "instruct": (TALE, {"mode": "creation"}, "BOS", PROMPT, FIRST, "DREAM!", "DREAM!", SECOND, "EOS!"),
    "conversation": (
        *(CHAT, {}, "BOS", OPENING, "SEE", "\nWhat? ASSISTANT:", ("a red square.", True), "EOS!"),
        *("USER: Paint it. ASSISTANT:", ("Here: ", True), "DREAM", "SEE", "EOS!"),
    ),
    # The original writes "ASSISTANT: <dream>", and learns that space.
    "conversation, painted at once": (
        Document("conversation", (Text("Paint it.", "user"), assistant(B), Text("Done.", "assistant"))),
        *({}, "BOS", f"{OPENING}Paint it. ASSISTANT:", "SPACE!", "DREAM", "SEE", ("Done.", True), "EOS!"),
    ),
}


def expand(parts, tokenizer, shape):
    """The parts' tokens; of a tokenizer that is not legacy, text behind an image or `</s>` has no prefix."""
    special = tokenizer.special
    behind = special.eos, special.im_end, special.dream_end
    tokens, weights, see, dream = [], [], [], []
    for part in parts:
        text, learn = (part.removesuffix("!"), part.endswith("!")) if isinstance(part, str) else part
        if text == "SEE":
            see.append(len(tokens) + 1)
            ids = [special.im_start, *[special.im_patch] * shape.see[0].tokens, special.im_end]
        elif text == "DREAM":
            dream.append(len(tokens) + 1)
            ids = [special.dream_start, *[special.im_patch] * shape.dream[0].tokens, special.dream_end]
        elif text in ("BOS", "EOS"):
            ids = [special.bos if text == "BOS" else special.eos]
        elif text == "SPACE":
            ids = [tokenizer.fast.token_to_id("▁")]
        else:
            ids = tokenizer.encode_text(text, prefix=tokenizer.legacy or tokens[-1] not in behind)
        tokens += ids
        learned = 1 if text == "DREAM" else len(ids)
        weights += [float(learn)] * learned + [0.0] * (len(ids) - learned)
    return tokens, weights, see, dream


@pytest.fixture(scope="module")
def long(shape):
    """Room for any document here."""
    return dataclasses.replace(shape, length=400)


@pytest.mark.parametrize("case", ROWS)
def test_what_a_document_becomes(case, text_tokenizer, long):
    document, options, *parts = ROWS[case]
    encoded = encode_document(document, text_tokenizer, long, **options)
    tokens, weights, see, dream = expand(parts, text_tokenizer, long)
    assert encoded.tokens.tolist() == tokens
    assert encoded.loss_weights.tolist() == weights
    assert [[placed.at for placed in images] for images in (encoded.see, encoded.dream)] == [see, dream]
    assert encoded.tokens.dtype == np.int32 and encoded.loss_weights.dtype == np.float32


@pytest.mark.parametrize("case", ["conversation", "conversation, painted at once", "instruct"])
def test_a_conversation_of_a_tokenizer_that_is_not_legacy(case, text_tokenizer, long):
    newer = Tokenizer(text_tokenizer.fast, text_tokenizer.names, legacy=False)
    document, _, *parts = ROWS[case]
    encoded = encode_document(document, newer, long, "creation")
    tokens, weights, _, _ = expand(parts, newer if case != "instruct" else text_tokenizer, long)
    assert encoded.tokens.tolist() == tokens and encoded.loss_weights.tolist() == weights
    assert (tokens == expand(parts, text_tokenizer, long)[0]) == (case == "instruct")


def test_an_answer_begins_with_a_space_whatever_the_tokenizer(long):
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator([], trainers.BpeTrainer(special_tokens=["<s>", "</s>"], initial_alphabet=alphabet))
    fast.add_special_tokens(list(ADDED_TOKENS))
    letters = Tokenizer(fast, {"bos_token": "<s>", "eos_token": "</s>"})
    encoded = encode_document(Document("conversation", CHAT.segments[1:3]), letters, long)
    assert fast.decode(encoded.tokens) == f"{VICUNA_SYSTEM} USER: \nWhat? ASSISTANT: a red square."
    assert fast.decode(encoded.tokens[encoded.loss_weights > 0]) == " a red square."


def test_images_keep_their_order(text_tokenizer, long):
    assert [placed.image.data for placed in encode_document(STORY, text_tokenizer, long).see] == [b"A", b"B"]
    chat = encode_document(CHAT, text_tokenizer, long)
    assert [placed.image.data for placed in chat.see] == [b"A", b"B"] and [
        placed.image.data for placed in chat.dream
    ] == [b"B"]


def test_the_decision_to_paint_in_a_conversation_is_an_option(text_tokenizer, long):
    plain = encode_document(CHAT, text_tokenizer, long)
    learned = encode_document(CHAT, text_tokenizer, long, learn_dream_start=True)
    (changed,) = np.nonzero(plain.loss_weights != learned.loss_weights)
    assert changed.tolist() == [plain.dream[0].at - 1]
    assert learned.tokens[changed[0]] == text_tokenizer.special.dream_start


def test_a_system_message_replaces_the_template_s(text_tokenizer, shape):
    chat = Document("conversation", (Text("Be brief.", "system"), Text("Hi", "user"), Text("Ho", "assistant")))
    encoded = encode_document(chat, text_tokenizer, shape)
    parts = ["BOS", "Be brief. USER: Hi ASSISTANT:", ("Ho", True), "EOS!"]
    assert encoded.tokens.tolist() == expand(parts, text_tokenizer, shape)[0]


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_llama_2_writes_dialogues_its_own_way(system, text_tokenizer, long):
    turns = [user(A), user(Text("Who?")), assistant(Text("Me.")), user(Text("Why?")), assistant(Text("So."))]
    chat = Document("conversation", (*([Text(system, "system")] if system else []), *turns))
    encoded = encode_document(chat, text_tokenizer, long, template="llama_2")
    told = f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n" if system else "[INST] "
    parts = ["BOS", told, "SEE", "Who? [/INST]", ("Me. ", True), "EOS!"]
    parts += ["BOS", "[INST] Why? [/INST]", ("So. ", True), "EOS!"]
    tokens, weights, see, _ = expand(parts, text_tokenizer, long)
    assert encoded.tokens.tolist() == tokens and encoded.loss_weights.tolist() == weights
    assert [placed.at for placed in encoded.see] == see
    asked = Document("conversation", chat.segments[:-1])
    prompt = encode_document(asked, text_tokenizer, long, template="llama_2", complete=False).tokens.tolist()
    assert tokens[: len(prompt)] == prompt and tokens[len(prompt)] == text_tokenizer.encode_text("So. ")[0]


def test_open_documents_are_prompts(text_tokenizer, long):
    prompt = encode_document(Document("pair", (Text(""), A)), text_tokenizer, long, "comprehension", complete=False)
    assert prompt.tokens.tolist() == expand(["BOS", "SEE"], text_tokenizer, long)[0]
    whole = encode_document(CHAT, text_tokenizer, long).tokens.tolist()
    asked = Document("conversation", CHAT.segments[:4])
    opened = encode_document(asked, text_tokenizer, long, complete=False).tokens.tolist()
    following = text_tokenizer.encode_text("Here: ")
    assert whole[: len(opened) + len(following)] == opened + following


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
    first = expand(["BOS", FIRST, "DREAM!", "SEE"], text_tokenizer, shape)[0]
    change = {"tokens": dataclasses.replace(shape, length=len(first) + 11)}
    changed = change.get(lacking) or with_slots(shape, **{lacking: 1})
    encoded = encode_document(STORY, text_tokenizer, changed)
    assert encoded.tokens.tolist() == [*first, text_tokenizer.special.eos]
    assert encoded.loss_weights[-1] == 1 and len(encoded.see) == len(encoded.dream) == 1


def test_a_document_of_which_nothing_fits_teaches_nothing(text_tokenizer, shape):
    long = Text("a red square " * 200)
    for document in (
        Document("interleaved", (long, A)),
        Document("instruct_interleaved", (dataclasses.replace(long, role="user"), Text("never", "assistant"))),
    ):
        assert not encode_document(document, text_tokenizer, shape).learns
    assert encode_document(STORY, text_tokenizer, shape).learns


def test_a_conversation_ends_before_the_image_that_does_not_fit(text_tokenizer, shape, long):
    whole = encode_document(CHAT, text_tokenizer, long)
    start = whole.dream[0].at - 1
    for length in (start, start + 1, start + shape.dream[0].tokens + shape.see[0].tokens + 3):
        cut = encode_document(CHAT, text_tokenizer, dataclasses.replace(shape, length=length))
        assert cut.tokens.tolist() == whole.tokens[:start].tolist() and not cut.dream and len(cut.see) == 1
    inside = encode_document(CHAT, text_tokenizer, dataclasses.replace(shape, length=start - 2))
    assert inside.tokens.tolist() == whole.tokens[: start - 2].tolist()


def test_a_row_without_room_for_the_image_is_an_error(text_tokenizer, shape):
    for less in (dataclasses.replace(shape, length=7), with_slots(shape, see=0)):
        with pytest.raises(ValueError, match="and 3 dream slots of 3 tokens has no room for 1 images to read and 0"):
            encode_document(PAIR, text_tokenizer, less, "comprehension")
    with pytest.raises(
        ValueError, match="with 4 see slots of 4 tokens and 0 dream slots has no room for 0 images to read and 1 "
    ):
        encode_document(PAIR, text_tokenizer, with_slots(shape, dream=0), "creation")
