"""The plan command: names of slices, figures of a step, the search for what fits, refusals in one line."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from dreamllm_jax.data.batch import empty_batch
from dreamllm_jax.parallel import chips
from dreamllm_jax.parallel.chips import chip_of, find_topology
from dreamllm_jax.parallel.feeding import rows_sharding, to_mesh
from dreamllm_jax.parallel.mesh import ShardingConfig, make_mesh
from dreamllm_jax.planning import search
from dreamllm_jax.planning import step as planning_step
from dreamllm_jax.planning.estimate import as_json, describe, estimate, remedy
from dreamllm_jax.planning.program import Collective, Program
from dreamllm_jax.planning.step import CompiledStep, Memory, compile_step, exhausted, lower_step
from dreamllm_jax.training.metrics import Progress
from dreamllm_jax.training.parameters import Parameters
from tests.experiment.test_flops import experiment

ROOT = Path(__file__).parents[2]
KEYS = {"fits", "topology", "chips", "hbm", "flops", "estimated", "collectives", "compile_seconds", "rows_per_chip"}


@pytest.mark.parametrize(
    ("name", "kind", "shape", "slices", "count"),
    [
        ("v5p-16", "v5p", "2x2x2", 1, 8),
        ("v5p-32", "v5p", "2x2x4", 1, 16),
        ("v5p-128", "v5p", "4x4x4", 1, 64),
        ("v5p-128x2", "v5p", "4x4x4", 2, 128),
        ("v4-16", "v4", "2x2x2", 1, 8),
        ("v5e-16", "v5e", "4x4", 1, 16),
        ("v5litepod-8", "v5e", "2x4", 1, 8),
        ("v6e-256", "v6e", "16x16", 1, 256),
        ("v5p:2x2x4", "v5p", "2x2x4", 1, 16),
        ("v5e:2x4x3", "v5e", "2x4", 3, 24),
    ],
)
def test_names_of_slices(name, kind, shape, slices, count):
    topology = find_topology(name)
    assert (topology.chip.kind, topology.shape, topology.slices, topology.chips) == (kind, shape, slices, count)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5p-24", "'v5p-24' is no slice of v5p: there are v5p-8, v5p-16, v5p-32"),
        ("v5p", "'v5p' is no slice of v5p: there are v5p-8"),
        ("v5-16", "no chip 'v5': there are v4, v5e, v5p, v6e; is it v5"),
        ("v5p:4x4", "'v5p:4x4': a slice of v5p has 3 sides, as 2x2x4"),
        ("v5p-16x0", "'v5p-16x0': the number of slices must be positive"),
        ("sixteen chips", "'sixteen chips' is no slice of TPU chips; write it as v5p-128"),
    ],
)
def test_unknown_names_are_refused(name, message):
    with pytest.raises(ValueError) as error:
        find_topology(name)
    assert message in str(error.value)


def test_without_the_compiler_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ImportError, match=r'pip install "dreamllm_jax\[tpu\]"'):
        find_topology("v5p-16").devices()


def test_chips_are_known_by_their_devices():
    assert chip_of(SimpleNamespace(device_kind="TPU v5 lite")).kind == "v5e"
    assert chip_of(SimpleNamespace(device_kind="TPU v5")).kind == "v5p"
    assert chip_of(jax.devices()[0]) is None


def test_what_the_compiler_says_of_memory():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (21.50G) exceeds "
        "available HBM (15.75G)."
    )
    assert exhausted(message) == (21.5 * 2**30, 15.75 * 2**30)
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 768.5M of 512M hbm. Exceeded"
    assert exhausted(message) == (768.5 * 2**20, 512 * 2**20)
    with pytest.raises(RuntimeError, match="INTERNAL"):
        exhausted("INTERNAL: something else")


def test_meshes_and_rows_are_refused_before_compilation():
    devices = jax.devices()
    with pytest.raises(ValueError, match=r"rows\.per_step=4 does not divide over sharding\.data=1 x sharding\.fsdp=8"):
        lower_step(experiment(), devices)
    with pytest.raises(ValueError, match=r"does not fit 8 devices: change sharding"):
        lower_step(dataclasses.replace(experiment(), sharding=ShardingConfig(fsdp=3)), devices)


class Device:
    """A chip of one of several slices."""

    platform, device_kind, process_index, core_on_chip = "tpu", "TPU test", 0, 0

    def __init__(self, id, slice_index):
        self.id, self.slice_index, self.coords = id, slice_index, (id % 4, 0, 0)

    def __repr__(self):
        return f"{self.slice_index}:{self.id}"


def test_data_crosses_slices():
    devices = [Device(i, i // 4) for i in range(8)]
    mesh = make_mesh(ShardingConfig(data=4), devices)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "sequence": 1, "tensor": 1}
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {0}, {1}, {1}]
    with pytest.raises(ValueError, match=r"sharding\.data=1 must be a multiple of the 2 slices"):
        make_mesh(ShardingConfig(), devices)


def compiled(peak=2**30, effort="normal", topology="v5p-16x2", collectives=(), loops=(), **changes):
    program = Program({"": 1e12}, 459e12 / 4, 1.75e9 / 2, 0.0, tuple(collectives), loops)
    memory = Memory(find_topology(topology).chip.hbm_bytes, peak, 2**28, 2**29, 2**20)
    return CompiledStep(
        experiment(**changes),
        find_topology(topology),
        effort,
        {"data": 2, "fsdp": 8, "sequence": 1, "tensor": 1},
        (Parameters("language_model", 10, "float32", True),),
        memory,
        program if memory.fits else None,
        1.0,
    )


def test_times_follow_the_rule():
    inside, across = Collective("all-gather", "fsdp", False, 1, 1200e9), Collective("all-reduce", "data", True, 1, 25e9)
    one = estimate(compiled())
    assert one.compute_seconds == one.step_seconds == pytest.approx(0.5 + 0.5)
    both = estimate(compiled(collectives=[inside, across]))
    assert (both.ici_seconds, both.dcn_seconds, both.step_seconds) == pytest.approx((2.0, 4.0, 4.0))
    assert both.mfu == pytest.approx(one.mfu / 4) and both.chip_hours == pytest.approx(10 * 4 * 16 / 3600)


def test_figures_as_json_and_as_text():
    figures = json.loads(json.dumps(as_json(compiled())))
    assert figures.keys() >= KEYS
    assert figures["hbm"] == {
        "limit": int(95.74 * 2**30),
        "peak": 2**30,
        "weights": 2**28,
        "optimizer": 2**29,
        "next_batch": 2**20,
        "temporaries": 2**28 - 2**20,
    }
    assert figures["flops"].keys() == {
        "total",
        "language_model",
        "vision_encoder",
        "connector",
        "autoencoder",
        "denoiser",
        "head",
    }
    assert figures["rows_per_chip"] == 4 / 16 and figures["fits"]
    text = describe(compiled())
    assert "v5p-16x2: 16 chips of v5p (2 slices of 2x2x2), mesh data 2 x fsdp 8" in text and "chip-hours" in text
    assert "unknown length" not in text and "unknown length, counted once: 1" in describe(compiled(loops=("while.1",)))

    rough = as_json(compiled(effort="low"))["estimated"]
    assert {"step_seconds", "mfu", "tokens_per_second", "images_per_second"} <= rough.keys()
    assert set(rough.values()) == {None} and "time not estimated" in describe(compiled(effort="low"))


def test_what_does_not_fit_is_told_with_what_to_change():
    step = compiled(peak=200 * 2**30)
    assert as_json(step)["fits"] is False and as_json(step)["collectives"] == []
    assert "does not fit" in describe(step)
    line = remedy(step)
    assert "\n" not in line and "needs 200.0 GiB a chip" in line and "a v5p has 95.7" in line
    assert "set model.remat=full" in line and "larger topology" in line


@pytest.mark.parametrize("needed", [7 * 2**30, None], ids=["fits", "does not fit"])
def test_the_batch_of_the_next_step_is_counted(monkeypatch, needed):
    """With its own batch a step needs so much; the next one's lies there too."""
    tried, topology = experiment(rows={"per_step": 8}), find_topology("v5e-8")
    mesh, state, _ = lower_step(tried, jax.devices())
    rows = rows_sharding(mesh, tried.sharding, 8)
    leaves = jax.tree.leaves(to_mesh(empty_batch(8, tried.row_shape), rows, 8))
    batch = sum(leaf.addressable_data(0).nbytes for leaf in leaves)

    class Lowered:
        def compile(self, compiler_options):
            if needed is None:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 20G of 15.75G hbm")
            analysis = SimpleNamespace(peak_memory_in_bytes=needed)
            return SimpleNamespace(memory_analysis=lambda: analysis, as_text=str)

    monkeypatch.setattr(type(topology), "devices", lambda _: jax.devices())
    monkeypatch.setattr(planning_step, "lower_step", lambda *_: (mesh, state, Lowered()))
    monkeypatch.setattr(planning_step, "read_program", lambda *_: None)
    memory = compile_step(tried, topology).memory
    assert memory.next_batch == batch > 2 * tried.rows.dream_slots * tried.rows.dream_size**2
    assert memory.peak == (needed or 20 * 2**30) + batch and memory.fits == bool(needed)


