import dataclasses

import numpy as np
import pytest
from PIL import Image as Picture

from dreamllm_jax.data import packing
from dreamllm_jax.data.document import Document, Image, Text
from dreamllm_jax.data.images import ImageError, to_png
from dreamllm_jax.data.pipeline import encode_batch
from dreamllm_jax.data.tokens import encode_document
from tests.data.conftest import COLOURS, PAIRS, assert_sound, png


def packed(documents, tokenizer, shape, bins=2, mode="joint"):
    import grain

    features = [packing.to_features(encode_document(d, tokenizer, shape, mode)) for d in documents]
    stream = grain.MapDataset.source(features).to_iter_dataset()
    rows = list(packing.pack(stream, shape, bins, seed=0))
    return packing.to_batch(rows, shape, packing.Pixels(shape), tokenizer.special.pad)


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
                (batch.see_slots[row], batch.see_images[row], encoded.see_slots),
                (batch.dream_slots[row], batch.dream_images[row], encoded.dream_slots),
            ):
                mine = [i for i, slot in enumerate(slots) if slot >= 0 and inside[slot]]
                assert (slots[mine] - start).tolist() == expected.tolist()
                told = [COLOURS[s.text] for s in document.texts] if document.images else []
                assert [colour(pixels[i]) for i in mine] == told
            found.append(document)
    assert sorted(map(repr, found)) == sorted(map(repr, documents))


def test_budgets_bind(text_tokenizer, shape):
    batch, held = packed([story(0)] * 7, text_tokenizer, dataclasses.replace(shape, dream_slots=1))
    assert held["rows"] == 7 and (batch.dream_slots >= 0).all()
    without = dataclasses.replace(shape, see_slots=0)
    batch, held = packed([story(0)] * 3, text_tokenizer, without, mode="creation")
    assert batch.see_slots.shape[1] == 0 and held["dream"] == 3


def test_one_document_a_row(text_tokenizer, shape):
    batch, held = packed([story(0)] * 3, text_tokenizer, shape, bins=0)
    assert held["rows"] == held["documents"] == 3
    alone = encode_batch([story(0)], text_tokenizer, shape)
    for field in dataclasses.fields(batch):
        ours, theirs = getattr(batch, field.name), getattr(alone, field.name)
        if ours is not None:
            np.testing.assert_array_equal(ours[1], theirs[0], err_msg=field.name)


def test_a_broken_image_empties_its_document_only(text_tokenizer, shape):
    broken = Document("interleaved", (Text("a"), Image(PAIRS[0][0]), Text("b"), Image(PAIRS[0][0][:-30])))
    with pytest.raises(ImageError):
        encode_batch([broken], text_tokenizer, shape)
    wide = dataclasses.replace(shape, length=256, see_slots=8, dream_slots=8)
    batch, held = packed([story(1), broken, story(2)], text_tokenizer, wide)
    assert held["dropped_broken"] == 2 and held["rows"] == 1  # to see and to paint
    assert held["see"] == held["dream"] == 2
    for segment, learned in ((1, True), (2, False), (3, True)):
        inside = batch.segment_ids[0] == segment
        assert batch.loss_weights[0][inside].any() == learned
        assert np.isin(batch.see_slots[0], np.flatnonzero(inside)).any() == learned
    empty = batch.dream_slots[0] < 0
    assert not batch.dream_images[0][empty].any() and not batch.see_images[0][batch.see_slots[0] < 0].any()
    assert [colour(p) for p in batch.dream_images[0][~empty]] == [COLOURS[PAIRS[i][1]] for i in (1, 2)]


def test_remembered_pixels_are_of_the_right_kind(shape):
    data = to_png(Picture.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)))
    pixels = packing.Pixels(shape)
    for _ in range(2):
        plain, mirrored = (pixels.dream(packing.Placed(data, 0, flip)) for flip in (False, True))
        np.testing.assert_array_equal(mirrored, plain[:, ::-1])
        assert (mirrored != plain).any() and pixels.see(packing.Placed(data, 0)).shape == (8, 8, 3)


def test_remembered_pixels_stay_within_their_memory(shape):
    few = packing.Pixels(shape, memory=3000)
    for value in range(40):
        data = png((value, 0, 0))
        for _ in range(2):
            image = packing.Placed(data, 0, flip=bool(value % 2))
            assert colour(few.dream(image)) == (value, 0, 0) and colour(few.see(image)) == (value, 0, 0)
        assert few._used <= 3000 and few._used == sum(p.nbytes + len(key[1]) for key, p in few._kept.items())
