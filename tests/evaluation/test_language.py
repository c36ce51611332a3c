"""lm-eval's numbers of our model: what transformers' LLaMA gives with the same weights, whatever the batch."""

import json
import os
import warnings

import jax
import numpy as np
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # it would try for minutes
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what lm-eval imports
    from dreamllm_jax.evaluation import language
from lm_eval.api.instance import Instance

from dreamllm_jax.evaluate import make_parser
from dreamllm_jax.evaluation.scores import Checkpoint
from dreamllm_jax.model import DreamLLM, abstract_params
from dreamllm_jax.parallel.mesh import ShardingConfig, make_mesh, param_shardings, use
from tests.evaluation.models import CONFIG, PARAMS, TOKENIZER, WORDS, save
from tests.torch_reference import TorchDreamLLM

MODEL = DreamLLM(CONFIG)
LONGEST = CONFIG.language_model.max_position_embeddings


def subject(batch: int, params: dict = PARAMS) -> language.LanguageModel:
    return language.LanguageModel(MODEL, params, TOKENIZER, batch)


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


def texts(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 12))) for _ in range(count)]


PAIRS = [
    *zip(texts(12, 0), [f" {text}" for text in texts(12, 1)], strict=True),
    ("", "red fox"),
    ("the space before goes to the continuation ", "fox"),
    (" ".join(WORDS * 4), " and snow"),  # longer than the model reads
]


@pytest.fixture(scope="module")
def reference():
    return TorchDreamLLM(CONFIG, PARAMS).language_model.eval()


def logits(reference, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return reference(torch.tensor(tokens)[None]).logits[0].double()


@pytest.mark.slow
def test_loglikelihoods_are_those_of_transformers(reference):
    found = subject(4).loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    for (context, continuation), (total, greedy) in zip(PAIRS, found, strict=True):
        spaces = len(context) - len(context.rstrip())
        whole = TOKENIZER.encode_text(context + continuation)
        before = len(TOKENIZER.encode_text(context[: len(context) - spaces]))
        tokens = [TOKENIZER.special.bos, *whole][-LONGEST - 1 :]
        probabilities = torch.log_softmax(logits(reference, tokens[:-1]), dim=-1)
        scored = len(whole) - before
        rows = torch.arange(len(tokens) - 1 - scored, len(tokens) - 1)
        want = probabilities[rows, torch.tensor(tokens[-scored:])]
        np.testing.assert_allclose(total, want.sum().item(), rtol=1e-5, atol=1e-5)
        assert greedy == bool((probabilities[rows].argmax(-1) == torch.tensor(tokens[-scored:])).all())


@pytest.mark.slow
def test_rolling_loglikelihood_scores_every_token_once(reference):
    long = " ".join(WORDS * 5)
    found = subject(3).loglikelihood_rolling(requests("loglikelihood_rolling", [(long,), ("red fox",)]))
    for text, total in zip((long, "red fox"), found, strict=True):
        tokens, want = TOKENIZER.encode_text(text), 0.0
        for start in range(0, len(tokens), LONGEST):
            part = tokens[start : start + LONGEST]
            # The first window begins with <s>; the last one is filled up with what was read before it.
            read = [TOKENIZER.special.bos, *part] if start == 0 else tokens[: start + len(part)][-LONGEST - 1 :]
            probabilities = torch.log_softmax(logits(reference, read[:-1]), dim=-1)[-len(part) :]
            want += probabilities[torch.arange(len(part)), torch.tensor(part)].sum().item()
        np.testing.assert_allclose(total, want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_neither_batch_nor_devices_change_a_result():
    asked = requests("loglikelihood", PAIRS)
    settings = {"until": ["snow"], "max_gen_toks": 8}
    prompts = [(text, settings) for text in [*texts(4, 2), " ".join(WORDS * 4)]]
    prompts.append((WORDS[0], {**settings, "do_sample": True, "temperature": 1.0}))
    written = requests("generate_until", prompts)
    alone = subject(1)
    want, told = alone.loglikelihood(asked, disable_tqdm=True), alone.generate_until(written)
    assert any(told) and not any("snow" in text for text in told)
    sharding = ShardingConfig(fsdp=4, tensor=2)
    mesh = make_mesh(sharding)
    split = jax.tree.map(jax.device_put, PARAMS, param_shardings(abstract_params(CONFIG), mesh, sharding))
    with use(mesh, sharding):
        many = subject(8, split)
        found = many.loglikelihood(asked, disable_tqdm=True)
        assert many.generate_until(written) == told
    np.testing.assert_allclose([total for total, _ in found], [total for total, _ in want], rtol=1e-5, atol=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in want]


def local_task(folder) -> str:
    """A multiple-choice task in a JSON file; its name."""
    items = [
        {"question": text, "choices": ["fox", "barn", "snow"], "answer": i % 3} for i, text in enumerate(texts(9, 3))
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "local.yaml").write_text(
        "task: local_foxes\ndataset_path: json\n"
        f"tag: [foxes]\ndataset_kwargs:\n  data_files: {{test: {folder / 'items.jsonl'}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: choices\ndoc_to_target: answer\n'
        "metric_list: [{metric: acc}]\nmetadata: {version: 1.0}\n"
    )
    return "local_foxes"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # lm-eval's and datasets' own
def test_a_local_task_runs_offline_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    words = [f"--tasks={local_task(tmp_path)}", f"--include={tmp_path}", "--shots=0", "--batch=8", f"--to={tmp_path}"]
    arguments = make_parser().parse_args(["language", f"--checkpoint={save(tmp_path / 'model')}", *words])
    arguments.main(arguments)
    score = json.loads((tmp_path / "local_foxes-0.json").read_text())
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    asked = requests("loglikelihood", [(i["question"], f" {choice}") for i in items for choice in i["choices"]])
    totals = np.array([total for total, _ in subject(8).loglikelihood(asked, disable_tqdm=True)]).reshape(9, 3)
    right = totals.argmax(axis=1) == [item["answer"] for item in items]
    assert (score["task"], score["count"], score["metrics"]["acc"]) == ("local_foxes", 9, right.mean())
    assert score["standard_errors"]["acc"] == pytest.approx(right.std(ddof=1) / 3)

    given = Checkpoint("x", 0, False)
    (tmp_path / "group.yaml").write_text("group: pack\ntask: [local_foxes]\nmetadata: {version: 1.0}\n")
    manager = language.find_tasks(["foxes", "pack"], str(tmp_path))
    for name in ("foxes", "pack"):  # neither has figures of its own
        (member,) = language.evaluate(subject(8), given, {name: 0}, manager)
        assert (member.task, member.count, member.metrics) == ("local_foxes", 9, score["metrics"])
    with pytest.raises(ValueError, match="has no task nonsense: there are foxes, local_foxes, pack"):
        language.find_tasks(["nonsense"], str(tmp_path))