@pytest.mark.parametrize(
    ("capacity", "rows", "remat"),
    [
        (60, 2, "full"),  # fewer rows than the configuration's 4
        (200, 8, "full"),
        (700, 16, "dots"),
        (310, 8, "attention+gate"),  # 16 rows, and 8 with "dots", seem to fit at low effort
        (15, 1, "full"),  # not even this fits
    ],
)
def test_fit_takes_the_largest_batch_then_the_cheapest_recomputation(monkeypatch, capacity, rows, remat):
    costs = {"none": 60, "dots": 40, "attention+gate": 38, "attention": 36, "full": 20}  # of a row in a shard

    def compile_for(trial, topology, effort):
        need = trial.rows.per_step // 8 * costs[trial.model.remat] * (0.9 if effort == "low" else 1)
        return SimpleNamespace(
            experiment=trial, effort=effort, memory=SimpleNamespace(fits=need <= capacity, peak=need, limit=capacity)
        )

    monkeypatch.setattr(search, "compile_step", compile_for)
    monkeypatch.setattr(search, "_row_shards", lambda *_: 8)
    monkeypatch.setattr(search, "_MAX_ROWS_PER_SHARD", 16)
    step = search.fit(experiment(rows={"per_step": 32}), find_topology("v5e-8"))
    assert (step.experiment.rows.per_step, step.experiment.model.remat) == (rows * 8, remat)
    assert step.memory.fits == (capacity > 15) == (step.effort == "normal")


