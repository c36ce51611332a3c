"""While a run trains it says and paints what it makes of held-out documents, on one host as on several."""

import io
import itertools
import struct
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from tensorboardX.proto.event_pb2 import Event

from dreamllm_jax.common.configuration import ConfigError
from dreamllm_jax.data.document import Document, Image, Text
from dreamllm_jax.data.settings import CorpusConfig
from dreamllm_jax.data.storage import Corpus, open_tokenizer
from dreamllm_jax.experiment.experiment import read_experiment
from dreamllm_jax.experiment.settings import SamplesConfig
from dreamllm_jax.generation.documents import png
from dreamllm_jax.generation.texts import generate_texts
from dreamllm_jax.model import DreamLLM
from dreamllm_jax.parallel.feeding import rows_sharding
from dreamllm_jax.parallel.mesh import make_mesh
from dreamllm_jax.runs.load import load_run
from dreamllm_jax.training import samples
from dreamllm_jax.training.held_out import HeldOut
from dreamllm_jax.training.samples import Question, questions
from tests.lives import Life, micro, together
from tests.tiny import tiny_config

IMAGE, OTHER, WORDS, MORE = Image(b"1"), Image(b"2"), Text("words"), Text("more")
ASKED, SAID = Text("what?", "user"), Text("that", "assistant")


@pytest.mark.parametrize(
    ("kind", "segments", "asked"),
    [
        ("pair", [WORDS, IMAGE], {"painted": ([WORDS], IMAGE), "written": ([IMAGE], WORDS)}),
        ("interleaved", [WORDS, IMAGE, OTHER], {"painted": ([WORDS], IMAGE)}),
        ("interleaved", [WORDS, IMAGE, MORE], {"painted": ([WORDS], IMAGE), "written": ([WORDS, IMAGE], MORE)}),
        ("interleaved", [IMAGE, WORDS, OTHER], {"painted": ([WORDS], IMAGE), "written": ([IMAGE], WORDS)}),
        ("image_image", [IMAGE, OTHER], {}),
        ("edit", [IMAGE, WORDS, OTHER], {"painted": ([IMAGE, WORDS], OTHER)}),
        ("text", [WORDS], {}),
        ("conversation", [Image(b"1", "user"), ASKED, SAID], {"written": ([Image(b"1", "user"), ASKED], SAID)}),
        ("conversation", [ASKED, Image(b"1", "assistant")], {}),
    ],
)
def test_questions(kind, segments, asked):
    document = Document(kind, tuple(segments))
    found = {q.name: (list(q.prompt), q.answer) for q in questions("x", document, CorpusConfig())}
    assert found == {f"x/{name}": question for name, question in asked.items()}
    for mode, left in (("creation", "painted"), ("comprehension", "written")):
        names = [q.name for q in questions("x", document, CorpusConfig(mode=mode))]
        assert names == [f"x/{left}"] * (left in asked)


def logged(workdir: Path) -> dict[tuple[int, str], str | np.ndarray]:
    """What TensorBoard shows as texts and images, by step and name."""
    found = {}
    for file in sorted((workdir / "tensorboard").iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            for value in event.summary.value:
                if value.HasField("image"):
                    picture = PIL.Image.open(io.BytesIO(value.image.encoded_image_string))
                    found[event.step, value.tag] = np.asarray(picture)
                elif value.HasField("tensor"):
                    found[event.step, value.tag] = value.tensor.string_val[0].decode()
    return found


@pytest.mark.slow
def test_samples_are_what_the_model_says(data, tmp_path):
    wanted = {"documents": 2, "max_tokens": 8, "steps": 2}
    validation = {"every": 4, "path": data, "buckets": 1, "samples": wanted}
    painted = {"slots": 1, "height": 8, "width": 16}
    config = micro(data, steps=4, checkpoint={"every": 4}, validation=validation)
    config["rows"] |= {"dream": (painted,), "dream_size": 77}  # which counts for nothing then
    alone = Life(config, tmp_path / "one", 4)
    with together(config, tmp_path / "two", [2, 2]) as lives:
        assert [alone.end(), *(life.end() for life in lives)] == [0, 0, 0], alone.said() + lives[0].said()
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    names = {name.removesuffix("/text_summary") for _, name in one}
    parts = itertools.product(("interleaved", "pairs"), "01", ("painted", "written"))
    assert names == {"/".join(["samples", *part]) for part in parts}
    assert one.keys() == two.keys() and {step for step, _ in one} == {4}
    for key, value in one.items():
        if isinstance(value, str):
            assert value == two[key]
        else:  # the document's image and the painted one; a rounded value may fall to either side
            assert value.shape == ((8, 32, 3) if key[1].endswith("painted") else (8, 16, 3))
            np.testing.assert_allclose(value.astype(int), two[key], atol=1)
            np.testing.assert_array_equal(value[:, :16], two[key][:, :16])

    trained = load_run(tmp_path / "one", None)
    pair = Corpus(data, "pairs")[0]
    (text,) = generate_texts(
        trained.model, trained.params, trained.tokenizer, [[Image(pair.images[0].data)]], max_tokens=8
    )
    shown = one[4, "samples/pairs/0/written/text_summary"]
    assert shown == f"🖼\n\n**Document:** {pair.texts[0].text}\n\n**Model:** {text}".strip()


def test_pictures_are_painted_as_the_settings_say(monkeypatch):
    asked, picture = {}, np.zeros((8, 8, 3), np.uint8)
    monkeypatch.setattr(samples, "generate_images", lambda *_, **settings: asked.update(settings) or picture[None])
    question = Question("x", (WORDS,), Image(png(picture)))
    config = SamplesConfig(guidance=2.0, guidance_interval=(0.2, 0.8))
    (sample,) = samples.answer([question], config, (8, 8), DreamLLM(tiny_config()), {}, None).values()
    assert sample.picture.shape == (8, 16, 3)
    assert (asked["guidance"], asked["guidance_interval"]) == (2.0, (0.2, 0.8))
    with pytest.raises(ValueError, match="guidance_interval must be two ascending numbers from 0 to 1"):
        SamplesConfig(guidance_interval=(0.5, 1.5))


def find(run):
    rows = rows_sharding(make_mesh(run.sharding), run.sharding, run.rows.per_step)
    return HeldOut(run, open_tokenizer(run.data.path, run.data.tokenizer), rows).questions


def test_samples_need_something_to_ask(data):
    validation = {"every": 4, "path": data, "samples": {"documents": 1, "max_tokens": 64}}  # the model reads 64
    run = read_experiment(micro(data, validation=validation))
    with pytest.raises(ValueError, match=r"samples\.documents=1: no document of pairs, interleaved in"):
        find(run)
    # Where nothing is painted nothing is asked for it, nor where nothing is read.
    for mode, left in (("comprehension", "written"), ("creation", "painted")):
        corpora, short = {"pairs": {"mode": mode}}, {"documents": 1, "max_tokens": 8}
        run = read_experiment(micro(data, validation={**validation, "corpora": corpora, "samples": short}))
        assert [question.name for question in find(run)] == [f"pairs/0/{left}"]
    with pytest.raises(ConfigError, match="documents needs every"):
        read_experiment(micro(data, validation={"samples": {"documents": 1}}))
