"""What is logged of a run: every step once, whatever cut the file short."""

import json

import pytest

from dreamllm_jax.training.metrics import MetricsLog, read_metrics


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
