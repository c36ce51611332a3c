import collections
import dataclasses
import random

import jax
import numpy as np
import pytest
from PIL import Image as Picture

from dreamllm_jax.data.batch import RowShape, SlotGroup, empty_batch
from dreamllm_jax.data.document import Document, Image, Text
from dreamllm_jax.data.images import ImageError, decode, size_of, to_png
from dreamllm_jax.data.packing import Item, RowStream
from dreamllm_jax.data.rows import Pixels, fill_row
from dreamllm_jax.data.tokens import encode_document
from dreamllm_jax.data.writing import Placed
from tests.data.conftest import COLOURS, CROPS, PAIRS, assert_sound, encode, png, with_slots


def read_from(items):
    return lambda record, need=None: lambda: items[record]


def packed(documents, tokenizer, shape, window=64, mode="joint", strict=False):
    left = [Item(i, "corpus", encode_document(d, tokenizer, shape, mode)) for i, d in enumerate(documents)]
    rows = []
    while left:
        # After the last document the stream would run on: it is given what is left, and a window as small.
        begin = read_from(left)
        rows.append(next(RowStream(begin, shape, first=0, step=1, window=min(window, len(left)))))
        taken = {item.record for item in rows[-1]}
        left = [item for item in left if item.record not in taken]
    batch, held = empty_batch(len(rows), shape, tokenizer.special.pad), collections.Counter(rows=len(rows))
    for index, row in enumerate(rows):
        held.update({what: n for (_, what), n in fill_row(batch, index, row, Pixels(shape, *CROPS), strict).items()})
    return batch, held


def story(*indices):
    return Document("interleaved", tuple(s for i in indices for s in (Text(PAIRS[i][1]), Image(PAIRS[i][0]))))


def colour(pixels):
    assert (pixels == pixels[0, 0]).all()
    return tuple(int(v) for v in pixels[0, 0])


def test_packed_rows_hold_the_documents_unchanged(text_tokenizer, shape):
    documents = [story(0), story(1, 2), Document("text", (Text("a red square"),)), story(3), story(4)]
    batch, held = packed(documents, text_tokenizer, shape)
    assert_sound(batch, shape, text_tokenizer.special)
    assert held["documents"] == 5 and held["see"] == held["dream"] == 5 and held["rows"] == len(batch.tokens) < 5
    alone = {tuple(encode_document(d, text_tokenizer, shape).tokens.tolist()): d for d in documents}
    found = []
    for row in range(held["rows"]):
        for segment in range(1, batch.segment_ids[row].max() + 1):
            inside = batch.segment_ids[row] == segment
            tokens = tuple(batch.tokens[row][inside].tolist())
            document = alone[tokens]
            encoded = encode_document(document, text_tokenizer, shape)
            assert batch.loss_weights[row][inside].tolist() == encoded.loss_weights.tolist()
            start = int(np.argmax(inside))
            for slots, pixels, expected in (
                (batch.see[0].at[row], batch.see[0].images[row], encoded.see),
                (batch.dream[0].at[row], batch.dream[0].images[row], encoded.dream),
            ):
                mine = [i for i, slot in enumerate(slots) if slot >= 0 and inside[slot]]
                assert (slots[mine] - start).tolist() == [placed.at for placed in expected]
                told = [COLOURS[s.text] for s in document.texts] if document.images else []
                assert [colour(pixels[i]) for i in mine] == told
            found.append(document)
    assert sorted(map(repr, found)) == sorted(map(repr, documents))


def test_budgets_bind(text_tokenizer, shape):
    batch, held = packed([story(0)] * 7, text_tokenizer, with_slots(shape, dream=1))
    assert held["rows"] == 7 and batch.dream[0].filled.all()
    without = with_slots(shape, see=0)
    batch, held = packed([story(0)] * 3, text_tokenizer, without, mode="creation")
    assert batch.see == () and held["dream"] == 3


def test_one_document_a_row(text_tokenizer, shape):
    batch, held = packed([story(0)] * 3, text_tokenizer, shape, window=1)
    assert held["rows"] == held["documents"] == 3
    alone, _ = packed([story(0)], text_tokenizer, shape)
    jax.tree.map(lambda ours, theirs: np.testing.assert_array_equal(ours[1], theirs[0]), batch, alone)


def test_a_broken_image_empties_its_document_only(text_tokenizer, shape):
    broken = Document("interleaved", (Text("a"), Image(PAIRS[0][0]), Text("b"), Image(PAIRS[0][0][:-30])))
    with pytest.raises(ImageError):
        packed([broken], text_tokenizer, dataclasses.replace(shape, length=256), strict=True)
    wide = with_slots(dataclasses.replace(shape, length=256), see=8, dream=8)
    batch, held = packed([story(1), broken, story(2)], text_tokenizer, wide)
    assert held["dropped_broken"] == 1 and held["rows"] == 1
    assert held["see"] == held["dream"] == 2
    (see,), (dream,) = batch.see, batch.dream
    for segment, learned in ((1, True), (2, False), (3, True)):
        inside = batch.segment_ids[0] == segment
        assert batch.loss_weights[0][inside].any() == learned
        assert np.isin(see.at[0], np.flatnonzero(inside)).any() == learned
    assert not any(slots.images[0][~slots.filled[0]].any() for slots in (see, dream))
    assert [colour(p) for p in dream.images[0][dream.filled[0]]] == [COLOURS[PAIRS[i][1]] for i in (1, 2)]


