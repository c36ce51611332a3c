"""An autoencoder of features learns to give pictures back, and what is read of them stays what it was."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from dreamllm_jax.model import TEACHER, DreamLLM
from dreamllm_jax.objectives.reconstruction import ReconstructionConfig
from dreamllm_jax.training.step import loss_and_gradients
from tests.parity import assert_same
from tests.tiny import DECODER_UNILIP, make_batch, random_rows, tiny_config, tiny_params

CONFIG = tiny_config(image_decoder=DECODER_UNILIP, teacher=True)
OBJECTIVE = ReconstructionConfig(absolute_weight=0.5, distill_weight=2.0, image_chunk=0)
TRAINED = ("image_decoder/autoencoder/", "vision_encoder/", "visual_projector/")


@pytest.fixture(scope="module")
def case():
    """The objective, parameters whose vision encoder has moved away from its teacher, and a batch."""
    params = tiny_params(CONFIG)
    leaves = flatten_dict(params, sep="/")
    for path in [path for path in leaves if path.startswith(f"{TEACHER}/")]:
        leaves[path] = leaves[path.removeprefix(f"{TEACHER}/")] * 0.9
    return OBJECTIVE.make(DreamLLM(CONFIG)), leaves, make_batch(CONFIG, random_rows(CONFIG))


def halves(leaves):
    trained = {path: x for path, x in leaves.items() if path.startswith(TRAINED)}
    return trained, {path: x for path, x in leaves.items() if path not in trained}


def test_errors_are_those_of_each_picture(case):
    objective, leaves, batch = case
    metrics, gradients = jax.jit(lambda *parts: loss_and_gradients(objective, *parts, batch, ()))(*halves(leaves))
    joined, (slots,) = objective.model.bind({"params": unflatten_dict(leaves, sep="/")}), batch.dream
    images = slots.images[np.asarray(slots.filled)]
    seen = joined.see(images)
    before = objective.model.bind({"params": joined.variables["params"][TEACHER]}).see(images)
    pixels = joined.image_decoder.autoencoder.decode(joined.image_decoder.autoencoder.encode(seen))
    difference = (np.asarray(pixels) + 1) / 2 - images / 255
    want = {"absolute_error": np.abs(difference).mean(), "squared_error": np.square(difference).mean()}
    want["distill_error"] = np.square(seen - before).mean()
    want["loss"] = 0.5 * want["absolute_error"] + want["squared_error"] + 2 * want["distill_error"]
    assert_same(metrics, want)
    # Chunks and microbatches change nothing; the pictures' means are the batch's.
    chunked = dataclasses.replace(objective, config=dataclasses.replace(OBJECTIVE, image_chunk=3))
    again, same = jax.jit(lambda *parts: loss_and_gradients(chunked, *parts, batch, (), microbatches=2))(
        *halves(leaves)
    )
    assert_same(again, metrics)
    assert_same(same, gradients)
    held_out = OBJECTIVE.held_out(CONFIG, 4)
    sums = held_out.sums(unflatten_dict(leaves, sep="/"), batch, jax.random.key(0))
    assert held_out.means(jax.device_get(sums)) == pytest.approx(
        {name: float(metrics[name]) for name in ("absolute_error", "squared_error", "distill_error")}, rel=1e-5
    )


def test_empty_slots_count_for_nothing(case):
    objective, leaves, batch = case
    (slots,) = batch.dream
    noise = np.random.default_rng(1).integers(0, 256, slots.images.shape, dtype=np.uint8)
    other = np.where(np.asarray(slots.filled)[..., None, None, None], slots.images, noise)
    step = jax.jit(lambda batch, *parts: loss_and_gradients(objective, *parts, batch, ()))
    results = [
        step(batch.replace(dream=(slots.replace(images=images),)), *halves(leaves)) for images in (slots.images, other)
    ]
    assert_same(results[1][0] | results[1][1], results[0][0] | results[0][1], tolerance=0)
    nothing, gradients = step(batch.replace(dream=(slots.replace(at=np.full_like(slots.at, -1)),)), *halves(leaves))
    assert not nothing["loss"] and not any(g.any() for g in gradients.values())


def test_it_is_learned(case):
    _, leaves, batch = case
    model = DreamLLM(dataclasses.replace(CONFIG, teacher=False))
    objective = ReconstructionConfig(image_chunk=0).make(model)
    trained, frozen = halves({path: x for path, x in leaves.items() if not path.startswith(TEACHER)})
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(trained, state):
        metrics, gradients = loss_and_gradients(objective, trained, frozen, batch, ())
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(trained, updates), state, metrics["loss"]

    state, losses = optimizer.init(trained), []
    for _ in range(30):
        trained, state, loss = step(trained, state)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0], losses


@pytest.mark.parametrize(
    ("objective", "model", "paints", "message"),
    [
        (OBJECTIVE, CONFIG, False, r"needs images to paint, and rows\.dream_slots=0"),
        (OBJECTIVE, tiny_config(), True, r"choose model\.image_decoder\.autoencoder\.kind=unilip"),
        (OBJECTIVE, dataclasses.replace(CONFIG, teacher=False), True, "distill_weight=2 and model.teacher=False: one"),
        (ReconstructionConfig(), CONFIG, True, "distill_weight=0 and model.teacher=True: one needs the other"),
    ],
)
def test_what_cannot_be_learned_is_told(objective, model, paints, message):
    with pytest.raises(ValueError, match=message):
        objective.require(model, lambda path: True, paints)


def test_settings_that_make_no_sense():
    for settings, message in (
        ({"squared_weight": -1.0}, "squared_weight must not be negative"),
        ({"squared_weight": 0.0}, "nothing asks for the picture"),
    ):
        with pytest.raises(ValueError, match=message):
            ReconstructionConfig(**settings)
