"""Rows of pictures to paint: how full the project's own packer gets them, and which are chosen."""

from pathlib import Path

import numpy as np
import pytest

from dreamllm_jax.data import __main__ as data_commands
from dreamllm_jax.data import storage
from dreamllm_jax.data.batch import RowShape, SlotGroup
from dreamllm_jax.data.corpora.compose import compose
from dreamllm_jax.data.images import black
from dreamllm_jax.data.tokenizer import train_tokenizer
from dreamllm_jax.experiment import recipes
from dreamllm_jax.experiment.experiment import read_experiment
from dreamllm_jax.planning import rows

TINY = Path(__file__).parent.parent.parent / "configs/tiny.py"
SHAPE = RowShape(1024, (), (SlotGroup(8, 256, 512, 512),))


def test_what_is_filled():
    """Rows of 1000 tokens take three documents of 300, or of 200 and 400 in turn: 600 wait for 200 + 200 + 600."""
    shape = rows._rows(SHAPE, 1000, 4)
    assert rows.fill([300] * 64, shape, 8) == rows.Fill(1000, 4, 0.9, 0.75)
    alternating = rows.fill([200, 400], shape, 8)
    assert alternating.tokens == pytest.approx(1.0, abs=0.02) and not alternating.good
    assert rows.padded(np.array([1, 1, 1, 4, 2, 2]), together=2) == (1 + 1 + 1 + 4 + 2 + 2) / (2 * (1 + 4 + 2))


def test_rows_for_every_length_of_captions_can_be_filled():
    for name in rows.CAPTIONS:
        captions = rows.captions(name)
        assert captions.mean() == pytest.approx(rows.CAPTIONS[name][0], rel=0.02)
        sizes = 15 + 256 + np.minimum(captions, 128)
        assert any(one.good for one in rows.choices(sizes, SHAPE, 64, 3200)), name


def test_a_recipe_and_a_corpus(tmp_path, capsys):
    tokenizer = train_tokenizer(["noise broken"] * 20, 300)
    pairs = [(black((16, 16)), "noise " * (1 + i % 4)) for i in range(12)]
    storage.write_dataset(tmp_path / "set", compose(pairs, names=("pairs",)), tokenizer)
    words = ["rows", f"--config={TINY}", f"--tokenizer={tmp_path / 'set/tokenizer'}", "--longest=128"]
    parsed = data_commands.parser().parse_args([*words, f"--corpus={tmp_path / 'set/pairs'}"])
    parsed.main(parsed)
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("pairs: captions of ") and told[2].startswith("  as it is: ")
    experiment = read_experiment(recipes.load(TINY).to_dict())
    lengths = np.array([len(tokenizer.encode_text(text.strip())) for _, text in pairs])
    sizes = rows.documents(experiment, tokenizer, lengths)
    fixed = 2 + experiment.model.num_queries + 2  # the document's marks and the picture's
    np.testing.assert_array_equal(sizes, fixed + lengths)
    read = experiment.row_shape.see[0].tokens + 2
    np.testing.assert_array_equal(rows.documents(experiment, tokenizer, lengths, 1), fixed + read + lengths)
    with pytest.raises(ValueError, match=r"rows\.see_slots=\d+: no room for documents that read 99 pictures"):
        next(rows.report(experiment, tokenizer, {"a": lengths}, 128, 99))
