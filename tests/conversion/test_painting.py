"""SANA and Stable Diffusion 3 paint what the classes of diffusers paint, and refuse what they cannot."""

import json
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from PIL import Image

torch = pytest.importorskip("torch")


from dreamllm_jax import generate  # noqa: E402
from dreamllm_jax.checkpoints import saved  # noqa: E402
from dreamllm_jax.diffusion.samplers import SamplerConfig  # noqa: E402
from dreamllm_jax.generation import images  # noqa: E402
from dreamllm_jax.generation.images import paint, require_size  # noqa: E402
from dreamllm_jax.model import DreamLLM  # noqa: E402
from dreamllm_jax.towers.condition import Condition  # noqa: E402
from tests.conversion.helpers import FLOWS as KINDS  # noqa: E402
from tests.conversion.helpers import SCHEDULER  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*CLIPImageProcessor.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),  # diffusers
]


def by_diffusers(directory: Path, model: DreamLLM, condition: Condition, null: Condition, noise, steps: int, guidance):
    """The pictures that the public classes paint, under our conditions and from our noise."""
    decoder = model.config.image_decoder
    parts = {}
    for name, tower in (("denoiser", decoder.denoiser), ("autoencoder", decoder.autoencoder)):
        form = tower.public
        parts[name] = getattr(diffusers, form.torch_class).from_pretrained(directory, subfolder=form.folder)
    scheduler = json.loads((directory / SCHEDULER).read_text())
    scheduler = getattr(diffusers, scheduler["_class_name"]).from_config(scheduler)
    scheduler.set_timesteps(steps)
    both = jax.tree.map(lambda *x: torch.from_numpy(np.concatenate(x)), null, condition)
    x = torch.from_numpy(np.array(noise)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        for time in scheduler.timesteps:
            times = time.float().expand(2 * len(x))
            without, given = decoder.denoiser.run_public(parts["denoiser"], torch.cat([x, x]), times, both).chunk(2)
            x = scheduler.step(without + guidance * (given - without), time, x).prev_sample
        config = parts["autoencoder"].config
        x = x / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        pixels = parts["autoencoder"].decode(x).sample.permute(0, 2, 3, 1).numpy()
    return np.round(np.clip(pixels * 127.5 + 127.5, 0, 255)).astype(np.uint8)


@pytest.fixture(scope="module")
def models(imported):
    """Kind -> the model and its parameters."""
    found = {kind: saved.find(str(root / "ours")) for kind, root in imported.items()}
    return {kind: (DreamLLM(x.config), unflatten_dict(x.read(x.leaves()), sep="/")) for kind, x in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_those_of_diffusers(imported, models, kind):
    """By the scheduler that came with the model, with guidance away from something, of an oblong size."""
    model, params = models[kind]
    rng, decoder = np.random.default_rng(0), model.config.image_decoder
    hidden, negative = rng.normal(size=(2, 2, 3, model.config.language_model.width)).astype(np.float32)
    seeds, size = jnp.array([3, 4], jnp.uint32), (2 * decoder.size_multiple, 3 * decoder.size_multiple)
    with jax.default_matmul_precision("F64_F64_F64"):
        got = paint(
            model,
            params,
            hidden,
            seeds,
            size=size,
            sampler=SamplerConfig(steps=6),
            guidance=2.0,
            negative=negative,
        )
    condition, null = (model.bind({"params": params}).condition(x) for x in (hidden, negative))
    keys = [jax.random.fold_in(jax.random.key(seed), 0) for seed in (3, 4)]
    noise = jnp.stack([jax.random.normal(key, decoder.latent_shape(*size)) for key in keys])
    want = by_diffusers(imported[kind] / "image_decoder", model, condition, null, noise, 6, 2.0)
    assert got.shape == want.shape == (2, *size, 3) and np.std(want) > 10
    assert np.abs(np.asarray(got).astype(int) - want).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("sana", {"sampler": "unipc", "size": "8x12", "negative": "a fox"}),
        ("stable_diffusion_3", {"size": "12x8", "guidance_interval": "0.2"}),
    ],
)
def test_the_command_line_paints(imported, kind, flags, tmp_path):
    interval = flags.pop("guidance_interval", None)
    words = [f"--{name}={value}" for name, value in flags.items()]
    words += ["--guidance_interval", interval, "0.8"] if interval else []
    given = ["image", f"--checkpoint={imported[kind] / 'ours'}", f"--to={tmp_path / 'to'}", "--steps=3", *words]
    arguments = generate.make_parser().parse_args([*given, "a red bird"])
    for wrong, message in (
        (["--sampler=ddim"], r"^a flow is not sampled with ddim"),
        (["--guidance_interval", "0.9", "0.1"], r"^guidance_interval must be two ascending numbers"),
        (["--size=7"], r"^the sides of a painted image must be multiples of"),
    ):
        other = generate.make_parser().parse_args([*given, *wrong, "--seed=0", "a red bird"])
        with pytest.raises(ValueError, match=message):
            other.main(other)
        assert not (tmp_path / "to").exists()
    arguments.main(arguments)
    (picture,) = (tmp_path / "to").rglob("*.png")
    with Image.open(picture) as painted:
        assert f"{painted.height}x{painted.width}" == flags["size"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sampler_that_a_flow_does_not_have_is_refused_before_anything_is_computed(models, kind):
    model, _ = models[kind]
    for sampler, message in (
        (SamplerConfig("ddim"), "^a flow is not sampled with ddim: there are euler, dpmpp_2m, unipc$"),
        (
            SamplerConfig(use_karras_sigmas=True),
            "^a flow has its own timesteps and no fresh noise: leave out use_karras_",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            paint(model, {}, None, None, sampler=sampler)


def test_pictures_beyond_the_table_of_positions_are_refused_before_anything_is_computed(models):
    decoder = models["stable_diffusion_3"][0].config.image_decoder
    assert decoder.largest_size == 48 and models["sana"][0].config.image_decoder.largest_size is None
    assert require_size(models["stable_diffusion_3"][0], (48, 8)) == (48, 8)
    with pytest.raises(ValueError, match=r"^this image decoder paints at most 48 pixels on a side, got 8 x 52$"):
        require_size(models["stable_diffusion_3"][0], (8, 52))


@pytest.mark.slow
def test_large_pictures_are_decoded_in_tiles(models, monkeypatch):
    """Of the size that the decoder was made for, where a side is more than twice that; others whole."""
    model, params = models["sana"]
    decoder = model.config.image_decoder
    side, seen, whole = decoder.default_size, [], images._decode
    monkeypatch.setattr(images, "_decode", lambda *args: seen.append(args[2].shape[1:3]) or whole(*args))
    assert (side, decoder.latent_shape(side, side)[0]) == (16, 8)
    for size, tiles in (((32, 16), [(16, 8)]), ((34, 16), [(8, 8), (8, 2), (8, 8), (8, 2), (5, 8), (5, 2)])):
        latents = np.random.default_rng(0).normal(size=(1, *decoder.latent_shape(*size))).astype(np.float32)
        seen.clear()
        pictures = images.decode(model, params, latents, size)
        assert pictures.shape == (1, *size, 3) and pictures.dtype == np.uint8 and seen == tiles
