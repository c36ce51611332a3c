"""SANA and Stable Diffusion 3 come in, go out and are verified, as Stable Diffusion is."""

import dataclasses
import json
import shutil
from pathlib import Path

import diffusers
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax.traverse_util import flatten_dict

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from dreamllm_jax.checkpoints import saved  # noqa: E402
from dreamllm_jax.interop import names, verify  # noqa: E402
from dreamllm_jax.interop.image_decoder import open_image_decoder, read_decoder_config  # noqa: E402
from dreamllm_jax.interop.sampling import compare_sampling  # noqa: E402
from dreamllm_jax.layers.lora import LoraConfig, adapters_in, is_adapter  # noqa: E402
from dreamllm_jax.model import abstract_params  # noqa: E402
from dreamllm_jax.runs.initial import restore_initial  # noqa: E402
from dreamllm_jax.towers.condition import Condition  # noqa: E402
from dreamllm_jax.towers.image_decoders.mmdit import MMDiTLora  # noqa: E402
from dreamllm_jax.towers.image_decoders.sana_transformer import SanaLora  # noqa: E402
from tests import public_models  # noqa: E402
from tests.conversion.helpers import FLOWS as KINDS  # noqa: E402
from tests.conversion.helpers import SCHEDULER, assert_identical, run, tensors, towers  # noqa: E402
from tests.parity import random_weights, relative_error  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*CLIPImageProcessor.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),  # diffusers
]


def in_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def settings(cls, folder: Path) -> dict:
    """As the public class understands a config.json."""
    config = cls.from_config(cls.load_config(folder)).config
    return {name: value for name, value in config.items() if not name.startswith("_")}


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_in_goes_out(imported, kind, tmp_path):
    """Every bit and every setting, out of shards and into others; what is exported says how it is loaded."""
    given, ours = imported[kind] / "image_decoder", imported[kind] / "ours"
    run("export", checkpoint=ours, format="diffusers", to=tmp_path / "out", max_shard_size="20KB", no_check=True)
    for folder in ("transformer", "vae"):
        want, got = in_folder(given / folder), in_folder(tmp_path / "out" / folder)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) and got[name].dtype == want[name].dtype for name in want)
        assert len(list((tmp_path / "out" / folder).glob("*.safetensors"))) > 1
        cls = getattr(diffusers, json.loads((given / folder / "config.json").read_text())["_class_name"])
        assert settings(cls, tmp_path / "out" / folder) == settings(cls, given / folder)
        assert (
            f'{folder} = {cls.__name__}.from_pretrained(path, subfolder="{folder}")'
            in (tmp_path / "out" / "README.md").read_text()
        )
    scheduler = json.loads((given / SCHEDULER).read_text())
    assert json.loads((tmp_path / "out" / SCHEDULER).read_text()) == scheduler
    assert f"scheduler = {scheduler['_class_name']}.from_pretrained" in (tmp_path / "out" / "README.md").read_text()
    run("import", **towers(imported[kind]) | {"image_decoder": tmp_path / "out"}, to=tmp_path / "again", num_queries=3)
    assert_identical(tensors(tmp_path / "again"), tensors(ours))
    assert saved.find(str(tmp_path / "again")).config == saved.find(str(ours)).config