def test_remembered_pixels_are_of_the_right_kind(shape):
    data = to_png(Picture.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)))
    pixels = Pixels(shape, *CROPS)
    for _ in range(2):
        plain, mirrored = (pixels.dream(Placed(Image(data), 0), flip) for flip in (False, True))
        np.testing.assert_array_equal(mirrored, plain[:, ::-1])
        assert (mirrored != plain).any() and pixels.see(Placed(Image(data), 0)).shape == (8, 8, 3)


def test_remembered_pixels_stay_within_their_memory(shape):
    few = Pixels(shape, *CROPS, memory=3000)
    for value in range(40):
        data = png((value, 0, 0))
        for _ in range(2):
            image, flip = Placed(Image(data), 0), bool(value % 2)
            assert colour(few.dream(image, flip)) == (value, 0, 0) and colour(few.see(image)) == (value, 0, 0)
        assert few._used <= 3000 and few._used == sum(p.nbytes + len(key[1]) for key, p in few._kept.items())


@pytest.mark.parametrize("length", [60, 128])
def test_every_row_of_random_documents_keeps_the_contract(length, text_tokenizer, shape):
    rng = random.Random(length)
    texts = ["", " ", "a red square", "<image> </s> <dream_start> [PAD]", "漢字 🙂\n" * 3, "x" * 3000, "<im_patch>" * 9]
    room = dataclasses.replace(shape, length=length)
    documents = []
    for _ in range(1000):
        images = [Image(rng.choice(PAIRS)[0]) for _ in range(rng.choice([0, 0, 1, 2, 8, 30]))]
        segments = [Text(rng.choice(texts)) for _ in range(rng.randint(0, 6))] + images
        rng.shuffle(segments)
        talk = [Text("Hi", "user"), *(dataclasses.replace(s, role=rng.choice(["user", "assistant"])) for s in segments)]
        choices = [
            Document("interleaved", tuple(segments)),
            Document("conversation", tuple(talk)),
            Document("instruct_interleaved", tuple(talk)),
            Document("text", tuple(s for s in segments if isinstance(s, Text))),
            Document("pair", (Text(rng.choice(texts)), Image(PAIRS[0][0]))),
        ]
        documents.append(rng.choice(choices))
    for mode in ("joint", "comprehension", "creation"):
        batch, held = packed(documents, text_tokenizer, room, mode=mode)
        assert_sound(batch, room, text_tokenizer.special)
        assert held["documents"] == len(documents) and held["rows"] < len(documents)
        # Slots are filled from the first on, and no more tokens are learned than there are.
        for slots in batch.see + batch.dream:
            assert (np.diff((~slots.filled).astype(int), axis=1) >= 0).all()


def test_a_waiting_document_is_not_passed_over_for_ever(text_tokenizer, shape):
    """The longest waiting document opens the next row, however badly it fits."""
    wide, small = story(0, 1, 2), story(3)
    order = []
    items = [Item(i, "", encode_document(wide if i == 3 else small, text_tokenizer, shape)) for i in range(200)]
    stream = RowStream(read_from(items), shape, first=0, step=1, window=4)
    while 3 not in order:
        order += [item.record for item in next(stream)]
    assert len(order) < 12


def test_reading_begins_as_soon_as_it_is_known_what_to_read(text_tokenizer, shape):
    """What waits and what is being read are the window; what waited in a saved state is read for its row."""
    kinds = [encode_document(story(*range(1 + i % 3)), text_tokenizer, shape) for i in range(3)]
    begun, got = [], []

    def begin(record, need=None):
        def get():
            got.append(record)
            return Item(record, "", kinds[record * 7 % 11 % 3]) if record % 5 else None

        begun.append(record)
        return get

    def stream():
        return RowStream(begin, shape, first=1, step=2, window=9)

    first, rows, states = stream(), [], []
    for _ in range(20):
        rows.append([item.record for item in next(first)])
        states.append(first.state)
        assert begun == sorted(begun) and len(begun) == len(set(begun))
        assert len(states[-1]) - 1 + len(begun) - len(got) == 9 and begun[len(got)] == states[-1][0]
    for at, state in enumerate(states[:-1]):
        again = stream()
        again.state = state
        assert again.state == state
        begun.clear()
        again.read_ahead()
        there, lacking = {record for record, *_ in state[1:]}, 9 - len(state[1:])
        assert there.intersection(rows[at + 1]) == there.intersection(begun) and len(begun) <= lacking + len(there)
        for expected, state_then in zip(rows[at + 1 :], states[at + 1 :], strict=True):
            assert [item.record for item in next(again)] == expected and again.state == state_then
        assert len(begun) == len(set(begun))