LOSSES = ("loss", "lm_loss", "dm_loss")


def test_progress_tells_flops_and_utilisation():
    now = iter([0.0, 2.0, 2.0])
    scalars = dict.fromkeys(LOSSES, 1.0)
    known = Progress(10, LOSSES, 50e12, 200e12, lambda: next(now))
    steps = [{"tokens": 2, "images": 1}] * 4
    rates = known.rates(steps)
    assert rates["tflops_per_second_per_chip"] == 100 and rates["mfu"] == 0.5
    assert "100 TFLOP/s/chip (MFU 50.0%)" in known.line(4, scalars | rates)
    now = iter([0.0, 2.0, 2.0])
    unknown = Progress(10, LOSSES, 50e12, None, lambda: next(now))
    rates = unknown.rates(steps)
    assert "mfu" not in rates and "MFU" not in unknown.line(4, scalars | rates)


def test_a_step_that_was_compiled_counts_in_no_rate():
    step = {"tokens": 6, "images": 3}

    def progress(*times):
        now = iter(times)
        found = Progress(10, LOSSES, 50e12, 200e12, lambda: next(now))
        found.restart(untimed=1)
        return found

    one = progress(0.0, 100.0, 100.0, 100.0, 103.0, 103.0)
    assert one.rates([step]) == {} and "tokens/s" not in one.line(1, dict.fromkeys(LOSSES, 1.0))
    for rates in (one.rates([step] * 3), progress(0.0, 100.0, 103.0, 103.0).rates([step] * 4)):
        assert rates["seconds_per_step"] == 1 and rates["tokens_per_second"] == 6


