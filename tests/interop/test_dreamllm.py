"""A checkpoint laid out as the original program writes it is read whole, or refused by name."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dreamllm_jax.interop.dreamllm import read_config, read_params, require_same_model
from dreamllm_jax.interop.names import from_torch, to_torch, torch_name
from dreamllm_jax.models.projectors import ProjectorConfig
from dreamllm_jax.vocabulary import SpecialTokens
from tests.tiny import MLP, tiny_config, tiny_params

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

# The original's ids come out of a Python set, in any order.
TOKENS = SpecialTokens(
    bos=1, eos=2, pad=60, image=55, im_patch=61, im_start=57, im_end=58, dream=59, dream_start=56, dream_end=62
)
CONFIG = tiny_config(
    special_tokens=TOKENS,
    visual_projector=MLP,
    condition_projector=ProjectorConfig(kind="mlp", depth=2),
)
PARAMS = tiny_params(CONFIG)


def tensors(part: str, prefix: str = "") -> dict:
    named = to_torch(PARAMS[part]).items()
    return {prefix + name: torch.tensor(np.ascontiguousarray(array)) for name, array in named}


def settings(part, **more) -> dict:
    """A part's configuration as its config.json has it."""
    return {name: value for name, value in dataclasses.asdict(part).items() if value is not None} | more


@pytest.fixture
def checkpoint(tmp_path):
    """A directory as the original's `save_pretrained` leaves it, with the towers it refers to inside."""
    llama = {f"model.{name}": tensor for name, tensor in tensors("llama").items() if not name.startswith("lm_head")}
    llama["lm_head.weight"] = tensors("llama")["lm_head.weight"]
    llama["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    safetensors.save_file(llama, tmp_path / "model.safetensors")
    vision = tensors("clip", "clip_vision_model.vision_model.")
    for name, tensor in tensors("visual_projector").items():
        vision[name if name.startswith("post_layernorm") else f"projector.{name}"] = tensor
    torch.save(vision, tmp_path / "clip_vision_embedding.bin")
    head = tensors("vae", "vae.") | tensors("unet", "unet.") | tensors("condition_projector", "projector.")
    torch.save(head, tmp_path / "stable_diffusion_head.bin")
    torch.save({"dream_queries": tensors("queries")["dream_queries"][None]}, tmp_path / "dream_embedding.bin")

    clip = settings(CONFIG.clip, model_type="clip_vision_model")
    select_layer = clip.pop("select_layer")
    ids = dataclasses.asdict(TOKENS)
    config = settings(CONFIG.llama, model_type="dreamllm", hidden_act="silu") | {
        "special_tokens2ids_dict": {
            "<s>": ids.pop("bos"),
            "</s>": ids.pop("eos"),
            "[PAD]": ids.pop("pad"),
            "additional_special_tokens": {f"<{name}>": value for name, value in ids.items()},
        },
        "plugins_init_kwargs": {
            "clip_vision_embedding": {
                "clip_vision_model_name_or_path": "clip",
                "projector_type": "mlp",
                "projector_depth": 2,
                "select_layer": select_layer,
                "use_additional_post_layernorm": True,
            },
            "dream_embedding": {"num_dream_queries": CONFIG.num_queries},
            "stable_diffusion_head": {
                "diffusion_name_or_path": "diffusion",
                "projector_type": "mlp",
                "projector_depth": 2,
            },
        },
    }
    files = {
        "config.json": config,
        "clip/config.json": clip,
        "diffusion/vae/config.json": settings(CONFIG.vae),
        "diffusion/unet/config.json": settings(CONFIG.unet),
        "diffusion/scheduler/scheduler_config.json": settings(CONFIG.schedule),
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def test_a_checkpoint_is_read_whole(checkpoint):
    config = read_config(checkpoint)
    assert dataclasses.replace(config, remat="none") == CONFIG
    got, want = flatten_dict(read_params(checkpoint, PARAMS), sep="/"), flatten_dict(PARAMS, sep="/")
    assert got.keys() == want.keys()
    for path in want:
        np.testing.assert_array_equal(got[path], want[path], err_msg=path)


def test_a_checkpoint_of_another_model_is_refused(checkpoint):
    require_same_model(checkpoint, dataclasses.replace(CONFIG, dtype="bfloat16", remat="full"))
    llama = dataclasses.replace(CONFIG.llama, rope_theta=5e5)
    for other, message in (
        ({"llama": llama}, r"config\.model\.llama\.rope_theta is 500000\.0, but .* has 10000\.0"),
        (
            {"special_tokens": dataclasses.replace(TOKENS, dream=3)},
            r"config\.model\.special_tokens\.dream is 3, but .* 59",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            require_same_model(checkpoint, dataclasses.replace(CONFIG, **other))


def test_shards_are_read(checkpoint):
    whole = safetensors.load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    names = sorted(whole)
    weight_map = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        safetensors.save_file({n: whole[n] for n in names if weight_map[n] == shard}, checkpoint / shard)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    jax.tree.map(np.testing.assert_array_equal, read_params(checkpoint, PARAMS)["llama"], PARAMS["llama"])


def test_what_does_not_fit_is_named(checkpoint):
    vision = torch.load(checkpoint / "clip_vision_embedding.bin")
    vision["projector.projector.7.weight"] = vision.pop("projector.projector.2.weight")
    vision["projector.projector.0.weight"] = torch.zeros(5, 5)
    torch.save(vision, checkpoint / "clip_vision_embedding.bin")
    with pytest.raises(ValueError, match="visual_projector: 3 tensors do not fit") as refused:
        read_params(checkpoint, PARAMS)
    for problem in (
        "missing projector.2.weight",
        r"projector.0.weight has shape (5, 5) where (16, 32) is expected",
        "unexpected projector.7.weight (32, 32)",
    ):
        assert problem in str(refused.value)


def test_broken_files_are_named(checkpoint):
    (checkpoint / "dream_embedding.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"dream_embedding\.bin is missing"):
        read_params(checkpoint, PARAMS)
    data = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or not a safetensors file"):
        read_params(checkpoint, PARAMS)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        read_config(checkpoint)
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="model_type 'llama', expected 'dreamllm'"):
        read_config(checkpoint)


def test_names_go_both_ways():
    assert torch_name("down_blocks_0/resnets_1/conv1/kernel") == "down_blocks.0.resnets.1.conv1.weight"
    assert torch_name("layers/mlp/up_proj/kernel", layer=3) == "layers.3.mlp.up_proj.weight"
    assert torch_name("time_embedding/linear_1/bias") == "time_embedding.linear_1.bias"
    for part, tree in PARAMS.items():
        back = flatten_dict(from_torch(tree, to_torch(tree)), sep="/")
        for path, leaf in flatten_dict(tree, sep="/").items():
            np.testing.assert_array_equal(back[path], leaf, err_msg=f"{part}/{path}")