def test_images_take_slots_of_their_shape(text_tokenizer):
    """Three sizes: each image goes where least of it is cropped and there is room, and its pixels have that size."""
    sizes = (16, 16), (8, 24), (24, 8)  # height, width
    groups = tuple(SlotGroup(1, 3, height, width) for height, width in sizes)
    shape = RowShape(96, (SlotGroup(4, 4, 8, 8),), groups)
    tall, wide, square = (Image(png((250, 10, 20), size=size)) for size in ((10, 30), (30, 10), (20, 20)))
    document = Document("interleaved", (tall, wide, square, wide))
    encoded = encode_document(document, text_tokenizer, shape)
    assert [placed.group for placed in encoded.dream] == [2, 1, 0]  # the second wide one found no room
    batch, held = packed([document, document], text_tokenizer, shape)
    assert_sound(batch, shape, text_tokenizer.special)
    assert held["rows"] == 2 and held["dream"] == 6
    for slots, (height, width) in zip(batch.dream, sizes, strict=True):
        assert slots.images.shape == (2, 1, height, width, 3) and slots.filled.all()
        assert colour(slots.images[0, 0]) == (250, 10, 20)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("stored", [(), (2, 2, 4)])
def test_sizes_stand_beside_their_pictures(text_tokenizer, flip, stored):
    """In every group that has them; of a picture whose latents are stored too; none of one that cannot be decoded."""
    groups = (SlotGroup(2, 3, 16, 16, stored, "float32", sizes=True), SlotGroup(1, 3, 8, 24))
    shape = RowShape(128, (SlotGroup(4, 4, 8, 8),), groups)
    latents = {"moments": np.ones(stored, np.float32)} if stored else {}
    tall, square = (Image(png((250, 10, 20), size=size), stored=latents) for size in ((21, 30), (40, 40)))
    wide = Image(png((250, 10, 20), size=(60, 20)))
    broken = Image(b"no picture", stored={name: array * np.nan for name, array in latents.items()})
    batch = empty_batch(2, shape, text_tokenizer.special.pad)
    assert batch.dream[0].sizes.shape == (2, 2, 6) and batch.dream[1].sizes is None
    documents = (tall, wide, square), (Text("a"), broken)
    for row, segments in enumerate(documents):
        encoded = encode_document(Document("interleaved", segments), text_tokenizer, shape, "creation")
        held = fill_row(batch, row, [Item(row, "corpus", encoded, flip=flip)], Pixels(shape, *CROPS))
        assert held["corpus", "dream"] == (3 if row == 0 else 0)
    # 21 x 30 becomes 16 x 22, of which three rows above are left out.
    assert batch.dream[0].sizes[0].tolist() == [[30, 21, 3, 0, 16, 16], [40, 40, 0, 0, 16, 16]]
    assert not batch.dream[0].sizes[1].any()
    assert batch.dream[1].filled[0].all()  # which has none


def test_a_photograph_s_shape_is_that_which_is_seen():
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        for orientation in range(1, 9):
            turned = encode(Picture.new("RGB", (30, 10)), kind, exif=upside(orientation))
            assert size_of(turned) == decode(turned).size == ((10, 30) if orientation > 4 else (30, 10))
    assert size_of(b"no image") == (1, 1)


def upside(orientation):
    exif = Picture.Exif()
    exif[0x0112] = orientation
    return exif


def test_the_two_answers_of_a_preference_share_a_row_and_not_a_segment(text_tokenizer):
    before = (Text("what is red ?", "user"), Text("a red square", "assistant"), Text("and blue ?", "user"))
    better, worse = Text("a blue square", "assistant"), Text("red", "assistant")
    documents = [Document("preference", (*before, better, worse)), Document("text", (Text("a red square"),))]
    shape = RowShape(512)
    (batch, held), alone = packed(documents, text_tokenizer, shape), RowShape(256)
    assert held["documents"] == 2 and held["rows"] == 1 and batch.segment_ids.max() == 3
    for segment, answer, sign in ((1, better, 1), (2, worse, -1)):
        inside = batch.segment_ids[0] == segment
        want = encode_document(Document("conversation", (*before, answer)), text_tokenizer, alone)
        assert batch.tokens[0][inside].tolist() == want.tokens.tolist()
        assert batch.positions[0][inside].tolist() == list(range(inside.sum()))
        own = batch.loss_weights[0][inside]
        assert own.any() and own.tolist() == (sign * want.loss_weights).tolist()
    for segments in ((*before, better), (better, worse), (before[0], Image(PAIRS[0][0]), better, worse)):
        with pytest.raises(ValueError, match="preference"):
            Document("preference", segments)
