"""A run that trains adapters: it begins as the model it begins with, its base stays, and what is exported is merged."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from dreamllm_jax.checkpoints import saved
from dreamllm_jax.data.document import Text
from dreamllm_jax.generation.texts import generate_texts
from dreamllm_jax.interop import verify
from dreamllm_jax.layers.lora import is_adapter
from dreamllm_jax.model import DreamLLM
from dreamllm_jax.runs.load import load_model, load_run
from dreamllm_jax.training.metrics import read_metrics
from tests.conversion.helpers import run as convert
from tests.lives import Life, micro
from tests.parity import relative_error

pytestmark = pytest.mark.slow
pytest.importorskip("torch")

LORA = {"rank": 2, "alpha": 3.0}
ADAPTERS = [["language_model/.*/lora_.", True], ["dream_queries/.*", True], [".*", False]]


def run(data: str, workdir: Path, lora: dict | None = None, begin: Path | None = None) -> None:
    """Trains adapters, or everything. Runs differ in as little as they can, so that they share compiled programs."""
    config = micro(
        data,
        steps=6,
        checkpoint={"every": 6},
        model={"language_model": {"lora": lora}} if begin else micro(data)["model"],
        parameters={
            "trainable": ADAPTERS if lora else [[".*", True]],
            "init_from": str(begin or ""),
            "frozen_dtype": "float32",
        },
        optimizer={"learning_rate": 0.3, "warmup_ratio": 0.0},
    )
    life = Life(config, workdir, devices=1)
    assert life.end() == 0, life.said()


def first_loss(workdir: Path) -> float:
    return read_metrics(workdir)[0]["loss"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    """A model, and adapters trained on it."""
    root = tmp_path_factory.mktemp("adapters")
    run(data, root / "base")
    run(data, root / "adapted", LORA, root / "base")
    return root


def test_the_first_loss_is_the_base_models(trained, data, tmp_path):
    run(data, tmp_path / "whole", begin=trained / "base")
    adapted, whole, base = map(first_loss, (trained / "adapted", tmp_path / "whole", trained / "base"))
    assert adapted == pytest.approx(whole, rel=1e-6)
    assert whole != pytest.approx(base, rel=1e-4)  # which began at random


def test_only_adapters_and_queries_have_moved(trained):
    base, adapted = saved.find(str(trained / "base")), saved.find(str(trained / "adapted"))
    before, after = base.read(base.leaves()), adapted.read(adapted.leaves())
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved == {"dream_queries/embedding"}
    adapters = {path: leaf for path, leaf in after.items() if is_adapter(path)}
    assert len(adapters) == 14 and all(np.any(leaf) for leaf in adapters.values())


def test_what_is_exported_is_merged_and_verified(trained, tmp_path):
    convert("export", checkpoint=trained / "adapted", format="hf", to=tmp_path / "hf")
    convert("verify", checkpoint=trained / "adapted", torch=tmp_path / "hf")
    merged = saved.find(str(trained / "adapted")).merged()
    told = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert told["model_type"] == "llama" and "lora" not in told
    assert all(one.passed for one in verify.compare(merged.config, merged.part, tmp_path / "hf"))

    base = saved.find(str(trained / "base"))
    name = "language_model/layers/mlp/up_proj/kernel"
    assert np.abs(merged.read([name])[name] - base.read([name])[name]).max() > 1e-3


def test_the_merged_model_says_the_same(trained):
    name = str(trained / "adapted")
    model, params, tokenizer = load_model(name)
    merged = saved.find(name).merged()
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device) for path, x in merged.leaves().items()}
    restored = unflatten_dict(merged.restore(wanted), sep="/")
    plain = DreamLLM(merged.config)

    tokens = jax.random.randint(jax.random.key(0), (2, 16), 3, 390)
    given = tokens, jnp.broadcast_to(jnp.arange(16), (2, 16)), jnp.ones_like(tokens)

    def logits(model, params):
        def forward(model, tokens, positions, segments):
            return model.language_model.logits(model.decode(model.embed(tokens), positions, segments)[0])

        with jax.default_matmul_precision("highest"):
            return model.apply({"params": params}, *given, method=forward)

    assert relative_error(logits(plain, restored), logits(model, params)) < 1e-5
    prompts = [[Text("a red")], [Text("the")]]
    texts = [generate_texts(*each, tokenizer, prompts, max_tokens=8) for each in ((model, params), (plain, restored))]
    assert texts[0] == texts[1]


def test_a_run_without_adapters_begins_with_the_merged_model(trained, data, tmp_path):
    """And one with the same adapters goes on with them: both have the loss of one step more."""
    run(data, tmp_path / "plain", None, trained / "adapted")
    run(data, tmp_path / "same", LORA, trained / "adapted")
    assert first_loss(tmp_path / "plain") == pytest.approx(first_loss(tmp_path / "same"), rel=1e-5)
    assert first_loss(tmp_path / "same") != pytest.approx(first_loss(trained / "adapted"), rel=1e-4)
    assert load_run(tmp_path / "plain").model.config.language_model.lora is None
