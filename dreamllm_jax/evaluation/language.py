"""Language tasks through EleutherAI's lm-eval: our model as one of its models.

Legend: B rows, T tokens.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dreamllm_jax.data.document import Text
from dreamllm_jax.data.tokenizer import Tokenizer
from dreamllm_jax.evaluation import scores
from dreamllm_jax.evaluation.hosts import compute
from dreamllm_jax.generation.prompts import bucket
from dreamllm_jax.generation.text import Sampling
from dreamllm_jax.generation.texts import generate_texts
from dreamllm_jax.model import DreamLLM

# The paper's tasks under lm-eval's names, and the shots it gives (section A.1).
PAPER = {"boolq": 0, "piqa": 0, "social_iqa": 0, "hellaswag": 0, "winogrande": 0, "mmlu": 5}

_BLOCK = 128  # positions whose logits exist at a time
_NEW_TOKENS = 256  # where a task does not say how many


@functools.partial(jax.jit, static_argnames="model")
def token_scores(
    model: DreamLLM,
    params: dict,
    inputs: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    lengths: Int[Array, " B"],
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Log-probabilities of targets after their inputs, and whether each is the most probable token.

    Args:
      inputs: documents padded on the right to a power of two.
      lengths: tokens of each that count.
    """
    joined = model.bind({"params": params})
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    hidden, _ = joined.decode(joined.embed(inputs), positions, segments)

    def block(given):
        hidden, targets = given
        logits = joined.language_model.logits(hidden).astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), logits.argmax(axis=-1) == targets

    def split(x):  # [B, T, ...] -> [T / block, B, block, ...]
        return x.reshape(x.shape[0], -1, min(_BLOCK, x.shape[1]), *x.shape[2:]).swapaxes(0, 1)

    found = jax.lax.map(block, (split(hidden), split(targets)))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(inputs.shape), found)


