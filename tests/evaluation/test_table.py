"""Results at rest, and the table over them."""

import json

import pytest

from dreamllm_jax.evaluate import make_parser
from dreamllm_jax.evaluation import scores, table
from dreamllm_jax.evaluation.scores import Checkpoint, Score


def test_a_table_over_checkpoints(tmp_path, capsys):
    for name, step, accuracy in (("one", 1000, 0.625), ("one", 200, 0.5), ("two", 200, 0.25)):
        given = Checkpoint(f"runs/{name}@{step}", step, False)
        folder = tmp_path / name / "evaluation"
        scores.write(Score("vqav2", given, 10, {"accuracy": accuracy}, {"accuracy": 0.0123}, {}), folder)
    average = Checkpoint("runs/two@200-average", 200, True)
    drawn = Score("ms_coco", average, 9, {"fid": 12.354, "fid_best_of_8": 9.8765}, {}, {"each": 8})
    scores.write(drawn, tmp_path / "two" / "evaluation")
    surprise = {"word_perplexity": 20.25, "bits_per_byte": 0.75}
    scores.write(Score("wikitext", average, 9, surprise, {}, {}), tmp_path / "two" / "evaluation")
    (tmp_path / "two" / "evaluation" / "recall.json").write_text(json.dumps({"pairs": 3}))  # of another form

    arguments = make_parser().parse_args(["table", str(tmp_path / "one"), str(tmp_path / "two" / "evaluation")])
    arguments.main(arguments)
    assert capsys.readouterr().out.splitlines() == [
        "| task | metric | runs/one, step 200 | runs/one, step 1000 | runs/two, step 200 | runs/two, step 200-average"
        " | paper |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| ms_coco | fid |  |  |  | 12.35 |  |",
        "| ms_coco | fid_best_of_8 |  |  |  | 9.88 | 8.46 |",
        "| vqav2 | accuracy | 50.0 ± 1.2 | 62.5 ± 1.2 | 25.0 ± 1.2 |  | 56.6 |",
        "| wikitext | bits_per_byte |  |  |  | 0.8 |  |",
        "| wikitext | word_perplexity |  |  |  | 20.2 |  |",
    ]


def test_a_result_says_everything(tmp_path):
    made = Score("pope", Checkpoint("m", 7, False), 3, {"accuracy": 2 / 3}, {"accuracy": 0.3}, {"beams": 1})
    path = scores.write(made, tmp_path)
    assert path.name == "pope-7.json" and table.read(tmp_path) == [made]
    assert scores.told(made) == "pope: accuracy 0.6667 ± 0.3000 (3 items)"
    with pytest.raises(FileNotFoundError, match="nothing has no results of `evaluate`"):
        table.read(tmp_path / "nothing")
