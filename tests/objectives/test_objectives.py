"""The joint loss equals its PyTorch composition, and does not depend on how its rows are arranged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from dreamllm_jax.diffusion.schedule import ScheduleConfig
from dreamllm_jax.interop.names import to_torch
from dreamllm_jax.layers.weights import draw
from dreamllm_jax.model import DreamLLM
from dreamllm_jax.objectives.interface import ObjectiveConfig
from dreamllm_jax.training.step import loss_and_gradients
from tests.parity import assert_same
from tests.tiny import DREAM_SIZE, DREAM_SLOTS, MLP, make_batch, random_rows, tiny_config, tiny_params

EVERYTHING = ObjectiveConfig(
    lm_weight=1.0,
    dm_weight=10.0,
    scaling="l1_norm",
    drop_prob=0.4,
    null_condition="queries",
    noise_offset=0.1,
    input_perturbation=0.1,
    snr_gamma=5.0,
)
VELOCITY = ObjectiveConfig(
    lm_weight=0.5,
    dm_weight=2.0,
    scaling="l2_norm",
    drop_prob=0.4,
    null_condition="original",
    snr_gamma=0.5,
    loss_chunk=8,
    image_chunk=1,
)


def make_draws(config, objective, rows=8, seed=1):
    key = jax.random.key(seed)
    return draw(key, rows, DREAM_SLOTS, config.latent_shape(DREAM_SIZE), config.schedule.num_train_timesteps, objective)


@dataclasses.dataclass
class Case:
    """A model, a batch, and the compiled joint loss with its gradients."""

    config: object
    objective: ObjectiveConfig

    def __post_init__(self):
        self.model = DreamLLM(self.config)
        self.params = tiny_params(self.config)
        self.leaves = flatten_dict(self.params, sep="/")
        self.rows = random_rows(self.config)
        self.batch = make_batch(self.config, self.rows)
        self.draws = make_draws(self.config, self.objective)
        self._compiled = jax.jit(
            lambda leaves, batch, draws: loss_and_gradients(self.model, self.objective, leaves, {}, batch, draws)
        )

    def run(self, batch=None, draws=None):
        batch = self.batch if batch is None else batch
        return jax.device_get(self._compiled(self.leaves, batch, self.draws if draws is None else draws))


@pytest.fixture(scope="module")
def everything():
    return Case(tiny_config(), EVERYTHING)


def reference(case):
    torch_reference = pytest.importorskip("tests.torch_reference", exc_type=ImportError)
    torch_model = torch_reference.TorchDreamLLM(case.config, case.params)
    filled = [(b, d) for b, d in np.ndindex(case.batch.dream_slots.shape) if case.batch.dream_slots[b, d] >= 0]
    draws = [jax.tree.map(lambda x, at=at: np.asarray(x[at]), case.draws) for at in filled]
    documents = [document for row in case.rows for document in row]
    losses = torch_model.joint_loss(case.objective, documents, draws)
    losses[0].backward()
    return [float(loss.detach()) for loss in losses], torch_model.gradients()


@pytest.mark.parametrize("kind", ["everything", pytest.param("velocity", marks=pytest.mark.slow)])
def test_joint_loss_and_every_gradient_equal_torch(kind, request):
    if kind == "everything":
        case = request.getfixturevalue("everything")
    else:
        changes = {"schedule": ScheduleConfig(prediction_type="v_prediction"), "visual_projector": MLP}
        changes["condition_projector"] = dataclasses.replace(MLP, post_layernorm=False)
        case = Case(tiny_config(**changes), VELOCITY)
    assert 0 < np.sum(case.draws.drop[case.batch.dream_slots >= 0]) < np.sum(case.batch.dream_slots >= 0)
    (loss, lm_loss, dm_loss), want = reference(case)
    metrics, gradients = case.run()
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["lm_loss"], lm_loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["dm_loss"], dm_loss, rtol=1e-5)
    assert_same(to_torch(unflatten_dict(gradients, sep="/")), want, tolerance=3e-5)


def test_draws_depend_on_row_and_slot_alone():
    config = tiny_config()
    few, many = make_draws(config, EVERYTHING, rows=3), make_draws(config, EVERYTHING, rows=8)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:3]), few, many)
    assert len(np.unique(np.asarray(many.noise)[..., 0, 0, 0])) == 8 * DREAM_SLOTS


def test_what_is_empty_contributes_exactly_nothing(everything):
    """Rubbish in empty slots, padding and unlearned draws leaves every bit of loss and gradients as it was."""
    case, rng = everything, np.random.default_rng(5)
    batch = jax.tree.map(np.copy, case.batch)
    empty_see, empty_dream, padding = batch.see_slots < 0, batch.dream_slots < 0, batch.segment_ids == 0
    assert empty_see.any() and empty_dream.any() and padding.any()
    batch.see_images[empty_see] = rng.integers(0, 256, batch.see_images[empty_see].shape)
    batch.dream_images[empty_dream] = rng.integers(0, 256, batch.dream_images[empty_dream].shape)
    batch.tokens[padding] = rng.integers(0, 60, padding.sum())
    rubbish = lambda x: jnp.where(empty_dream.reshape(empty_dream.shape + (1,) * (x.ndim - 2)), x + 1, x)  # noqa: E731
    draws = jax.tree.map(lambda x: x if x.dtype == bool else rubbish(x), case.draws)
    for got, want in zip(jax.tree.leaves(case.run(batch, draws)), jax.tree.leaves(case.run()), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.slow
def test_packed_rows_equal_the_documents_alone(everything):
    """The same documents, one a row: the same loss and gradients."""
    case = everything
    alone = [[document] for row in case.rows for document in row]
    batch = make_batch(case.config, alone)
    # Each image keeps its draws, which belong to another row and slot now.
    flat = jax.tree.map(lambda x: np.asarray(x)[case.batch.dream_slots >= 0], case.draws)
    shape = batch.dream_slots.shape
    draws = jax.tree.map(lambda x: np.zeros((*shape, *x.shape[1:]), x.dtype), flat)
    jax.tree.map(lambda to, values: to.__setitem__(batch.dream_slots >= 0, values), draws, flat)
    metrics, gradients = case.run(batch, draws)
    want_metrics, want = case.run()
    np.testing.assert_allclose(metrics["loss"], want_metrics["loss"], rtol=1e-6)
    assert_same(gradients, want, tolerance=2e-5)


def test_stored_moments_equal_images(everything):
    case = everything
    images = case.batch.dream_images.reshape(-1, DREAM_SIZE, DREAM_SIZE, 3)
    moments = case.model.apply({"params": case.params}, images, method="moments")
    moments = np.asarray(moments).reshape(*case.batch.dream_slots.shape, *moments.shape[1:])
    batch = case.batch.replace(dream_images=None, dream_moments=moments)
    loss = jax.jit(
        lambda leaves, batch, draws: loss_and_gradients(case.model, case.objective, {}, leaves, batch, draws)[0]
    )
    np.testing.assert_allclose(loss(case.leaves, batch, case.draws)["loss"], case.run()[0]["loss"], rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lm_weight": -1.0}, "lm_weight must not be negative"),
        ({"lm_weight": 0.0, "dm_weight": 0.0}, "nothing to learn"),
        ({"drop_prob": 1.5}, "drop_prob must lie"),
        ({"snr_gamma": 0.0}, "snr_gamma must be positive"),
    ],
)
def test_impossible_objectives(settings, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**settings)
