"""Losses on held-out documents are the training's own, at draws that never change."""

import dataclasses
import json
import shutil
import time

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dreamllm_jax.common.configuration import ConfigError
from dreamllm_jax.data import storage
from dreamllm_jax.experiment.experiment import read_experiment
from dreamllm_jax.model import DreamLLM
from dreamllm_jax.objectives.joint import JointConfig
from dreamllm_jax.parallel.feeding import rows_sharding
from dreamllm_jax.parallel.mesh import make_mesh
from dreamllm_jax.runs.start import start_run
from dreamllm_jax.towers.image_decoders.stable_diffusion import DenoisingConfig
from dreamllm_jax.training import held_out, loop, validation
from dreamllm_jax.training.state import TrainState
from tests.lives import micro
from tests.tiny import make_batch, random_rows, tiny_config, tiny_params

TIMESTEPS = 1000


def test_buckets_divide_the_timesteps():
    config = tiny_config()
    objective, decoder = JointConfig().make(DreamLLM(config)), config.image_decoder
    draws = objective.draws(jax.random.key(0), make_batch(config, random_rows(config)))[0].decoder
    for buckets in (1, 3, 4):
        edges = [TIMESTEPS * edge // buckets for edge in range(buckets + 1)]
        moved = [decoder.within(draws, i, buckets).timesteps for i in range(buckets)]
        for found, first, end in zip(moved, edges[:-1], edges[1:], strict=True):
            assert first <= found.min() and found.max() < end and len(np.unique(found)) > 4
    np.testing.assert_array_equal(decoder.within(draws, 0, 1).timesteps, draws.timesteps)


@pytest.mark.slow
def test_losses_are_the_objectives():
    plain, noisy = tiny_config(), DenoisingConfig(snr_gamma=5.0, noise_offset=0.1, input_perturbation=0.1)
    config = dataclasses.replace(plain, image_decoder=dataclasses.replace(plain.image_decoder, training=noisy))
    params, key = tiny_params(config), jax.random.key(1)
    state = TrainState(0, flatten_dict(params, sep="/"), None, {})
    objective = JointConfig(drop_prob=0.5)
    batches = [make_batch(config, random_rows(config, seed)) for seed in (0, 1)]
    joint, decoder = JointConfig().make(DreamLLM(plain)), plain.image_decoder

    def wanted(batch, number: int, bucket: int, buckets: int) -> dict[str, float]:
        (draws,) = joint.draws(jax.random.fold_in(key, number), batch)
        draws = draws.replace(decoder=decoder.within(draws.decoder, bucket, buckets))
        return jax.device_get(jax.jit(joint.loss)(params, batch, (draws,))[1])

    losses = objective.held_out(config, 2)
    found = validation.validate(losses, jax.jit(validation.make_sums(losses)), state, batches, key)
    assert set(found) == {"lm_loss", "dm_loss", "dm_loss_0_499", "dm_loss_500_999"}
    tokens = [batch.loss_weights.sum() for batch in batches]
    images = [batch.dream[0].filled.sum() for batch in batches]
    for bucket, name in enumerate(("dm_loss_0_499", "dm_loss_500_999")):
        want = [wanted(batch, number, bucket, 2) for number, batch in enumerate(batches)]
        assert found[name] == pytest.approx(np.average([w["dm_loss"] for w in want], weights=images), rel=1e-5)
        assert found["lm_loss"] == pytest.approx(np.average([w["lm_loss"] for w in want], weights=tokens), rel=1e-5)
    assert found["dm_loss"] == pytest.approx((found["dm_loss_0_499"] + found["dm_loss_500_999"]) / 2)


@pytest.mark.slow
def test_a_continued_run_validates_alike(data, tmp_path, monkeypatch):
    settings = {"steps": 8, "checkpoint": {"every": 4}, "validation": {"every": 4, "path": data, "buckets": 1}}

    def train() -> list[dict]:
        run = start_run(micro(data, **settings), tmp_path)
        loop.train(run.experiment, run.tokenizer, run.workdir)
        return [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]

    first = train()
    assert [line["step"] for line in first] == [4, 8]
    assert len(first[0]) == 4 and all(first[0][name] != first[1][name] for name in first[0])
    shutil.rmtree(tmp_path / "checkpoints" / "8")  # it goes on from 4
    assert train() == first
    # Killed after a checkpoint and before it looked: it does when it continues, and at the end.
    (tmp_path / "validation.jsonl").write_text("")
    shutil.rmtree(tmp_path / "checkpoints" / "8")
    assert train() == first
    (tmp_path / "validation.jsonl").write_text(json.dumps(first[0]) + "\n")
    assert train() == first
    monkeypatch.setattr(held_out, "validate", None)  # done is done
    assert train() == first


def test_validation_needs_documents(tmp_path):
    with pytest.raises(ConfigError, match="every needs path"):
        read_experiment(micro("somewhere", validation={"every": 4}))
    with pytest.raises(FileNotFoundError, match="no data set in"):
        run = read_experiment(micro("x", validation={"every": 1, "path": str(tmp_path)}))
        held_out.HeldOut(run, None, rows_sharding(make_mesh(run.sharding), run.sharding, run.rows.per_step))


def test_held_out_documents_are_read_together(data, tmp_path, monkeypatch):
    under_way, most, read = set(), [], storage.Corpus._read

    def slowly(corpus, index):
        under_way.add(mine := object())
        most.append(len(under_way))
        time.sleep(0.05)
        under_way.remove(mine)
        return read(corpus, index)

    monkeypatch.setattr(storage, "KEPT_BYTES", 0)
    monkeypatch.setattr(storage.Corpus, "_read", slowly)
    documents = {"path": data, "corpora": {"pairs": {}}, "window": 16}
    run = start_run(micro(data, data=documents, validation={"every": 4, "path": data}), tmp_path)
    rows = rows_sharding(make_mesh(run.experiment.sharding), run.experiment.sharding, run.experiment.rows.per_step)
    assert len(held_out.HeldOut(run.experiment, run.tokenizer, rows).batches) == 1
    assert max(most) > 8  # which are tried together
