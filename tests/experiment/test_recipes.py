"""The shipped configurations: what they say is what the authors published, and their arguments are strict."""

import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from dreamllm_jax.common.configuration import ConfigError, differences
from dreamllm_jax.experiment import recipes
from dreamllm_jax.experiment.experiment import Experiment, read_experiment
from dreamllm_jax.runs.check import check, describe
from dreamllm_jax.towers.connectors.projector import ProjectorConfig

CONFIGS = Path(__file__).parents[2] / "configs"
STAGE_1 = ("stage1_creation", "stage1_comprehension", "stage1_joint")
STAGES = (*STAGE_1, "stage2_igpt", "stage3_sft")


def get_config(name: str, argument: str):
    return recipes.load(CONFIGS / f"{name}.py", argument)


def experiment(name: str, argument: str = "") -> Experiment:
    return read_experiment(get_config(name, argument))


@pytest.mark.parametrize("stage", STAGES)
def test_settings_are_the_published_ones(stage):
    given = experiment(stage)
    model, objective = given.model, given.objective
    assert (model.num_queries, model.vision_encoder.num_patches, model.vision_encoder.depth) == (64, 256, 23)
    assert (model.image_decoder.denoiser.cross_attention_dim, model.image_decoder.schedule.prediction_type) == (
        1024,
        "epsilon",
    )
    rate = {"stage1": 2e-3, "stage2": 2e-5, "stage3": 4e-5}[stage.split("_")[0]]
    assert (given.optimizer.learning_rate, given.optimizer.warmup_ratio, given.optimizer.weight_decay) == (
        rate,
        3e-3,
        0,
    )
    weights = {"stage1_creation": (0, 1), "stage1_comprehension": (1, 0), "stage1_joint": (1, 1)}.get(stage, (1, 10))
    assert (objective.lm_weight, objective.dm_weight) == weights


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("argument", "layers", "positions", "condition"),
    [
        ("7b", 32, 2048, 1024),
        ("13b", 40, 2048, 1024),
        ("llm=vicuna15-7b,decoder=sd15", 32, 4096, 768),
        ("vicuna15-13b", 40, 4096, 1024),
        ("llama31-8b,queries=128", 32, 131072, 1024),
        ("tinyllama", 22, 2048, 1024),
    ],
)
def test_models_of_a_stage(stage, argument, layers, positions, condition):
    model = experiment(stage, argument).model
    assert (model.language_model.num_hidden_layers, model.language_model.max_position_embeddings) == (layers, positions)
    assert model.image_decoder.denoiser.cross_attention_dim == condition and model.language_model.lora is None
    assert model.num_queries == (128 if "queries" in argument else 64)
    if "llama31" in argument:
        llama = model.language_model
        assert (llama.num_key_value_heads, llama.rope_theta, llama.rope_scaling.rope_type) == (8, 5e5, "llama3")
        assert (llama.vocab_size, model.special_tokens.dream_end) == (128264, 128263)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_llava_sees_and_paints_nothing(stage):
    for version, size, projector in (("1", 224, ProjectorConfig()), ("1.5", 336, ProjectorConfig("mlp", 2))):
        given = experiment("llava", f"{version},stage={stage}")
        assert (given.model.vision_encoder.image_size, given.model.visual_projector) == (size, projector)
        assert given.model.language_model.max_position_embeddings == (2048 if version == "1" else 4096)
        assert (given.optimizer.learning_rate, given.objective.dm_weight) == (2e-3 if stage == "pretrain" else 4e-5, 0)
        assert not given.row_shape.dream and given.row_shape.see[0].tokens == (size // 14) ** 2
        trains = [
            name for name in ("language_model/x", "visual_projector/x", "vision_encoder/x") if trained(given, name)
        ]
        assert trains == (["language_model/x"] if stage == "finetune" else []) + ["visual_projector/x"]
    assert experiment("llava", "llm=qwen3-0.6b,vision=siglip2-so400m-384").row_shape.see[0].tokens == 729


def trained(given: Experiment, path: str) -> bool:
    return next(chosen for pattern, chosen in given.parameters.trainable if re.fullmatch(pattern, path))


def test_with_adapters_the_llama_itself_is_frozen():
    given = experiment("stage3_sft", "llm=7b,lora=16")
    assert (given.model.language_model.lora.rank, given.model.language_model.lora.scale) == (16, 2)
    assert experiment("stage3_sft").parameters.trainable != given.parameters.trainable


@pytest.mark.parametrize(
    ("stage", "argument", "message"),
    [
        ("stage2_igpt", "8b", r"argument\.llm must be one of '7b', '13b', .*, got '8b'"),
        ("stage2_igpt", "llm=7b,querys=3", r"argument\.querys is not a setting; did you mean argument\.queries\?"),
        ("stage2_igpt", "diffusion=sd15", r"argument\.diffusion is called argument\.decoder now"),
        ("stage2_igpt", "queries=many", r"argument\.queries must be int, got 'many'"),
        ("stage2_igpt", "7b,13b", r"'13b' is not name=value"),
        ("stage2_igpt", "llm=7b,llm=13b", "gives llm twice"),
        ("stage2_igpt", "queries=", "'queries=' is not name=value"),
        ("stage2_igpt", "decoder=sd12", r"argument\.decoder must be one of .* did you mean 'sd21'\?"),
        (
            "stage1_joint",
            "lora=4",
            r"argument\.lora is not a setting; there are llm, vision, decoder, connector, queries",
        ),
        ("tiny", "7b", r"argument\.queries must be int, got '7b'"),
    ],
)
def test_arguments_are_strict(stage, argument, message):
    with pytest.raises(ConfigError, match=message) as refused:
        get_config(stage, argument)
    assert "\n" not in str(refused.value)


def shipped() -> list[str]:
    """Every configuration, and every variant of every sweep, as FILE.py:argument."""
    found = [path.name for path in sorted(CONFIGS.glob("*.py")) if path.stem != "alignment"]
    for path in sorted((CONFIGS / "ablations").glob("*.py")):
        variants = recipes.module(path).SWEEP
        found += [f"ablations/{path.name}:{','.join(f'{k}={v}' for k, v in variant.items())}" for variant in variants]
    return found


@pytest.mark.parametrize("config", shipped())
def test_every_shipped_configuration_is_read(config):
    file, _, argument = config.partition(":")
    given = recipes.load(CONFIGS / file, argument)
    assert read_experiment(given) == read_experiment(given.to_dict())


WHOLE = ["small.py", "ablations/trained_clip.py", "ablations/trained_unet.py", "ablations/lora_rank.py:llm=13b"]
WHOLE += ["ablations/queries.py:parent=tiny,queries=256", "stage1_creation.py:llama31-8b,decoder=sd15"]


@pytest.mark.slow
@pytest.mark.parametrize("config", WHOLE)
def test_their_shapes_groups_and_trained_parameters_are_checked(config):
    """Of one of each kind; the others differ in numbers."""
    file, _, argument = config.partition(":")
    _, trainable, frozen = check(recipes.load(CONFIGS / file, argument).to_dict())
    assert trainable and bool(frozen) == ("tiny" not in config)
    assert any(path.startswith("image_decoder/denoiser/") for path in trainable) == (
        "unet" in config or "tiny" in config
    )


def test_an_ablation_is_its_difference():
    given, parent = (experiment(name, "llm=13b") for name in ("ablations/loss_weights", "stage2_igpt"))
    assert differences(parent, experiment("ablations/loss_weights", "dm=5,llm=13b")) == {
        "parent": ("", given.parent),
        "objective.dm_weight": (10.0, 5.0),
    }
    assert Path(given.parent.partition(":")[0]).name == "stage2_igpt.py" and given.parent.endswith(":llm=13b")


def test_shares_of_the_mixture():
    def weights(argument):
        corpora = get_config("ablations/text_share", f"parent=tiny,{argument}").data.corpora
        total = sum(corpus.weight for corpus in corpora.values())
        return {name: corpus.weight / total for name, corpus in corpora.items()}

    assert weights("share=0.25") == pytest.approx(
        {"text": 0.25, "pairs": 0.75 * 16 / 18, "interleaved": 0.75 / 18, "conversations": 0.75 / 18}
    )
    assert weights("share=1") == {"text": 1} and "text" not in weights("share=0")
    with pytest.raises(ConfigError, match=r"argument\.share must lie in \[0, 1\], got 2"):
        weights("share=2")


def test_what_a_check_says():
    told = describe(recipes.load(CONFIGS / "ablations" / "queries.py", "parent=tiny,queries=4").to_dict())
    assert "model.num_queries" in told and "8 -> 4" in told and "differences from" in told
    assert "pairs          88.9% of the documents, joint" in told
    assert "tokens                  1,024          1,024,000" in told
    count = next(line for line in told.splitlines() if line.startswith("  dream_queries"))
    assert count.split() == ["dream_queries", "512", "float32", "trained"]
    assert "learning rate" in told and "step 1,000" in told and "\u2588" in told
    assert all(len(line) < 200 for line in told.splitlines()) and "warning" not in told
    frozen = recipes.override(
        recipes.load(CONFIGS / "tiny.py"), ["--config.parameters.trainable=(('dream_queries/.*',True),('.*',False))"]
    )
    assert "warning: what is frozen stays as random as it begins" in describe(frozen.to_dict())


def test_settings_on_the_command_line():
    """Also of groups that are not there, of references, and of texts that look like numbers."""
    config = ConfigDict({"data": {"path": "x"}, "model": {"lora": None}, "steps": 3, "flip": False})
    config.every = config.get_ref("steps") * 2
    config.lock()
    given = (
        "steps=5 data.path=12 data.window=2.5 data.window=x validation.samples.documents=2 model.lora.rank=4 flip=true"
    )
    given += " pairs=(('a',1.0),) model.dtype=float32 model.dtype=None"
    assert recipes.override(config, [f"--config.{flag}" for flag in given.split()]).to_dict() == {
        "data": {"path": "12", "window": "x"},
        "model": {"lora": {"rank": 4}, "dtype": None},
        "steps": 5,
        "every": 10,
        "flip": True,
        "validation": {"samples": {"documents": 2}},
        "pairs": (("a", 1.0),),
    }
    for flag, message in (
        ("--config.steps", "is not --config.SETTING=VALUE"),
        ("--config.steps.x=1", "steps is 5, not"),
    ):
        with pytest.raises(ConfigError, match=message):
            recipes.override(config, [flag])


@pytest.mark.parametrize(
    ("program", "message"),
    [("def get_config(:", "SyntaxError"), ("def get_config():\n  return nothing", "NameError: name 'nothing'")],
)
def test_a_program_that_fails_is_named(program, message, tmp_path):
    (tmp_path / "mine.py").write_text(program)
    with pytest.raises(ConfigError, match=rf"mine\.py: {message}"):
        recipes.load(tmp_path / "mine.py")
