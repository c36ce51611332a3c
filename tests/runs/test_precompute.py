"""What frozen towers made of images beforehand stands for the images: the same loss, and nothing mixed up."""

import dataclasses
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath
from flax.traverse_util import flatten_dict

from dreamllm_jax.checkpoints.marks import require_same_towers
from dreamllm_jax.checkpoints.saved import write_description, write_params
from dreamllm_jax.data import __main__ as data_commands
from dreamllm_jax.data import storage, stored
from dreamllm_jax.data.batch import Batch, RowShape, SlotGroup
from dreamllm_jax.data.corpora.compose import compose
from dreamllm_jax.data.document import Document, Image, Text
from dreamllm_jax.data.images import to_png
from dreamllm_jax.data.loader import Loader
from dreamllm_jax.data.settings import DataConfig
from dreamllm_jax.data.tokenizer import train_tokenizer
from dreamllm_jax.model import DreamLLM
from dreamllm_jax.objectives.joint import JointConfig
from dreamllm_jax.runs.precompute import precompute
from tests import processes
from tests.tiny import DREAM_SIZE, SEE_SIZE, tiny_config, tiny_params

CORPORA = ("pairs", "interleaved")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A model, a data set that holds one broken picture, and the stored arrays of its two corpora in float32."""
    rng = np.random.default_rng(0)
    from PIL import Image as Picture

    pictures = [to_png(Picture.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8))) for _ in range(9)]
    corpora = {name: compose([(data, f"noise {i}") for i, data in enumerate(pictures)])[name] for name in CORPORA}
    corpora["pairs"].append(Document("pair", (Text("broken"), Image(pictures[0][:-40]))))
    tokenizer = train_tokenizer(["noise broken"] * 20, 300)
    config = tiny_config(
        special_tokens=tokenizer.special,
        language_model=dataclasses.replace(tiny_config().language_model, vocab_size=tokenizer.vocab_size),
    )
    model, params = DreamLLM(config), tiny_params(config)
    path = tmp_path_factory.mktemp("stored") / "set"
    storage.write_dataset(path, corpora, tokenizer)
    for corpus in CORPORA:
        for name in stored.NAMES:
            compute(path, corpus, name, model, params)
    return path, tokenizer, model, params


def compute(path, corpus, name, model, params, **options):
    options = {"made_by": "the tiny model", "size": DREAM_SIZE, "dtype": "float32", "batch": 2} | options
    return precompute(path, corpus, name, model, params, **options)


def batches(case, names=(), dtype="float32", count=3, **options) -> list[Batch]:
    path, tokenizer, model, _ = case
    encoder, decoder = model.config.vision_encoder, model.config.image_decoder
    features = encoder.stored_shape(SEE_SIZE, SEE_SIZE) if "features" in names else ()
    moments = decoder.stored_shape(DREAM_SIZE, DREAM_SIZE) if "moments" in names else ()
    see = SlotGroup(4, encoder.num_patches, SEE_SIZE, SEE_SIZE, features, dtype)
    dream = SlotGroup(4, model.config.num_queries, DREAM_SIZE, DREAM_SIZE, moments, dtype)
    shape = RowShape(96, (see,), (dream,))
    config = DataConfig(path=str(path), window=4, stored=names, stored_dtype=dtype, max_bad=1.0, **options)
    loader = Loader(config, shape, tokenizer, encoder.preprocess, decoder.preprocess, rows_per_step=4, seed=0)
    taken = [next(loader) for _ in range(count)]
    loader.close()
    return taken


@pytest.fixture(scope="module")
def losses(case):
    """What the model's joint loss is of each of some batches."""
    *_, model, params = case
    objective = JointConfig().make(model)

    @jax.jit
    def loss(params, batch, index):
        return objective.loss(params, batch, objective.draws(jax.random.key(index), batch))[0]

    return lambda given: [float(loss(params, batch, index)) for index, batch in enumerate(given)]


@pytest.mark.slow
def test_the_loss_is_the_same(case, losses, capsys):
    live = batches(case)
    expected = losses(live)
    for names in (("moments",), ("moments", "features")):
        given = batches(case, names)
        for batch, like in zip(given, live, strict=True):
            assert batch.dream[0].stored and batch.see[0].stored == ("features" in names)
            for field in ("tokens", "loss_weights"):
                np.testing.assert_array_equal(getattr(batch, field), getattr(like, field))
            for slots, others in zip(batch.see + batch.dream, like.see + like.dream, strict=True):
                np.testing.assert_array_equal(slots.at, others.at)
        np.testing.assert_allclose(losses(given), expected, rtol=1e-5)
    # Stored in half as many bits, as is the default.
    rounded = [
        jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == np.float32 and x.ndim > 2 else x, one)
        for one in given
    ]
    difference = np.abs(np.divide(losses(rounded), expected) - 1)
    with capsys.disabled():
        print(f"\nrelative differences of losses from bfloat16 storage: {difference}")
    assert 0 < difference.max() < 2e-3


def test_what_cannot_be_decoded_or_is_not_finite_is_dropped(case):
    path, *_ = case
    arrays = stored.Stored(path, "pairs", "moments", (8, 8, 8), "float32", 10)
    assert np.isnan(arrays[9]).all() and all(np.isfinite(arrays[i]).all() for i in range(9))
    given = batches(case, ("moments", "features"))
    for batch in given:
        assert all(np.isfinite(slots.images).all() for slots in batch.see + batch.dream)