@pytest.mark.parametrize(("kind", "version"), [("sana", "1.0"), ("stable_diffusion_3", "3")])
@pytest.mark.parametrize("pickled", [False, True])
def test_versions_and_variants_are_read_and_any_part_of_them(kind, version, pickled, tmp_path):
    """In float16: `.bin` files, or the `fp16` variant; a device's slice is what it is of the whole."""
    save = public_models.DECODERS[kind]
    directory = save(tmp_path / "decoder", torch.float16, version, pickled=pickled)
    for file in directory.glob("*/*.safetensors"):
        file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    config, parts = open_image_decoder(directory)
    assert config.kind == kind
    tower = config.denoiser
    inputs = jnp.zeros((1, 4, 4, 4)), jnp.zeros(1), _condition(tower, 1)
    template = nn.unbox(jax.eval_shape(tower.make(jnp.float32).init, jax.random.key(0), *inputs)["params"])
    leaves = names.arrange(template, parts["image_decoder/denoiser"].tensors)
    stacked = [path for path in leaves if path.startswith("transformer_blocks/")]
    assert len({path.split("/")[1] for path in stacked if "_to_" in path}) == (2 if kind == "stable_diffusion_3" else 0)
    for leaf in leaves.values():
        whole = leaf.read()
        assert whole.shape == leaf.shape and whole.dtype == np.float16
        index = tuple(slice(size // 2, size) for size in leaf.shape)
        np.testing.assert_array_equal(leaf.read(index), whole[index])
    there = parts["image_decoder/denoiser"].tensors
    assert sum(leaf.read().size for leaf in leaves.values()) == sum(tensor.read().size for tensor in there.values())


def _condition(denoiser, count: int, seed: int = 0) -> Condition:
    rng = np.random.default_rng(seed)
    sequence = rng.normal(size=(count, 3, denoiser.condition_width)).astype(np.float32)
    pooled = rng.normal(size=(count, denoiser.pooled_width)).astype(np.float32) if denoiser.pooled_width else None
    return Condition(sequence, pooled=pooled)


DDPM = {"_class_name": "DDPMScheduler", "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Kind -> a folder with the configurations of such a decoder."""
    root = tmp_path_factory.mktemp("folders")
    for kind, save in public_models.DECODERS.items():
        save(root / kind)
        for file in (root / kind).glob("*/*.safetensors"):
            file.unlink()
    return root


@pytest.mark.parametrize(
    ("kind", "scheduler", "message"),
    [
        ("sana", DDPM, "DDPMScheduler is not of a flow; this image decoder needs FlowMatchEulerDiscreteScheduler or"),
        ("stable_diffusion_3", DDPM, "DDPMScheduler is not of a flow"),
        ("sana", {"_class_name": "DPMSolverMultistepScheduler"}, "DPMSolverMultistepScheduler with prediction_type="),
        ("stable_diffusion", EULER, "FlowMatchEulerDiscreteScheduler is of another noise process"),
    ],
)
def test_a_scheduler_of_another_process_is_named(folders, kind, scheduler, message, tmp_path):
    directory = shutil.copytree(folders / kind, tmp_path / "given")
    (directory / SCHEDULER).write_text(json.dumps(scheduler))
    with pytest.raises(ValueError) as refused:
        read_decoder_config(directory)
    assert str(refused.value).startswith(f"{directory / SCHEDULER}: {message}") and "\n" not in str(refused.value)


def test_parts_that_are_of_no_known_decoder_are_named(folders, tmp_path):
    def refused(error=ValueError) -> str:
        with pytest.raises(error) as caught:
            read_decoder_config(directory)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    directory = shutil.copytree(folders / "sana", tmp_path / "sana")
    shutil.copy(folders / "stable_diffusion_3" / "vae" / "config.json", directory / "vae" / "config.json")
    want = (
        f"{directory}/vae/config.json: _class_name 'AutoencoderKL' is not supported: expected one of ('AutoencoderDC',)"
    )
    assert refused() == want
    shutil.copytree(folders / "stable_diffusion" / "unet", directory / "unet")
    want = "has unet/config.json and transformer/config.json, which are two image decoders: take one of them away"
    assert refused() == f"{directory} {want}"
    shutil.rmtree(directory / "unet")
    edit(directory / "transformer" / "config.json", _class_name="FluxTransformer2DModel")
    assert refused() == (
        f"{directory} is no image decoder of a known kind: it has FluxTransformer2DModel in transformer/; known are "
        "UNet2DConditionModel in unet/, SanaTransformer2DModel in transformer/, SD3Transformer2DModel in transformer/"
    )
    edit(directory / "transformer" / "config.json", _class_name="SanaTransformer2DModel")
    (directory / "vae" / "config.json").unlink()
    assert refused(FileNotFoundError).startswith(f"{directory}/vae/config.json is missing")
    (directory / "transformer" / "config.json").unlink()
    assert refused(FileNotFoundError).startswith(f"{directory} has no unet/config.json and no transformer/config.json")


def test_tensors_that_do_not_fit_are_named(imported, tmp_path):
    """In layers of one kind that follow another's too."""
    flags = towers(imported["stable_diffusion_3"])
    directory = shutil.copytree(flags["image_decoder"], tmp_path / "given")
    file = directory / "transformer" / "diffusion_pytorch_model.safetensors"
    found = load_file(file)
    found["transformer_blocks.4.attn.to_q.bias"] = found.pop("transformer_blocks.3.attn.to_q.bias")
    found["transformer_blocks.2.attn2.to_q.bias"] = torch.ones(16)  # of the first two alone
    found["pos_embed.pos_embed"] = found["pos_embed.pos_embed"][:, 1:].clone()
    save_file(found, file, {"format": "pt"})
    with pytest.raises(ValueError) as refused:
        run("import", **flags | {"image_decoder": directory}, to=tmp_path / "to", num_queries=3)
    told = str(refused.value).splitlines()
    assert told[0] == f"image_decoder/denoiser of {directory}/transformer: 4 tensors do not fit:"
    assert {line.strip() for line in told[1:]} == {
        "missing transformer_blocks.3.attn.to_q.bias (16,)",
        "unexpected transformer_blocks.2.attn2.to_q.bias (16,)",
        "unexpected transformer_blocks.4.attn.to_q.bias (16,)",
        "pos_embed.pos_embed has shape (1, 143, 16), expected (1, 144, 16)",
    }
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_the_original_programs_format_is_refused(imported, kind, tmp_path):
    message = f"^the original program has no image_decoder of kind '{kind}': export with --format=hf or diffusers$"
    with pytest.raises(ValueError, match=message):
        run("export", checkpoint=imported[kind] / "ours", format="dreamllm", to=tmp_path / "to")
    run("export", checkpoint=imported[kind] / "ours", format="all", to=tmp_path / "to", no_check=True)
    assert {file.name for file in (tmp_path / "to").iterdir()} == {"hf", "diffusers"}


OTHER_TENSOR = {
    "sana": "transformer_blocks.2.ff.conv_inverted.weight",
    "stable_diffusion_3": "transformer_blocks.3.attn.add_k_proj.weight",
}
OTHER_SETTING = {"sana": {"flow_shift": 2.5}, "stable_diffusion_3": {"shift": 2.5}}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_verify_passes_and_sees_a_tensor_or_a_setting_that_differs(imported, kind, tmp_path):
    found = saved.find(str(imported[kind] / "ours"))
    differences = verify.compare(found.config, found.part, imported[kind] / "image_decoder")
    both = [(tower, dtype) for tower in ("denoiser", "autoencoder") for dtype in ("float32", "bfloat16")]
    assert [(d.tower, d.dtype) for d in differences] == [*both, ("scheduler", "any")]
    assert all(d.passed for d in differences), verify.table(differences)

    directory = shutil.copytree(imported[kind] / "image_decoder", tmp_path / "given")
    file = directory / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights[OTHER_TENSOR[kind]][0] *= 1.1
    save_file(weights, file, {"format": "pt"})
    edit(directory / SCHEDULER, **OTHER_SETTING[kind])
    differences = verify.compare(found.config, found.part, directory, ["float32"])
    told = {d.tower: d.passed for d in differences}
    assert told == {"denoiser": False, "autoencoder": True, "scheduler": False}, verify.table(differences)


def test_verify_names_another_decoders_class(imported):
    found, other = saved.find(str(imported["stable_diffusion_3"] / "ours")), imported["sana"] / "image_decoder"
    with pytest.raises(ValueError) as refused:
        verify.compare(found.config, found.part, other, ["float32"])
    told = f"{other}, denoiser: {other}/transformer holds a SanaTransformer2DModel, not a SD3Transformer2DModel"
    assert str(refused.value) == told


@pytest.mark.slow
def test_what_goes_out_in_fewer_digits_is_verified(imported, tmp_path):
    """The table of positions, no parameter in torch, among it."""
    given = {"checkpoint": imported["stable_diffusion_3"] / "ours", "format": "diffusers", "dtype": "bfloat16"}
    run("export", **given, to=tmp_path / "out")
    assert {tensor.dtype for tensor in in_folder(tmp_path / "out" / "transformer").values()} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_torchs_float64_result_judges_what_float32_cannot(imported, kind, monkeypatch):
    monkeypatch.setattr(verify, "FLOAT32_LIMIT", 1e-9)
    found = saved.find(str(imported[kind] / "ours"))
    differences = verify.compare(found.config, found.part, imported[kind] / "image_decoder", ["float32"])
    judged = [d for d in differences if d.tower != "scheduler"]
    assert len(judged) == 2 and all(1e-9 < d.relative < d.limit < 1e-5 for d in judged), verify.table(differences)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
GROWING = {"use_dynamic_shifting": True, "base_shift": 0.6, "max_shift": 1.3}


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")  # diffusers' DEIS
@pytest.mark.parametrize(
    ("scheduler", "changes"),
    [
        (EULER, {"shift": 2.5}),
        (EULER | GROWING, {"max_shift": 1.2}),
        (EULER | GROWING | {"time_shift_type": "linear"}, {"base_shift": 0.5}),
        (EULER, {"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0, **FLOW}),
        ({"_class_name": "DPMSolverMultistepScheduler", "flow_shift": 3.0, **FLOW}, {"solver_order": 3}),
        ({"_class_name": "DPMSolverMultistepScheduler", **GROWING, **FLOW}, {"max_shift": 1.2}),
        ({"_class_name": "UniPCMultistepScheduler", **GROWING, **FLOW}, {"solver_type": "bh1"}),
        ({"_class_name": "DEISMultistepScheduler", "flow_shift": 2.0, **FLOW}, {"flow_shift": 3.0}),
        ({"_class_name": "SASolverScheduler", "flow_shift": 2.0, **FLOW}, {"predictor_order": 1}),
    ],
    ids=str,
)
def test_flows_that_sample_alike_are_told_from_others(folders, scheduler, changes, tmp_path):
    """Each as its file has it, against one with another setting; shifts that grow with the picture among them."""
    directory = shutil.copytree(folders / "stable_diffusion_3", tmp_path / "given")
    (directory / SCHEDULER).write_text(json.dumps(scheduler))
    decoder = read_decoder_config(directory)

    def differ() -> bool:
        pairs = compare_sampling(decoder, directory / SCHEDULER)
        own = {name for name in pairs if "Euler" not in name}
        assert own == {"noise levels", "timesteps", "latents"}
        return not all(verify._same(name, *pair).passed for name, pair in pairs.items())

    assert not differ()
    edit(directory / SCHEDULER, **changes)
    assert differ()


# ---- Adapters -------------------------------------------------------------------------------------------------------


ADAPTED = ("image_decoder/denoiser", "language_model")


LORA = {"sana": SanaLora(rank=2, alpha=3.0), "stable_diffusion_3": MMDiTLora(rank=2, alpha=3.0)}


def with_adapters(model: Path, to: Path) -> saved.SavedModel:
    """The model with adapters of its denoiser and of its language model."""
    found = saved.find(str(model))
    decoder, llama = found.config.image_decoder, found.config.language_model
    denoiser = dataclasses.replace(decoder.denoiser, lora=LORA[decoder.kind])
    config = dataclasses.replace(
        found.config,
        image_decoder=dataclasses.replace(decoder, denoiser=denoiser),
        language_model=dataclasses.replace(llama, lora=LoraConfig(rank=3, alpha=2.0)),
    )
    drawn = flatten_dict(random_weights(nn.unbox(abstract_params(config))), sep="/")
    adapters = {path: leaf for path, leaf in drawn.items() if is_adapter(path)}
    to = epath.Path(to)
    saved.write_params(to, found.read(found.leaves()) | adapters)
    saved.write_description(to, config, None)
    return saved.find(str(to))


@pytest.fixture(scope="module")
def adapted(imported, tmp_path_factory):
    return with_adapters(imported["sana"] / "ours", tmp_path_factory.mktemp("adapted") / "model")


def velocity(config, params: dict) -> np.ndarray:
    """The denoiser's prediction, products exact."""
    decoder = config.image_decoder
    latents = np.random.default_rng(0).normal(size=(2, *decoder.latent_shape(8, 12))).astype(np.float32)
    module = decoder.denoiser.make(jnp.float32)
    given = latents, jnp.array([17.0, 801.5]), _condition(decoder.denoiser, 2)
    with jax.default_matmul_precision("F64_F64_F64"):
        return jax.jit(module.apply)({"params": params}, *given)


@pytest.mark.parametrize("kind", ["sana", pytest.param("stable_diffusion_3", marks=pytest.mark.slow)])
def test_adapters_of_a_denoiser_are_merged(imported, adapted, kind, tmp_path):
    """The export computes what the adapted model does, and knows nothing of adapters; those of one tower can stay."""
    if kind != "sana":
        adapted = with_adapters(imported[kind] / "ours", tmp_path / "adapted")
    count = {tower: sum(is_adapter(path) and path.startswith(tower) for path in adapted.leaves()) for tower in ADAPTED}
    products = {"sana": 4 + 4 + 2, "stable_diffusion_3": (8 + 4 + 4) + (8 + 4) + (7 + 2)}[kind]
    assert count == {"image_decoder/denoiser": 2 * products, "language_model": 2 * 7}
    run("export", checkpoint=adapted.directory, format="diffusers", to=tmp_path / "out", no_check=True)
    run("import", **towers(imported[kind]) | {"image_decoder": tmp_path / "out"}, to=tmp_path / "in", num_queries=3)
    back = saved.find(str(tmp_path / "in"))
    assert back.config.image_decoder.denoiser.lora is None and not any(map(is_adapter, back.leaves()))
    part = "image_decoder/denoiser"
    want = velocity(adapted.config, adapted.part(part))
    assert relative_error(velocity(back.config, back.part(part)), want) < 1e-6
    base = saved.find(str(imported[kind] / "ours"))
    assert relative_error(velocity(base.config, base.part(part)), want) > 0.1
    with pytest.raises(ValueError, match="is of an adapter, which has no PyTorch name: merge it first"):
        names.to_torch(adapted.part(part))


@pytest.mark.parametrize("kept", [(), ADAPTED[:1], ADAPTED[1:], ADAPTED])
def test_a_run_keeps_the_adapters_that_it_has_itself(adapted, kept):
    """Tower by tower: what goes on is kept, what does not is merged."""
    wanted = {tower: lora for tower, lora in adapters_in(adapted.config).items() if tower in kept}
    merged = adapted.merged(kept=wanted)
    assert adapters_in(merged.config) == wanted
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device) for path, x in merged.leaves().items()}
    assert {path.split("/lora_")[0].split("/")[0] for path in abstract if is_adapter(path)} == {
        tower.split("/")[0] for tower in kept
    }
    got = restore_initial(str(adapted.directory), merged.config, abstract)
    stored, whole = adapted.read(adapted.leaves()), adapted.merged()
    plain = whole.read(whole.leaves())
    for path, array in got.items():
        stays = any(path.startswith(tower) for tower in kept)
        np.testing.assert_allclose(array, (stored if stays else plain)[path], rtol=1e-6, atol=1e-6, err_msg=path)
