"""What is logged of a run: every step once, whatever cut the file short."""

import collections
import json
import sys
import threading
import time

import numpy as np
import pytest

from dreamllm_jax.training import metrics
from dreamllm_jax.training.metrics import MetricsLog, read_metrics
from dreamllm_jax.training.samples import Sample


def write(workdir, first: int, last: int) -> None:
    with MetricsLog(workdir, first - 1) as log:
        for step in range(first, last + 1):
            log.write(step, {"loss": float(step), "seconds_per_step": 0.0})


@pytest.mark.parametrize("cut", [0, 1, 5], ids=["nowhere", "before the line's end", "inside of the line"])
def test_steps_stand_once_and_a_line_cut_short_is_mended(tmp_path, cut):
    write(tmp_path, 1, 4)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[: -cut or None])
    kept = 3 if cut == 5 else 4
    write(tmp_path, kept, 6)
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(i, float(i)) for i in range(1, 7)]
    write(tmp_path, 7, 7)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(1, 8))


def test_lines_are_there_when_they_are_flushed(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        log.write(1, {"seconds_per_step": 0.0})
        log.flush(at_once=False)
        assert [line["step"] for line in read_metrics(tmp_path)] == [1]


class Project:
    """Weights & Biases, as far as it is used."""

    def __init__(self):
        self.begun, self.told, self.ended = [], [], 0
        self.Image = lambda pixels, caption: ("image", pixels.shape, caption)
        self.Html = lambda text: ("html", text)

    def init(self, **settings):
        self.begun.append(settings)
        return self

    def log(self, values, step):
        self.told.append((step, values))

    def finish(self):
        self.ended += 1


def test_weights_and_biases_is_told_everything_and_goes_on_with_the_same_run(tmp_path, monkeypatch):
    project = Project()
    monkeypatch.setitem(sys.modules, "wandb", project)
    painted = Sample("a cat", np.zeros((4, 6, 3), np.uint8))
    for step in (1, 2):
        with MetricsLog(tmp_path, step - 1, project="cats") as log:
            log.write(step, {"loss": 2.0, "seconds_per_step": 0.0})
            log.write_samples(step, {"0": painted, "1": Sample("a <b>", None)})
            log.write_validation(step, {"loss": 3.0})
    first, second = project.begun
    assert first == second and first["id"] and (first["project"], first["resume"]) == ("cats", "allow")
    scalars, samples, validation = project.told[3:]
    assert scalars[0] == 2 and scalars[1]["loss"] == 2.0 and "goodput" in scalars[1]
    told = {"samples/0": ("image", (4, 6, 3), "a cat"), "samples/1": ("html", "a &lt;b&gt;")}
    assert (samples, validation) == ((2, told), (2, {"validation/loss": 3.0})) and project.ended == 2


def test_curves_of_a_run_in_a_bucket_are_copied_and_a_failing_bucket_stops_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(metrics, "is_remote", lambda path: True)
    write_whole, out = metrics.write_whole, []

    def unreliable(path, content):
        if out and "tensorboard" in str(path):
            raise OSError("503 Service Unavailable")
        write_whole(path, content)

    monkeypatch.setattr(metrics, "write_whole", unreliable)
    with MetricsLog(tmp_path, 0) as log:
        (tmp_path / "tensorboard").mkdir()  # which a bucket does not need
        out.append("of order")
        for step in range(1, 50):
            log.write(step, {"loss": float(step), "seconds_per_step": 0.0})
            log.flush(at_once=True)
        with pytest.raises(OSError, match="503 Service Unavailable"):
            log._curves.finish(30)
        assert caplog.text.count("could not be copied") == 1 and not list((tmp_path / "tensorboard").iterdir())
        out.clear()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.stat().st_size > 49 * 20 and len(read_metrics(tmp_path)) == 49


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A folder that is taken for a bucket, whose writes are told to `bucket.before` first, by their files' folders."""

    class Bucket:
        before, writing, most = (lambda self, folder: None), collections.Counter(), 0

        def write_whole(self, path, content, original=metrics.write_whole):
            self.writing[path] += 1
            self.most = max(self.most, self.writing[path])
            self.before(path.parent.name)
            original(path, content)
            self.writing[path] -= 1

    made = Bucket()
    (tmp_path / "tensorboard").mkdir()  # which a bucket does not need
    monkeypatch.setattr(metrics, "is_remote", lambda path: True)
    monkeypatch.setattr(metrics, "write_whole", made.write_whole)
    monkeypatch.setattr(metrics, "_REPLACE_SECONDS", 0)
    return made


def test_no_step_waits_for_a_slow_bucket_but_a_checkpoint_for_its_lines(tmp_path, bucket):
    with MetricsLog(tmp_path, 0) as log:
        bucket.before = lambda folder: time.sleep(0.5)
        began = time.monotonic()
        for step in range(1, 21):
            log.write(step, {"loss": 1.0, "seconds_per_step": 0.0})
            log.flush(at_once=False)
            log.write_validation(step, {"lm_loss": 1.0})
        assert time.monotonic() - began < 0.5
        stuck = threading.Event()
        bucket.before = lambda folder: folder == "tensorboard" and stuck.wait(30)
        log.flush(at_once=True)
        assert time.monotonic() - began < 10 and not stuck.is_set()
        assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 21))
        assert len((tmp_path / metrics.VALIDATION).read_text().splitlines()) == 20
        stuck.set()
    assert bucket.most == 1, "several uploads of one file at a time: the older one may come last"
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_bucket_that_hangs_does_not_keep_a_run_from_ending(tmp_path, bucket, monkeypatch, caplog):
    monkeypatch.setattr(metrics, "_CLOSE_SECONDS", 0.2)
    began, stuck = time.monotonic(), threading.Event()
    with pytest.raises(TimeoutError, match=r"metrics\.jsonl was not written within 0\.2 s"), MetricsLog(tmp_path, 0):
        bucket.before = lambda folder: stuck.wait(30)
    bucket.before = lambda folder: None
    with pytest.raises(FloatingPointError), MetricsLog(tmp_path, 0):
        bucket.before = lambda folder: stuck.wait(30)
        raise FloatingPointError  # which is what counts
    assert "what was logged last is lost" in caplog.text and "the last curves are lost" in caplog.text
    assert time.monotonic() - began < 10
    stuck.set()