def test_an_interrupted_run_goes_on(case, tmp_path, monkeypatch):
    """Files that are there are kept as they are, the others are computed, and all equals the undisturbed run."""
    path, _, model, params = case
    monkeypatch.setattr(stored, "PART", 4)
    copy = tmp_path / "set"
    storage.write_dataset(copy, {"pairs": [storage.Corpus(path, "pairs")[i] for i in range(10)]})
    assert compute(copy, "pairs", "moments", model, params) == 10
    folder = stored.folder(copy, "pairs", "moments")
    parts = sorted(folder.glob("part-*"))
    before = [part.read_bytes() for part in parts]
    assert len(parts) == 3
    description = stored.read_description(folder)
    stored.write_description(folder, dataclasses.replace(description, complete=False))
    parts[1].unlink()
    kept = os.stat(parts[0]).st_mtime_ns
    with pytest.raises(FileNotFoundError, match=r"corpus 'pairs' .* has no stored moments; compute them: python -m"):
        stored.Stored(copy, "pairs", "moments", (8, 8, 8), "float32", 10)
    with pytest.raises(ValueError, match="were made by the tiny model, whose weights differ"):
        compute(copy, "pairs", "moments", model, tiny_params(model.config, seed=1), made_by="another")
    assert compute(copy, "pairs", "moments", model, params) == 4
    assert [part.read_bytes() for part in parts] == before and os.stat(parts[0]).st_mtime_ns == kept
    assert compute(copy, "pairs", "moments", model, params) == 0


def test_other_shapes_types_and_models_are_refused(case):
    path, _, model, params = case
    with pytest.raises(ValueError, match="remove it to compute others"):
        compute(path, "pairs", "moments", model, params, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"have the type float32, this run needs bfloat16; remove"):
        batches(case, ("moments",), dtype="bfloat16")
    leaves, config = flatten_dict(params, sep="/"), model.config
    rng = np.random.default_rng(0)
    tuned = {path: leaf * (1 + 0.03 * rng.normal(size=leaf.shape)) for path, leaf in leaves.items()}
    for name in stored.NAMES:
        require_same_towers(path, "pairs", name, config, leaves)
        rounded = {path: jnp.asarray(leaf, jnp.bfloat16) for path, leaf in leaves.items()}
        require_same_towers(path, "pairs", name, config, rounded)
        with pytest.raises(
            ValueError, match=f"stored {name} of corpus 'pairs' were made by the tiny model, whose weights differ"
        ):
            require_same_towers(path, "pairs", name, config, tuned)
    last = dataclasses.replace(config, vision_encoder=dataclasses.replace(config.vision_encoder, select_layer=-1))
    with pytest.raises(
        ValueError, match=r"whose vision_encoder\.select_layer is -2, and here -1: leave features out of"
    ):
        require_same_towers(path, "pairs", "features", last, leaves)


def test_only_what_the_stored_arrays_depend_on_must_be_the_same(case):
    """They are not scaled yet: models may differ in that, whatever the stored description says of it."""
    path, _, model, params = case
    leaves, decoder = flatten_dict(params, sep="/"), model.config.image_decoder
    folder = stored.folder(path, "pairs", "moments")
    description = stored.read_description(folder)

    def check(**changed):
        autoencoder = dataclasses.replace(decoder.autoencoder, **changed)
        config = dataclasses.replace(model.config, image_decoder=dataclasses.replace(decoder, autoencoder=autoencoder))
        require_same_towers(path, "pairs", "moments", config, leaves)

    check(scaling_factor=0.5, shift_factor=0.1, sample_size=64)
    told = description.tower | {"autoencoder.scaling_factor": 0.7}
    stored.write_description(folder, dataclasses.replace(description, tower=told))
    check()
    stored.write_description(folder, description)
    with pytest.raises(ValueError, match=r"whose image_decoder\.autoencoder\.norm_num_groups is 4, and here 2: leave"):
        check(norm_num_groups=2)


def with_small_files():
    """The commands of `data`, with three documents in a file."""
    stored.PART = 3
    return data_commands.parser()


@pytest.mark.slow
def test_hosts_share_the_files(case, tmp_path):
    path, tokenizer, model, params = case
    copy = Path(shutil.copytree(path, tmp_path / "set", ignore=shutil.ignore_patterns("stored")))
    write_description(epath.Path(tmp_path / "model"), model.config, tokenizer)
    write_params(epath.Path(tmp_path / "model"), flatten_dict(params, sep="/"))
    words = ["precompute", str(copy), f"--checkpoint={tmp_path / 'model'}", "--corpora", "pairs", "--batch=2"]
    assert processes.finish_together([*words, f"--size={DREAM_SIZE}", "--dtype=float32"], 2, with_small_files) == [0, 0]
    files = {file.name: file for file in stored.folder(copy, "pairs", "moments").glob("part-*")}
    assert len(files) == 4 and stored.read_description(stored.folder(copy, "pairs", "moments")).documents == 10
    got = [record for name in sorted(files) for record in records(files[name])]
    (alone,) = stored.folder(path, "pairs", "moments").glob("part-*")
    for mine, want in zip(got, records(alone), strict=True):
        np.testing.assert_allclose(*(np.frombuffer(r, np.float32) for r in (mine, want)), rtol=1e-5, atol=1e-6)


def records(file) -> list[bytes]:
    source = ArrayRecordDataSource(str(file))
    return source.__getitems__(range(len(source)))