class LanguageModel(TemplateLM):
    """A DreamLLM as lm-eval sees a model. Documents begin with `<s>`, where there is one; what is too long loses its
    beginning.

    Args:
      batch: rows at a time on each host; no result depends on it.
    """

    def __init__(self, model: DreamLLM, params: dict, tokenizer: Tokenizer, batch: int):
        super().__init__()
        self._model, self._params, self._ours, self._batch = model, params, tokenizer, batch

    @property
    def eot_token_id(self) -> int:
        return self._ours.special.eos

    @property
    def prefix_token_id(self) -> int:
        bos, eos = self._ours.special.bos, self._ours.special.eos
        return eos if bos is None else bos

    @property
    def max_length(self) -> int:
        return self._model.config.language_model.max_position_embeddings

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        begin = () if add_special_tokens is False else self._ours.special.begin
        return [*begin, *self._ours.encode_text(string)]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation[-self.max_length :]) for _, context, continuation in requests]
        found = compute(self._score, pairs, batch=self._batch, length=lambda pair: len(pair[0]) + len(pair[1]))
        return [(total, greedy) for total, greedy in found]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        rows = [[*context, *continuation][-(self.max_length + 1) :] for context, continuation in pairs]
        lengths = np.array([len(row) - 1 for row in rows])
        tokens = np.full((len(rows), bucket(int(lengths.max()), 32) + 1), self._ours.special.pad, np.int32)
        for filled, row in zip(tokens, rows, strict=True):
            filled[: len(row)] = row
        given = tokens[:, :-1], tokens[:, 1:], lengths
        probabilities, greedy = jax.device_get(token_scores(self._model, self._params, *given))
        scored = [slice(n - len(continuation), n) for n, (_, continuation) in zip(lengths, pairs, strict=True)]
        return [
            (float(p[part].sum(dtype=np.float64)), bool(g[part].all()))
            for p, g, part in zip(probabilities, greedy, scored, strict=True)
        ]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                context, continuation = make_disjoint_window(window)
                windows.append((None, list(context), list(continuation)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (total, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += total
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        texts: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        for indices in groups.values():
            settings = requests[indices[0]].args[1]
            numbered = [(index, requests[index].args[0]) for index in indices]
            written = compute(
                functools.partial(self._write, settings), numbered, batch=self._batch, length=lambda item: len(item[1])
            )
            for index, text in zip(indices, written, strict=True):
                texts[index] = text
        return texts

    def _write(self, settings: Mapping[str, Any], numbered: Sequence[tuple[int, str]]) -> list[str]:
        until = settings.get("until") or []
        tokens = settings.get("max_gen_toks", _NEW_TOKENS)
        room = self.max_length - tokens - 1
        if room < 1:
            raise ValueError(f"the task asks for {tokens} new tokens, the model can read {self.max_length} in all")
        sampling = None
        if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
            names = ("temperature", "top_k", "top_p")
            given = {name: settings[name] for name in names if settings.get(name) is not None}
            sampling = Sampling.of([index for index, _ in numbered], **given)
        prompts = []
        for _, text in numbered:
            encoded = self._ours.encode_text(text)
            prompts.append([Text(text if len(encoded) <= room else self._ours.decode(encoded[-room:]))])
        stop = [until] if isinstance(until, str) else until
        return generate_texts(
            self._model, self._params, self._ours, prompts, max_tokens=tokens, sampling=sampling, stop=stop
        )


def find_tasks(names: Iterable[str], include: str = "") -> TaskManager:
    """Where lm-eval finds the tasks: among its own, or in the folder `include` of YAML files.

    Raises:
      ValueError: one of them is not there.
    """
    manager = TaskManager(include_path=include or None, include_defaults=not include)
    if unknown := sorted(set(names) - set(manager.all_tasks)):
        there = f"there are {', '.join(manager.all_tasks)}" if include else "`lm_eval ls tasks` prints all names"
        raise ValueError(f"{include or 'lm-eval'} has no task {', '.join(unknown)}: {there}")
    return manager


def evaluate(
    subject: LanguageModel,
    checkpoint: scores.Checkpoint,
    tasks: Mapping[str, int | None],
    manager: TaskManager,
    limit: int | None = None,
) -> list[scores.Score]:
    """Runs lm-eval's tasks; all hosts must call it.

    Args:
      tasks: names of tasks, groups or tags, with how many examples precede each question; None for the task's own.
      manager: where they are.
      limit: only so many documents of each task.

    Returns:
      A score of each task and of each group that has figures of its own; of others and of tags, one of each member.
    """
    found = []
    for task, shots in tasks.items():
        result = simple_evaluate(subject, tasks=[task], num_fewshot=shots, limit=limit, task_manager=manager)
        settings = {"shots": shots, "limit": limit, "include": manager.include_path}
        members = list(result["n-samples"])
        if _numbers(result, task):
            found.append(_score(task, members, result, checkpoint, settings))
        else:
            found += [_score(member, [member], result, checkpoint, settings) for member in members]
    return found


def _numbers(result: Mapping[str, Any], task: str) -> dict[str, float]:
    told = result["results"].get(task, {})
    return {name.removesuffix(",none"): value for name, value in told.items() if isinstance(value, float)}


def _score(
    task: str,
    members: Sequence[str],
    result: Mapping[str, Any],
    checkpoint: scores.Checkpoint,
    settings: Mapping[str, Any],
) -> scores.Score:
    numbers = _numbers(result, task)
    errors = {name.replace("_stderr", ""): value for name, value in numbers.items() if "_stderr" in name}
    count = sum(result["n-samples"][member]["effective"] for member in members)
    versions = {member: result["versions"].get(member) for member in members}
    return scores.Score(
        task,
        checkpoint,
        count,
        metrics={name: value for name, value in numbers.items() if "_stderr" not in name},
        standard_errors=errors,
        settings={**settings, "versions": versions, "lm_eval": result.get("lm_eval_version")},
    )