CONFIG = """
from ml_collections import ConfigDict
import sys
sys.path.insert(0, {root!r})
from configs import tiny

def get_config(arg=""):
    config = tiny.get_config()
    config.model.language_model.hidden_size = 512  # narrower columns would be padded to the width of a register
    config.rows = {{"per_step": 16, "length": 128, "see_slots": 0, "dream_slots": 0, "dream_size": 32}}
    config.sharding = {{"data": 2, "fsdp": -1, "sequence": 1, "tensor": 1}}
    config.data.path = ""
    return config
"""


def plan(tmp_path, *arguments):
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(root=str(ROOT)))
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    return subprocess.run(
        [sys.executable, "-m", "dreamllm_jax.plan", f"--config={config}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=570,
        env=environment,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v5p-17"], "'v5p-17' is no slice of v5p: there are v5p-8"),
        ([], "give --config=FILE.py and --topology=SLICE"),
    ],
)
def test_refusals(tmp_path, arguments, message):
    done = plan(tmp_path, *arguments)
    assert done.returncode == 1 and message in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_plan_for_two_slices(tmp_path):
    pytest.importorskip("libtpu")
    done = plan(tmp_path, "--topology=v5e-4x2", f"--json={tmp_path}/plan.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures.keys() >= KEYS and figures["fits"] and figures["chips"] == 8 and figures["rows_per_chip"] == 2
    assert figures["compiled_flops"] == pytest.approx(figures["flops"]["total"] - figures["kernel_flops"], rel=0.03)
    assert figures["flops"].keys() == {"total", "language_model", "head"}
    crossing = [one for one in figures["collectives"] if one["between_slices"]]
    parameters = sum(one["count"] for one in figures["parameters"] if one["part"] == "language_model")
    assert {one["axis"] for one in crossing} == {"data"}, "its gradients in float32, each chip's part once"
    assert sum(one["bytes"] for one in crossing) == pytest.approx(4 * parameters / 4, rel=0.1)
    assert "fsdp" in {one["axis"] for one in figures["collectives"]}
    assert figures["estimated"]["step_seconds"] > 0 and 0 < figures["estimated"]["mfu"] < 1
    assert figures["hbm"]["weights"] < figures["hbm"]["peak"] < figures["hbm"]["limit"]
    assert "data 2 x fsdp 4" in done.stdout


@pytest.mark.slow
def test_what_libtpu_or_the_mesh_refuses_is_one_line(tmp_path):
    pytest.importorskip("libtpu")
    done = plan(tmp_path, "--topology=v5e-4", "--config.sharding.data=3")
    assert done.returncode == 1 and "does not fit 4 devices: change sharding" in done.stderr.splitlines()[-1]
    done = plan(tmp_path, "--topology=v5p:3x5x7")
    assert done.returncode == 1 and "libtpu cannot describe v5p:3x5x7" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_what_does_not_fit_ends_with_status_1(tmp_path):
    pytest.importorskip("libtpu")
    flags = ["--effort=low", "--rows_per_chip=2048", "--config.model.remat=none", f"--json={tmp_path}/plan.json"]
    done = plan(tmp_path, "--topology=v5e-4", "--config.model.language_model.num_hidden_layers=64", *flags)
    assert done.returncode == 1, done.stdout
    error = done.stderr.splitlines()[-1]
    assert "GiB a chip" in error and "a v5e has 15.8" in error and "model.remat=full" in error
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert not figures["fits"] and figures["hbm"]["peak"] > figures["hbm"]["limit"]


def test_every_chip_has_its_shapes():
    for chip in chips.CHIPS.values():
        smallest = min(size for size in (1, 4) if size in chips._SHAPES[chip.dimensions])
        assert find_topology(f"{chip.kind}-{smallest * chip.cores}").chips == smallest


def test_compile_step_needs_the_compiler(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ImportError):
        compile_step(experiment(), find_topology("v5e-4"))
