"""The 7B llama compiled for slices of TPUs: memory, FLOPs and traffic of what a pod would run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


WHOLE_RECIPES = pytest.mark.skipif(
    "DREAMLLM_JAX_ALL_RECIPES" not in os.environ, reason="set it to compile whole recipes, for half an hour"
)
WITHOUT_IMAGES = ["--config.rows.see_slots=0", "--config.rows.dream_slots=0"]


def plan(tmp_path, arguments, config="stage2_igpt.py:7b"):
    """Figures of a configuration, compiled at low effort."""
    pytest.importorskip("libtpu")
    figures = tmp_path / "plan.json"
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    command = [sys.executable, "-m", "dreamllm_jax.plan", f"--config=configs/{config}", "--effort=low"]
    done = subprocess.run(
        [*command, f"--json={figures}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(figures.read_text())


FEEDS = """
import json, sys
from dreamllm_jax.parallel.chips import find_topology
from dreamllm_jax.parallel.mesh import ShardingConfig, make_mesh
from dreamllm_jax.parallel.feeding import local_rows, rows_sharding
for name, sizes in json.loads(sys.argv[1]):
    devices, config = find_topology(name).devices(), ShardingConfig(**sizes)
    mesh = make_mesh(config, devices)
    rows = 2 * mesh.shape["data"] * mesh.shape["fsdp"]
    sharding = rows_sharding(mesh, config, rows)
    held = {device: index[0].indices(rows)[:2] for device, index in sharding.devices_indices_map((rows,)).items()}
    hosts = {device.process_index for device in devices}
    feeds = {host: local_rows(sharding, rows, host) for host in hosts}
    whole = all(set(range(*span)) <= set(feeds[device.process_index]) for device, span in held.items())
    print(json.dumps([len(hosts), whole, sorted(row for feed in feeds.values() for row in feed), rows]))
"""


@pytest.mark.slow
def test_every_host_of_a_slice_feeds_what_its_chips_hold():
    """A host is a square of chips, its rows are not one block: see `local_rows`. And every mesh can be laid out."""
    pytest.importorskip("libtpu")
    meshes = [(name, {}) for name in ("v5p-16", "v5p-128", "v4-128", "v5e-16", "v5e-256", "v6e-64")]
    meshes += [("v5p-16x2", {"data": 2}), ("v5p-128", {"data": 2}), ("v5p-128", {"fsdp": 8, "tensor": 8})]
    meshes += [(name, {"tensor": 2}) for name in ("v5p-128", "v5e-16", "v6e-64")]
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    command = [sys.executable, "-c", FEEDS, json.dumps(meshes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    for (name, sizes), line in zip(meshes, done.stdout.splitlines(), strict=True):
        hosts, whole, fed, rows = json.loads(line)
        assert hosts > 1 and whole and set(fed) == set(range(rows)), name
        assert len(fed) == rows or "fsdp" in sizes, name  # only where a row's parts lie on several hosts they share it


@pytest.mark.slow
def test_gradients_are_added_up_in_float32_and_travel_once():
    """Of a small model of which everything is trained: see `layers.linear` and `parallel.chunks`."""
    pytest.importorskip("libtpu")
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    environment |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    command = [sys.executable, "-m", "tests.narrow_sums"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.slow
def test_eight_chips_of_v5p(tmp_path):
    """Weights travel twice and gradients once, in bfloat16; logits and attention scores are never whole."""
    figures = plan(tmp_path, ["--topology=v5p-16", "--rows_per_chip=8", *WITHOUT_IMAGES])
    parameters = sum(one["count"] for one in figures["parameters"] if one["part"] == "language_model")
    sent = sum(one["bytes"] for one in figures["collectives"])
    assert 3 * 2 * parameters * 7 / 8 == pytest.approx(sent, rel=0.25) and sent < 39e9
    assert {one["axis"] for one in figures["collectives"] if one["bytes"] > 2**20} == {"fsdp"}
    assert figures["compiled_flops"] == pytest.approx(figures["flops"]["total"] - figures["kernel_flops"], rel=0.03)
    assert figures["compiled_flops"] < 8 * 825e12
    assert figures["hbm"]["peak"] < 22 * 2**30
    # float32 weights and moments lie on one chip each; a second whole copy of anything large would show.
    assert figures["hbm"]["weights"] + figures["hbm"]["optimizer"] < 1.05 * 12 * parameters / 8 + 2**29


@pytest.mark.slow
@pytest.mark.timeout(1800)
@WHOLE_RECIPES
def test_stage_two_with_all_towers(tmp_path):
    """Images add little to what is sent; the U-Net multiplies less than MaxDiffusion's 13.8 TFLOP for 8 images."""
    figures = plan(tmp_path, ["--topology=v5p-16"])
    assert_fits(figures)
    assert figures["rows_per_chip"] == 8 and figures["hbm"]["peak"] < 22 * 2**30
    assert sum(one["bytes"] for one in figures["collectives"]) < 46.5e9
    assert figures["flops"]["denoiser"] / (64 * 4 / 8) < 13.8e12


@pytest.mark.slow
def test_parts_of_heads_and_of_rows(tmp_path):
    split = [
        "--config.sharding.tensor=2",
        "--config.sharding.sequence=2",
        "--config.model.language_model.num_hidden_layers=2",
    ]
    figures = plan(tmp_path, ["--topology=v5p-16", "--rows_per_chip=4", *split, *WITHOUT_IMAGES])
    assert figures["mesh"] == {"data": 1, "fsdp": 2, "sequence": 2, "tensor": 2}
    for axis in ("fsdp", "sequence", "tensor"):
        assert any(axis in one["axis"] for one in figures["collectives"]), axis
    assert figures["compiled_flops"] == pytest.approx(figures["flops"]["total"] - figures["kernel_flops"], rel=0.03)


def assert_fits(figures):
    assert figures["fits"]
    assert figures["compiled_flops"] == pytest.approx(figures["flops"]["total"] - figures["kernel_flops"], rel=0.03)


@pytest.mark.slow
@WHOLE_RECIPES
@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        ("stage1_comprehension.py:7b", ["--topology=v5e-8"]),
        ("stage2_igpt.py:llm=llama31-8b,lora=64", ["--topology=v5e-16", *WITHOUT_IMAGES]),
        ("small.py", ["--topology=v5e-1", "--config.rows.dream_slots=0"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_recipes_fit_their_slices(config, arguments, tmp_path):
    """Without the UNet, whose backward pass takes minutes to compile."""
    figures = plan(tmp_path, arguments, config)
    assert_fits(figures)
    assert figures["hbm"]["optimizer"] < 2 * 2**30  # of adapters, embeddings or projectors alone


@pytest.mark.slow
@pytest.mark.timeout(7200)
@WHOLE_RECIPES
@pytest.mark.parametrize(
    ("config", "topology"),
    [
        ("small.py", "v5e-1"),
        ("stage1_creation.py:7b", "v5e-8"),
        ("stage1_joint.py:7b", "v5e-8"),
        ("stage3_sft.py:7b", "v5p-16"),
        ("stage1_comprehension.py:13b", "v5e-16"),
        ("stage1_creation.py:13b", "v5e-16"),
        ("stage1_joint.py:13b", "v5e-16"),
        ("stage2_igpt.py:13b", "v5p-32"),
        ("stage3_sft.py:13b", "v5p-32"),
    ],
)
def test_whole_recipes_fit_their_slices(config, topology, tmp_path):
    assert_fits(plan(tmp_path, [f"--topology={topology}"], config))
