"""A user's error on the command line is one line that names the thing, and status 1, before anything is compiled."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import run

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "give --config=FILE.py and --workdir=DIR"),
        (
            ["train", "--config=configs/tiny.py", "--workdir={tmp}/run", "--config.rows.length=10"],
            "rows.length=10 has no room for an image to see, which takes 18 tokens",
        ),
        (
            ["train", "--config=configs/tiny.py", "--workdir={tmp}", "--config.data.path={tmp}/nothing"],
            "{tmp}/nothing",
        ),
        (  # a setting that the file leaves out
            ["train", "--config=configs/tiny.py", "--workdir={tmp}/run", "--config.timeout=-1"],
            "timeout must not be negative and host_timeout positive, got -1",
        ),
        (  # of a group that the file leaves out
            ["train", "--config=configs/tiny.py", "--workdir={tmp}/run", "--config.validation.evry=100"],
            "config.validation.evry is not a setting; did you mean config.validation.every?",
        ),
        (["train", "--config=configs/tiny.py", "--workdirr={tmp}/run"], "flag 'workdirr'. Did you mean: workdir"),
        (["train", "--config=configs/tony.py", "--workdir={tmp}/run"], "there is no configs/tony.py; beside it are"),
        (["evaluate", "recall", "--workdir={tmp}"], "has no config.json: it is not the --workdir of a training run"),
        (
            ["generate", "text", "--checkpoint={tmp}", "--to={tmp}/out", "hello", "--fsdp=50", "--tensor=2"],
            "--fsdp=50 and --tensor=2 need 100 devices, there are",
        ),
        (["report", "--workdir={tmp}"], "metrics.jsonl is missing"),
        (["report", "--workdir={tmp}", "extra"], "give --workdir=DIR for the report of one run, or the directories"),
        (["report", "{tmp}"], "{tmp} is not the directory of a run, nor of runs: no config.json in it"),
        (["evaluate", "language", "--checkpoint={tmp}", "--tasks=boolq"], "{tmp} has no model.json"),
        (
            ["train", "--config=configs/stage2_igpt.py:7b,querys=3", "--workdir={tmp}/run"],
            "argument.querys is not a setting; did you mean argument.queries?",
        ),
        (
            ["train", "--config=configs/tiny.py", "--check", '--config.optimizer.learning_rates=(("lama/.*",2.0),)'],
            "optimizer.learning_rates: 'lama/.*' decides about no trained parameter",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors(arguments, message, tmp_path):
    module, *flags = [argument.format(tmp=tmp_path) for argument in arguments]
    result = run(module, flags)
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ") or module == "train"]
    assert len(errors) == 1 and message.format(tmp=tmp_path) in errors[0], result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "run").exists()


def test_the_home_directory(tmp_path):
    """Bash leaves `~` as it is behind `--workdir=`; so does a configuration."""
    (tmp_path / "config.py").write_text(
        "from dreamllm_jax.experiment import recipes\n"
        f"def get_config():\n    config = recipes.load({str(ROOT / 'configs/tiny.py')!r})\n"
        "    config.validation = dict(every=1, path='~/held_out')\n    return config\n"
    )
    for module, *flags in (
        ["train", "--config=~/config.py", "--workdir=~/run", "--config.data.path=~/x", "--config.steps=1"],
        ["train", f"--config={tmp_path}/config.py", "--workdir=run", "--config.parameters.init_from=~/x"],
        ["data", "import", "text", "x", "--to=~/y", "--name=a"],
        ["report", "--workdir=~/x"],
    ):
        result = run(module, flags, tmp_path, {"HOME": str(tmp_path)})
        assert result.returncode == 1 and not (tmp_path / "~").exists()
        if module in ("train", "report"):
            assert f"{tmp_path}/x" in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "creation", "--seed=12345678901234567890"], "--seed: must lie in 0 ... 2^31 - 1"),
        (["convert", "import", "--to=x", "--seed=-1"], "--seed: must lie in 0 ... 2^31 - 1"),
        (["generate", "text", "--seed=4294967296"], "--seed: must lie in 0 ... 2^31 - 1"),
        (["generate", "text", "--temperature=nan"], "--temperature: must be a number, got nan"),
        (["data", "import", "text", "x", "--workers=-1"], "--workers: must not be negative, got -1"),
        (["data", "import", "text", "x", "--max_bad=2"], "--max_bad: must lie in 0 ... 1, got 2"),
        (["data", "prepare", "x", "--pairs=-1"], "--pairs: must not be negative, got -1"),
    ],
)
def test_numbers_have_their_bounds(arguments, message):
    result = run(arguments[0], arguments[1:])
    assert result.returncode == 2 and message in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("module", ["train", "plan", "generate", "evaluate", "report", "convert", "data"])
def test_help(module, tmp_path):
    result = run(module, ["--help"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert ("--config:" in result.stdout) == (module in ("train", "plan"))


def test_a_bucket_without_its_package():
    program = (
        "import runpy, sys; sys.modules['gcsfs'] = None; runpy.run_module('dreamllm_jax.report', run_name='__main__')"
    )
    command = [sys.executable, "-c", program, "--workdir=gs://bucket/run"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "error: gs:// paths need gcsfs: pip install 'dreamllm_jax[gcs]'"
