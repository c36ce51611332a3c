"""A sweep ends with all of its runs finished whatever happens to the program, and with one page about them."""

import csv
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dreamllm_jax.checkpoints import saved
from dreamllm_jax.evaluation import scores
from dreamllm_jax.evaluation.scores import Checkpoint, Score
from dreamllm_jax.reports.comparison import compare, write_comparison
from dreamllm_jax.training.metrics import read_metrics

ROOT = Path(__file__).parent.parent.parent
STEPS = 8
CONFIG = """
from ml_collections import ConfigDict
from dreamllm_jax.experiment import recipes
from tests.lives import micro

SWEEP = [
    {{"queries": queries, "config.optimizer.learning_rate": rate}} for queries in (1, 2) for rate in (0.01, 0.03, 0.1)
]

def get_config(arg=""):
    config = ConfigDict(micro({data!r}, steps={steps}, log_every=2, checkpoint={{"every": {steps}}}))
    config.data.corpora = {{"interleaved": {{"mode": "comprehension"}}}}  # without a UNet it compiles sooner
    config.rows.dream_slots = 0
    config.model.num_queries = recipes.parse(arg, queries=2).queries
    return config
"""


def start(*arguments, stdout: int = subprocess.PIPE) -> subprocess.Popen:
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    environment = os.environ | {"XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "launch" / "sweep.py"), *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stdout, stderr=subprocess.STDOUT, text=True)


def sweep(*arguments) -> tuple[str, int]:
    process = start(*arguments)
    said, _ = process.communicate(timeout=900)
    return said, process.returncode


@pytest.fixture
def config(data, tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(data=data, steps=STEPS))
    return f"--config={path}"


@pytest.mark.slow
def test_six_runs_across_a_kill(config, tmp_path):
    to = tmp_path / "runs"
    first = start(config, f"--to={to}", stdout=subprocess.DEVNULL)
    limit = time.monotonic() + 600
    second = to / "queries=1,learning_rate=0.03" / "config.json"
    while not second.exists():
        assert time.monotonic() < limit and first.poll() is None
        time.sleep(0.05)
    (trains,) = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    os.kill(int(trains), signal.SIGSTOP)
    first.kill()  # the run that it has started lives on
    first.wait()

    again = start(config, f"--to={to}")
    heard = []
    while not heard or "waiting" not in heard[-1]:
        heard.append(next(again.stdout))
    os.kill(int(trains), signal.SIGCONT)
    said, _ = again.communicate(timeout=900)
    assert again.returncode == 0, said
    assert "== 1 of 6: queries=1,learning_rate=0.01: finished\n" in heard
    assert heard[-1] == "== queries=1,learning_rate=0.03: waiting for the process that still trains it\n"
    directories = sorted(path for path in to.iterdir() if path.is_dir())
    assert len(directories) == 6
    for directory in directories:
        assert saved.find(str(directory)).step == STEPS
        assert [line["step"] for line in read_metrics(directory)] == list(range(1, STEPS + 1)), directory
    said, status = sweep(config, f"--to={to}")
    assert (said.count(": finished"), status) == (6, 0), said

    for step, share in ((STEPS, 0.625), (4, 0.5)):
        found = Score("recall", Checkpoint(str(directories[0]), step, False), 8, {"creation_top1": share}, {}, {})
        scores.write(found, directories[0] / "evaluation")
    page = write_comparison([to], to).read_text()
    assert page.count("<tr><th><span") == 6 and "queries=2,learning_rate=0.1" in page
    with open(to / "comparison.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert {(line["model.num_queries"], line["optimizer.learning_rate"]) for line in lines} == {
        (queries, rate) for queries in ("1", "2") for rate in ("0.01", "0.03", "0.1")
    }
    assert sorted(line["recall creation_top1"] for line in lines) == [*[""] * 5, "0.625"]
    assert "rows.length" not in lines[0] and all(float(line["loss"]) > 0 for line in lines)


@pytest.mark.slow
def test_what_is_printed_is_what_would_be_executed(config, tmp_path):
    said, status = sweep(config, "--to=gs://bucket/x", "--dry-run", "--submit=sbatch -J {name} --wrap={command}")
    assert status == 0 and said.count("sbatch -J queries=") == 6, said
    assert "--workdir=gs://bucket/x/queries=1,learning_rate=0.01 --config.optimizer.learning_rate=0.01'" in said


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--submit=sbatch", r"--submit has no {command}"),
        ("--config.stepz=3", r"variant queries=1,learning_rate=0\.01: config\.stepz is not a setting; did you mean"),
        ("--workdir=x", r"unexpected '--workdir=x'"),
        ("--config=configs/tiny.py", r"configs/tiny\.py declares no SWEEP"),
        ("--config=configs/tinny.py", r"there is no configs/tinny\.py; beside it are alignment, .*, tiny"),
    ],
)
def test_sweeps_that_are_refused(config, wrong, message, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["sweep.py", config, f"--to={tmp_path}", "--dry-run", wrong])
    with pytest.raises(SystemExit, match=message):
        runpy.run_path(str(ROOT / "launch" / "sweep.py"))["main"]()


@pytest.mark.slow
def test_runs_are_submitted(config, tmp_path):
    """Each once, with its own command."""
    told = tmp_path / "told"
    script = tmp_path / "submit.sh"
    script.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {told}\n')
    script.chmod(0o755)
    said, status = sweep(config, f"--to={tmp_path}/runs", f"--submit={script} {{name}} {{command}}")
    assert status == 0, said
    lines = told.read_text().splitlines()
    assert len({line.split()[0] for line in lines}) == 6 == len(lines)
    assert all("-m dreamllm_jax.train --config=" in line and "--workdir=" in line for line in lines)


def test_runs_beside_each_other(tmp_path):
    for name, changes in (("a", {"seed": 0, "optimizer": {"b1": 0.9}}), ("b", {"seed": 1, "optimizer": {"b1": 0.9}})):
        run = tmp_path / name
        run.mkdir()
        (run / "config.json").write_text(json.dumps({"steps": 20, **changes}))
        lines = [
            {"step": i, "loss": float(20 - i + changes["seed"]), "lm_loss": 1.0, "dm_loss": 0.0} for i in range(1, 21)
        ]
        lines[18]["loss"] = float("nan") if name == "b" else lines[18]["loss"]  # left out, for it is not finite
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 21, "lo')
    compared = compare([tmp_path / "a", tmp_path / "b"])
    assert compared.settings == {"a": {"seed": 0}, "b": {"seed": 1}}
    assert [found["loss"] for found in compared.results.values()] == [0.5, 1.0]
    assert compare([tmp_path, tmp_path / "a"]).results == compared.results
    shutil.copytree(tmp_path / "b", tmp_path / "more" / tmp_path.name / "b")
    (tmp_path / "more" / tmp_path.name / "b" / "metrics.jsonl").unlink()  # it has just begun
    several = compare([tmp_path / "b", tmp_path / "more" / tmp_path.name])
    assert [found["steps"] for found in several.results.values()] == [20, 0]
    assert [name.split("/")[1:] for name in several.results] == [[tmp_path.name, "b"]] * 2
    assert "No step is finished yet" in write_comparison([tmp_path / "more" / tmp_path.name], tmp_path).read_text()
    with pytest.raises(FileNotFoundError, match="is not the directory of a run, nor of runs"):
        compare([tmp_path / "c"])
