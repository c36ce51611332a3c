"""The joint loss equals its PyTorch composition, and does not depend on how its rows are arranged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from dreamllm_jax.data.batch import Slots
from dreamllm_jax.diffusion.schedule import ScheduleConfig
from dreamllm_jax.interop.names import to_torch
from dreamllm_jax.model import DreamLLM
from dreamllm_jax.objectives.images import hidden_states
from dreamllm_jax.objectives.joint import JointConfig
from dreamllm_jax.towers.image_decoders.stable_diffusion import DenoisingConfig
from dreamllm_jax.training.step import loss_and_gradients
from tests.parity import assert_same
from tests.tiny import DECODER_XL, DREAM_SIZE, DREAM_SLOTS, MLP, make_batch, random_rows, tiny_config, tiny_params

EVERYTHING = JointConfig(
    lm_weight=1.0,
    dm_weight=10.0,
    scaling="l1_norm",
    drop_prob=0.4,
    null_condition="queries",
)
NOISY = DenoisingConfig(noise_offset=0.1, input_perturbation=0.1, snr_gamma=5.0)
VELOCITY = JointConfig(
    lm_weight=0.5,
    dm_weight=2.0,
    scaling="l2_norm",
    drop_prob=0.4,
    null_condition="original",
    loss_chunk=8,
    image_chunk=1,
)


def training(**changes):
    """An image decoder with another noise process, or another training error."""
    return dataclasses.replace(tiny_config().image_decoder, **changes)


@dataclasses.dataclass
class Case:
    """A model, a batch, and the compiled joint loss with its gradients."""

    config: object
    settings: JointConfig

    def __post_init__(self):
        self.model = DreamLLM(self.config)
        self.objective = self.settings.make(self.model)
        self.params = tiny_params(self.config)
        self.leaves = flatten_dict(self.params, sep="/")
        self.rows = random_rows(self.config)
        empty = [[]] * (sum(map(len, self.rows)) - len(self.rows))  # with which there is a row for each document
        self.batch = make_batch(self.config, self.rows + empty)
        self.draw = jax.jit(self.objective.draws)
        self.draws = self.draw(jax.random.key(1), self.batch)
        self.filled = self.batch.dream[0].filled
        self._compiled = jax.jit(
            lambda leaves, batch, draws: loss_and_gradients(self.objective, leaves, {}, batch, draws)
        )

    def run(self, batch=None, draws=None):
        batch = self.batch if batch is None else batch
        return jax.device_get(self._compiled(self.leaves, batch, self.draws if draws is None else draws))


@pytest.fixture(scope="module")
def everything():
    return Case(tiny_config(image_decoder=training(training=NOISY)), EVERYTHING)


def reference(case):
    torch_reference = pytest.importorskip("tests.torch_reference", exc_type=ImportError)
    torch_model = torch_reference.TorchDreamLLM(case.config, case.params)
    draws = [jax.tree.map(lambda x, at=at: np.asarray(x[tuple(at)]), case.draws[0]) for at in np.argwhere(case.filled)]
    documents = [document for row in case.rows for document in row]
    losses = torch_model.joint_loss(case.settings, documents, draws)
    losses[0].backward()
    return [float(loss.detach()) for loss in losses], torch_model.gradients()


@pytest.mark.parametrize("kind", ["everything", *(pytest.param(k, marks=pytest.mark.slow) for k in ("velocity", "xl"))])
def test_joint_loss_and_every_gradient_equal_torch(kind, request):
    if kind == "everything":
        case = request.getfixturevalue("everything")
    elif kind == "xl":
        projector = dataclasses.replace(MLP, post_layernorm=False)
        case = Case(tiny_config(image_decoder=DECODER_XL, connector=projector), EVERYTHING)
    else:
        velocity = ScheduleConfig(prediction_type="v_prediction")
        changes = {"image_decoder": training(schedule=velocity, training=DenoisingConfig(snr_gamma=0.5))}
        changes |= {"visual_projector": MLP, "connector": dataclasses.replace(MLP, post_layernorm=False)}
        case = Case(tiny_config(**changes), VELOCITY)
    assert 0 < np.sum(case.draws[0].drop[case.filled]) < np.sum(case.filled)
    (loss, lm_loss, dm_loss), want = reference(case)
    metrics, gradients = case.run()
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["lm_loss"], lm_loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["dm_loss"], dm_loss, rtol=1e-5)
    assert_same(to_torch(unflatten_dict(gradients, sep="/")), want, tolerance=3e-5)


def test_draws_depend_on_row_and_slot_alone(everything):
    key, batch = jax.random.key(1), everything.batch  # of the case's draws
    few = jax.tree.map(lambda x: x[:3], batch)
    (few,), (many,) = everything.draw(key, few), everything.draws
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:3]), few, many)
    assert len(np.unique(np.asarray(many.decoder.noise)[..., 0, 0, 0])) == len(batch.tokens) * DREAM_SLOTS


def test_what_is_empty_contributes_exactly_nothing(everything):
    """Rubbish in empty slots, padding and unlearned draws leaves every bit of loss and gradients as it was."""
    case, rng = everything, np.random.default_rng(5)
    batch = jax.tree.map(np.copy, case.batch)
    (see,), (dream,) = batch.see, batch.dream
    empty_see, empty_dream, padding = ~see.filled, ~dream.filled, batch.segment_ids == 0
    assert empty_see.any() and empty_dream.any() and padding.any()
    see.images[empty_see] = rng.integers(0, 256, see.images[empty_see].shape)
    dream.images[empty_dream] = rng.integers(0, 256, dream.images[empty_dream].shape)
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
    flat = jax.tree.map(lambda x: np.asarray(x)[case.filled], case.draws)
    shape, filled = batch.dream[0].at.shape, batch.dream[0].filled
    draws = jax.tree.map(lambda x: np.zeros((*shape, *x.shape[1:]), x.dtype), flat)
    jax.tree.map(lambda to, values: to.__setitem__(filled, values), draws, flat)
    metrics, gradients = case.run(batch, draws)
    want_metrics, want = case.run()
    np.testing.assert_allclose(metrics["loss"], want_metrics["loss"], rtol=1e-6)
    assert_same(gradients, want, tolerance=2e-5)


def test_stored_moments_equal_images(everything):
    case = everything
    (slots,) = case.batch.dream
    store = jax.jit(lambda params, images: case.model.bind({"params": params}).image_decoder.stored(images))
    moments = store(case.params, slots.images.reshape(-1, DREAM_SIZE, DREAM_SIZE, 3))
    moments = np.asarray(moments).reshape(*slots.at.shape, *moments.shape[1:])
    batch = case.batch.replace(dream=(Slots(slots.at, moments, stored=True),))
    loss = jax.jit(lambda leaves, batch, draws: loss_and_gradients(case.objective, {}, leaves, batch, draws)[0])
    np.testing.assert_allclose(loss(case.leaves, batch, case.draws)["loss"], case.run()[0]["loss"], rtol=1e-6)


def grouped(batch):
    """The same images, each slot a group of its own."""

    def split(groups):
        one = groups[0]
        return tuple(Slots(one.at[:, [i]], one.images[:, [i]]) for i in range(one.at.shape[1]))

    return batch.replace(see=split(batch.see), dream=split(batch.dream))


def test_groups_of_slots_equal_one(everything):
    """Draws, loss and gradients do not depend on how slots are grouped."""
    case = everything
    batch = grouped(case.batch)
    draws = case.draw(jax.random.key(1), batch)
    for i, one in enumerate(draws):
        jax.tree.map(lambda got, want, i=i: np.testing.assert_array_equal(got[:, 0], want[:, i]), one, case.draws[0])
    metrics, gradients = case.run(batch, draws)
    want_metrics, want = case.run()
    np.testing.assert_allclose(metrics["loss"], want_metrics["loss"], rtol=1e-6)
    assert_same(gradients, want, tolerance=2e-5)


def test_images_of_several_sizes_share_a_row(everything):
    """A group of upright images adds the errors of its own images."""
    case, rng = everything, np.random.default_rng(2)
    key, (square,) = jax.random.key(1), case.batch.dream
    upright = rng.integers(0, 256, (len(square.at), 1, 2 * DREAM_SIZE, DREAM_SIZE, 3), np.uint8)
    at = [np.where(np.arange(DREAM_SLOTS) == i, square.at, -1) for i in range(DREAM_SLOTS)]
    both = case.batch.replace(dream=(Slots(at[0], square.images), Slots(at[1][:, 1:], upright)))

    draws = case.draw(key, both)
    assert draws[1].decoder.noise.shape[2:4] == (DREAM_SIZE, DREAM_SIZE // 2)  # latents, twice as high as wide

    @jax.jit
    def compute(leaves, batch, draws):
        """The loss, gradients that have come through all of denoiser and language model, and each group's errors."""
        first = {path: leaves[path] for path in ("image_decoder/denoiser/conv_in/kernel", "dream_queries/embedding")}
        others = {path: leaf for path, leaf in leaves.items() if path not in first}
        metrics, gradients = loss_and_gradients(case.objective, first, others, batch, draws)
        params = unflatten_dict(leaves, sep="/")
        hidden = hidden_states(case.model, params, batch)
        groups = zip(batch.dream, draws, strict=True)
        apart = [case.objective.painting_sum(params, hidden, batch.replace(dream=(g,)), (d,)) for g, d in groups]
        return metrics, gradients, apart

    metrics, gradients, apart = jax.device_get(compute(case.leaves, both, draws))
    images = sum(slots.filled.sum() for slots in both.dream)
    assert min(apart) > 0 and all(np.isfinite(x).all() and x.any() for x in gradients.values())
    np.testing.assert_allclose(metrics["dm_loss"], sum(apart) / images, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lm_weight": -1.0}, "lm_weight must not be negative"),
        ({"lm_weight": 0.0, "dm_weight": 0.0}, "nothing to learn"),
        ({"drop_prob": 1.5}, "drop_prob must lie"),
    ],
)
def test_impossible_objectives(settings, message):
    with pytest.raises(ValueError, match=message):
        JointConfig(**settings)
    with pytest.raises(ValueError, match="snr_gamma must be positive"):
        DenoisingConfig(snr_gamma=0.0)


def test_worse_answers_count_for_nothing(everything):
    batch, objective = everything.batch, everything.objective
    worse = batch.replace(loss_weights=np.where(batch.segment_ids == 1, 1, -1) * batch.loss_weights)
    without = batch.replace(loss_weights=np.where(batch.segment_ids == 1, batch.loss_weights, 0))
    assert objective.totals(worse).tokens == objective.totals(without).tokens > 0
    assert everything.run(worse)[0]["lm_loss"] == everything.run(without)[0]["lm_loss"]
