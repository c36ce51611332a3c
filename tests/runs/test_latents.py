"""Latents as OpenUni's script leaves them become moments, which scaled are what the script has written."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
import torch
from PIL import Image as Picture

from dreamllm_jax.data import __main__ as data_commands
from dreamllm_jax.data import stored
from dreamllm_jax.model import DreamLLM
from dreamllm_jax.runs.precompute import precompute
from tests.tiny import DREAM_SIZE, tiny_config, tiny_params
from tests.towers.test_flow_decoders import SANA

SHAPE, SCALE = (8, 8, 4), np.float32(SANA.autoencoder.scaling_factor)
NAMES = [f"{number // 3:04d}/{number}.jpg" for number in range(6)]


def test_scaling_in_bfloat16_gives_every_value_back():
    values = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) > 1e-30)]
    written = (values * SCALE).astype(ml_dtypes.bfloat16)
    taken = (written.astype(np.float32) / SCALE).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal((taken.astype(np.float32) * SCALE).astype(ml_dtypes.bfloat16), written)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A model, a data set of OpenUni's layout, and the latents of its images beside it; two images are not square."""
    root = tmp_path_factory.mktemp("latents")
    rng = np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        (root / "raw" / name).parent.mkdir(parents=True, exist_ok=True)
        size = (DREAM_SIZE, DREAM_SIZE + 8 * (number in (0, 4)), 3)
        Picture.fromarray(rng.integers(0, 256, size, np.uint8)).save(root / "raw" / name, quality=95)
    rows = [{"image": name, "annotation": "a.json"} for name in NAMES]
    (root / "raw/a.json").write_text('{"caption": "noise"}')
    (root / "data.json").write_text(json.dumps(rows))
    words = ["import", "folder", str(root / "data.json"), f"--images={root / 'raw'}", f"--to={root / 'set'}"]
    for name in ("computed", "taken"):
        parsed = data_commands.parser().parse_args([*words, f"--name={name}", "--workers=1"])
        parsed.main(parsed)
    model = DreamLLM(tiny_config(image_decoder=SANA))
    params = tiny_params(model.config)
    run(root, model, params, "computed")
    made = stored.Stored(root / "set", "computed", "moments", SHAPE, "float32", len(NAMES))
    for number, name in enumerate(NAMES):
        # In bfloat16, as the script computes.
        scaled = torch.tensor(made[number][0].transpose(2, 0, 1)).to(torch.bfloat16) * float(SCALE)
        file = root / f"raw_dc32/{name}.pt"
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(scaled, file)
        (root / f"not_scaled/{name}.pt").parent.mkdir(parents=True, exist_ok=True)
        torch.save(scaled / float(SCALE), root / f"not_scaled/{name}.pt")
    return root, model, params


def run(root, model, params, corpus, dtype="float32", size=DREAM_SIZE, latents=""):
    return precompute(
        root / "set", corpus, "moments", model, params, made_by="m", size=size, dtype=dtype, batch=4, latents=latents
    )


@pytest.mark.slow
def test_what_is_stored_is_what_was_written(case):
    root, model, params = case
    folder = root / "raw_dc32"
    (folder / f"{NAMES[2]}.pt").unlink()
    (folder / f"{NAMES[5]}.pt").write_bytes((folder / f"{NAMES[5]}.pt").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"not_scaled are not this autoencoder's times its scaling_factor 0.41407: "):
        run(root, model, params, "taken", "bfloat16", latents=root / "not_scaled")
    with pytest.raises(FileNotFoundError, match=r"no latents of the first documents, as .*/0000/0\.jpg\.pt"):
        run(root, model, params, "taken", "bfloat16", latents=root / "raw")
    assert run(root, model, params, "taken", "bfloat16", latents=folder) == len(NAMES)
    taken = stored.Stored(root / "set", "taken", "moments", SHAPE, "bfloat16", len(NAMES))
    for number, name in enumerate(NAMES):
        if number in (2, 5):
            assert np.isnan(taken[number].astype(np.float32)).all()
            continue
        written = torch.load(folder / f"{name}.pt", weights_only=True).float().numpy()
        scaled = (taken[number][0].astype(np.float32) * SCALE).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(scaled.astype(np.float32), written.transpose(1, 2, 0))


@pytest.mark.slow
def test_latents_of_another_size_or_without_a_posterior_are_refused(case, tmp_path):
    root, model, params = case
    config = dataclasses.replace(model.config, image_decoder=tiny_config().image_decoder)
    with pytest.raises(ValueError, match="need an autoencoder without a posterior"):
        run(root, DreamLLM(config), params, "taken", latents=root / "raw_dc32")
    stored.folder(root / "set", "taken", "moments").rename(tmp_path / "moments")
    with pytest.raises(ValueError, match=r"has the shape \(4, 8, 8\), not \(4, 16, 16\): give the --size"):
        run(root, model, params, "taken", size=2 * DREAM_SIZE, latents=root / "raw_dc32")
