"""An autoencoder of features learns to give pictures back, and what is read of them stays what it was."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from dreamllm_jax.common.configuration import ConfigError
from dreamllm_jax.model import TEACHER, DreamLLM
from dreamllm_jax.objectives.reconstruction import ReconstructionConfig
from dreamllm_jax.runs.precompute import precompute
from dreamllm_jax.training.step import loss_and_gradients
from tests.experiment.test_flops import ALIGNMENT, experiment
from tests.parity import assert_same, compiled
from tests.tiny import DECODER_UNILIP, make_batch, random_rows, tiny_config, tiny_params

CONFIG = tiny_config(image_decoder=DECODER_UNILIP, teacher=True)
OBJECTIVE = ReconstructionConfig(absolute_weight=0.5, distill_weight=2.0, image_chunk=0)
TRAINED = ("image_decoder/autoencoder/", "vision_encoder/", "visual_projector/")


@pytest.fixture(scope="module")
def case():
    """The objective, parameters whose vision encoder has moved away from its teacher, a batch, and a compiled step."""
    objective, leaves = OBJECTIVE.make(DreamLLM(CONFIG)), flatten_dict(tiny_params(CONFIG), sep="/")
    for path in [path for path in leaves if path.startswith(f"{TEACHER}/")]:
        leaves[path] = leaves[path.removeprefix(f"{TEACHER}/")] * 0.9
    step = compiled(lambda trained, frozen, batch: loss_and_gradients(objective, trained, frozen, batch, ()))
    return objective, leaves, make_batch(CONFIG, random_rows(CONFIG)), step


def halves(leaves):
    trained = {path: x for path, x in leaves.items() if path.startswith(TRAINED)}
    return trained, {path: x for path, x in leaves.items() if path not in trained}


def test_errors_are_those_of_each_picture(case):
    objective, leaves, batch, _ = case
    params, (slots,) = unflatten_dict(leaves, sep="/"), batch.dream
    _, metrics = compiled(objective.loss)(params, batch)
    images = slots.images[np.asarray(slots.filled)]

    @compiled
    def parts(params):
        joined, taught = (objective.model.bind({"params": given}) for given in (params, params[TEACHER]))
        seen, autoencoder = joined.see(images), joined.image_decoder.autoencoder
        return seen, taught.see(images), autoencoder.decode(autoencoder.encode(seen))

    seen, before, pixels = parts(params)
    difference = (np.asarray(pixels) + 1) / 2 - images / 255
    want = {"absolute_error": np.abs(difference).mean(), "squared_error": np.square(difference).mean()}
    want["distill_error"] = np.square(seen - before).mean()
    want["loss"] = 0.5 * want["absolute_error"] + want["squared_error"] + 2 * want["distill_error"]
    assert_same(metrics, want)


@pytest.mark.slow
def test_chunks_microbatches_and_held_out_means_change_nothing(case):
    objective, leaves, batch, step = case
    metrics, gradients = step(*halves(leaves), batch)
    chunked = dataclasses.replace(objective, config=dataclasses.replace(OBJECTIVE, image_chunk=3))
    again = compiled(lambda *parts: loss_and_gradients(chunked, *parts, batch, (), microbatches=2))(*halves(leaves))
    assert_same(again[0], metrics)
    assert_same(again[1], gradients)
    held_out = OBJECTIVE.held_out(CONFIG, 4)
    sums = compiled(held_out.sums)(unflatten_dict(leaves, sep="/"), batch, jax.random.key(0))
    names = ("absolute_error", "squared_error", "distill_error")
    assert held_out.means(jax.device_get(sums)) == pytest.approx({n: float(metrics[n]) for n in names}, rel=1e-5)


@pytest.mark.slow
def test_empty_slots_count_for_nothing(case):
    _, leaves, batch, step = case
    (slots,), parts = batch.dream, halves(leaves)
    noise = np.random.default_rng(1).integers(0, 256, slots.images.shape, dtype=np.uint8)
    other = np.where(np.asarray(slots.filled)[..., None, None, None], slots.images, noise)
    metrics, gradients = step(*parts, batch)
    again, same = step(*parts, batch.replace(dream=(slots.replace(images=other),)))
    assert_same(again | same, metrics | gradients, tolerance=0)
    nothing, gradients = step(*parts, batch.replace(dream=(slots.replace(at=np.full_like(slots.at, -1)),)))
    assert not nothing["loss"] and not any(g.any() for g in gradients.values())


@pytest.mark.slow
def test_it_is_learned(case):
    _, leaves, batch, step = case
    (trained, frozen), optimizer, found = halves(leaves), optax.adam(3e-3), []
    update, state = jax.jit(optimizer.update), optimizer.init(trained)
    for _ in range(30):
        metrics, gradients = step(trained, frozen, batch)
        updates, state = update(gradients, state)
        trained = optax.apply_updates(trained, updates)
        found.append(metrics)
    for name in ("loss", "absolute_error", "squared_error", "distill_error"):
        assert found[-1][name] < 0.7 * found[0][name], (name, [float(one[name]) for one in found])


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


def test_what_the_vision_encoder_sees_is_not_computed_beforehand(tmp_path):
    config = tiny_config(image_decoder=DECODER_UNILIP)
    with pytest.raises(ConfigError, match=r"latents of what the vision encoder sees, .* leave moments out"):
        experiment(model=config, stored=("moments",), trainable=ALIGNMENT)
    with pytest.raises(ValueError, match="latents of what the vision encoder sees: there are no moments to compute"):
        precompute(tmp_path, "any", "moments", DreamLLM(config), {}, made_by="", size=16, dtype="float32", batch=1)
