"""InternViT equals transformers' class, and sees pictures in the tiles that its image processor makes."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from dreamllm_jax.interop.files import Tensor
from dreamllm_jax.interop.names import from_torch, to_torch
from dreamllm_jax.interop.source import Part
from dreamllm_jax.towers.connectors.projector import ProjectorConfig
from dreamllm_jax.towers.vision_encoders import tiles
from dreamllm_jax.towers.vision_encoders.intern_vit import InternVit, InternVitConfig
from tests import public_models
from tests.parity import assert_same, compiled, gradients, nhwc, randomised, relative_error, tensors

TINY = public_models.INTERN_VIT
SIDE = TINY["image_size"]
QWEN = {
    "model_type": "qwen2",
    "vocab_size": 32,
    "hidden_size": 20,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
CONFIG = InternVitConfig(**TINY)


class Seeing(nn.Module):
    """The tower and what leads from it to the language model."""

    config: InternVitConfig
    projector: ProjectorConfig
    width: int
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.tower = self.config.make(self.dtype, "full")
        self.mlp = self.projector.make(self.width, self.dtype)

    def __call__(self, images):
        return self.mlp(self.tower(images))


def pair(changes, width=QWEN["hidden_size"]):
    """A random whole InternVL of PyTorch, ours up to what its language model is given, and the weights for that."""
    vision = transformers.InternVLVisionConfig(**{**TINY, **changes})
    config = transformers.InternVLConfig(
        vision_config=vision, text_config={**QWEN, "hidden_size": width}, attn_implementation="eager"
    )
    theirs = randomised(transformers.InternVLModel(config))
    ours = Seeing(InternVitConfig.from_public(config.to_dict()), ProjectorConfig("mlp", 2, pre_layernorm=True), width)
    side = ours.config.image_size
    template = nn.unbox(jax.eval_shape(ours.init, jax.random.key(0), np.zeros((1, side, side, 3), np.float32)))
    params = {
        "tower": from_torch(template["params"]["tower"], tensors(theirs.vision_tower)),
        "mlp": from_torch(template["params"]["mlp"], projector_names(tensors(theirs.multi_modal_projector))),
    }
    return theirs, ours, {"params": params}


def projector_names(found):
    today = {"layer_norm": "pre_layernorm", "linear_1": "projector.0", "linear_2": "projector.2"}
    return {name.replace(old := name.split(".")[0], today[old]): tensor for name, tensor in found.items()}


def assert_equal_towers(theirs, ours, params, count=3, compiled=compiled):
    """Outputs, and gradients with respect to the pixels and every weight."""
    rng, side = np.random.default_rng(0), ours.config.image_size
    images = rng.normal(size=(count, side, side, 3)).astype(np.float32)
    cotangent = rng.normal(size=(count, ours.config.num_patches, ours.width)).astype(np.float32)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().requires_grad_()
    output = theirs.get_image_features(pixels).pooler_output
    output.backward(torch.from_numpy(cotangent))

    @compiled
    def run(params, images):
        states, pullback = jax.vjp(ours.apply, params, images)
        return states, pullback(cotangent)

    states, (weights, grad) = run(params, images)
    weights = weights["params"]
    got = {"states": states, "pixels": grad, **to_torch(weights["tower"]), **to_torch(weights["mlp"])}
    want = {"states": output.detach(), "pixels": nhwc(pixels.grad), **gradients(theirs.vision_tower)}
    return assert_same(got, want | projector_names(gradients(theirs.multi_modal_projector)))


@pytest.mark.parametrize(
    "changes",
    [{}, {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False, "patch_size": 8}],
    ids=["300m", "6b"],
)
def test_equals_transformers(changes):
    theirs, ours, params = pair(changes)
    assert_equal_towers(theirs, ours, params)
    if changes:
        return
    # In bfloat16 it stays near; several tiles are one image, whose features are theirs one after the other.
    images = np.random.default_rng(1).integers(0, 256, (6, SIDE, SIDE, 3), dtype=np.uint8)
    run = compiled(lambda params, images: ours.apply(params, images))
    want = run(params, images)
    got = run(params, images.reshape(2, 3, SIDE, SIDE, 3))
    assert relative_error(got, np.asarray(want).reshape(got.shape)) < 1e-6
    half = compiled(ours.clone(dtype=jnp.bfloat16).apply)(params, images)
    assert half.dtype == jnp.bfloat16 and relative_error(half.astype(jnp.float32), want) < 0.03
    with pytest.raises(
        ValueError, match=r"images are \(8, 8, 3\) where the tower takes \(16, 16, 3\), or tiles of that"
    ):
        InternVit(CONFIG).init(jax.random.key(0), np.zeros((1, 8, 8, 3)))


def test_what_is_stacked_in_older_files_is_taken_apart():
    rows = np.arange(48, dtype=np.float32)
    part = Part.of(CONFIG, {"encoder.layers.1.attn.qkv.bias": Tensor.of(rows)})
    assert list(part.tensors) == [f"encoder.layer.1.attention.{name}_proj.bias" for name in "qkv"]
    np.testing.assert_array_equal(np.stack([tensor.read() for tensor in part.tensors.values()]), rows.reshape(3, 16))
    with pytest.raises(ValueError, match=r"a tensor is of shape \(47,\), which has no 3 equal parts"):
        Part.of(CONFIG, {"encoder.layers.0.attn.qkv.bias": Tensor.of(rows[1:])})


SIZES = [(448, 448), (447, 449), (200, 100), (1000, 1000), (896, 896), (640, 480), (1, 700), (3000, 250), (777, 1111)]


def test_grids_are_those_of_the_image_processor():
    rng = np.random.default_rng(0)
    for width, height in [*SIZES, *rng.integers(1, 4000, (300, 2)).tolist()]:
        for most in (1, 6, 12):
            columns, rows = get_optimal_tiled_canvas((height, width), (448, 448), 1, most)
            assert tiles.fitting(width, height, 448, most) == (448 * rows, 448 * columns), (width, height)


@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_those_of_the_image_processor(size):
    width, height = size
    config = dataclasses.replace(CONFIG, image_size=28, patch_size=7)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    names = {name: value for name, value in config.processor().items() if name != "image_processor_type"}
    processor = transformers.GotOcr2ImageProcessorPil(**names | {"do_rescale": False, "do_normalize": False})
    want = processor(photo, return_tensors="np")["pixel_values"]
    fitting = config.fitting(width, height)
    got = config.preprocess(photo, *fitting)
    assert got.dtype == np.uint8 and got.shape == config.pixels_shape(*fitting)
    np.testing.assert_array_equal(got.reshape(-1, 28, 28, 3).transpose(0, 3, 1, 2), want)
    assert config.tokens(*fitting) == len(want) * config.num_patches


def test_settings_are_read_in_either_layout():
    whole = transformers.InternVLConfig(vision_config=transformers.InternVLVisionConfig(**TINY), text_config=QWEN)
    assert InternVitConfig.from_public(whole.to_dict()) == CONFIG
    alone = transformers.InternVLVisionConfig()
    assert InternVitConfig.from_public(alone.to_dict()) == InternVitConfig()
    assert transformers.InternVLVisionConfig(**InternVitConfig().to_public()).to_dict() == alone.to_dict()
    names = {"attention_bias": "qkv_bias"}
    older = {names.get(name, name): value for name, value in TINY.items()}
    older |= {
        "model_type": "intern_vit_6b",
        "qk_normalization": False,
        "initializer_factor": 0.1,
        "drop_path_rate": 0.1,
    }
    chat = {"model_type": "internvl_chat", "vision_config": older, "force_image_size": 16, "max_dynamic_patch": 6}
    chat |= {"downsample_ratio": 0.25, "dynamic_image_size": True, "ps_version": "v2", "select_layer": -1}
    assert InternVitConfig.from_public(chat) == dataclasses.replace(CONFIG, downsample=4, max_tiles=6)
    squeezed = InternVitConfig.from_public(chat | {"dynamic_image_size": False})
    assert squeezed.max_tiles == 1 and squeezed.fitting(1000, 100) == (16, 16)
    for change, message in (
        ({"ps_version": "v1"}, "ps_version = 'v1' is not supported: only 'v2' is"),
        ({"select_layer": -2}, "select_layer = -2 is not supported"),
        ({"force_image_size": 32}, "force_image_size = 32 is not supported: only the tower's own image_size 16 is"),
        ({"downsample_ratio": 0.3}, "downsample_ratio = 0.3 is not supported"),
        ({"vision_config": older | {"image_size": [16, 32]}}, "image_size = .* only squares are"),
        ({"vision_config": older | {"patch_size": 5}}, "image_size 16 is not made of squares of downsample=4 patches"),
        ({"vision_config": older | {"hidden_act": "relu"}}, "hidden_act 'relu' is not supported"),
        ({"vision_config": older | {"dropout": 0.2}}, "dropout = 0.2 is not supported"),
    ):
        with pytest.raises(ValueError, match=message):
            InternVitConfig.from_public(chat | change)
    with pytest.raises(ValueError, match="select_layer=-2 is not supported: InternViT is read at its last layer"):
        InternVitConfig.from_public(chat, -2)


def test_the_processor_beside_a_tower():
    """Of InternVL's own layout nothing but the normalisation is meant."""
    beside = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": 16, "crop_size": 16, "do_center_crop": True}
    got = CONFIG.with_processor(beside | {"feature_extractor_type": "CLIPFeatureExtractor", "resample": 3})
    assert got == dataclasses.replace(CONFIG, image_mean=(0.5,) * 3, image_std=(0.25,) * 3)
    processor = transformers.GotOcr2ImageProcessorPil(**got.processor() | {"max_patches": 4})
    assert CONFIG.with_processor(processor.to_dict()) == dataclasses.replace(got, max_tiles=4)
    with pytest.raises(ValueError, match="min_patches = 2 is not supported: only 1 is"):
        CONFIG.with_processor({"min_patches": 2})
    with pytest.raises(ValueError, match="images are seen in tiles of 16 x 16 pixels, which 16 x 24 are not made of"):
        CONFIG.tokens(16, 24)


@pytest.mark.slow
def test_one_layer_at_true_width():
    published = InternVitConfig(**InternVitConfig.PUBLISHED["internvit-300m-448"])
    shape = dataclasses.replace(published, num_hidden_layers=1, image_size=112).to_public()
    theirs, ours, params = pair(shape, width=896)
    assert (ours.config.width, published.num_patches) == (4096, 256)
    # Without the optimiser such wide products take a minute.
    optimised = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 2})
    assert_equal_towers(theirs, ours, params, count=1, compiled=optimised)
