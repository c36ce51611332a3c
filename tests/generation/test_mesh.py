"""Generation on several devices gives what it gives on one, and compiles once."""

import jax
import pytest
from flax.traverse_util import flatten_dict

from dreamllm_jax.data.document import Text
from dreamllm_jax.generation import images, text
from dreamllm_jax.generation.prompts import Painted
from dreamllm_jax.generation.text import Sampling
from dreamllm_jax.model import abstract_params
from dreamllm_jax.parallel.mesh import ShardingConfig, make_mesh, param_shardings, use
from tests.generation import test_documents
from tests.generation.test_documents import MODEL, PARAMS, PROMPTS, assert_same, told

pytestmark = pytest.mark.slow
SETTINGS = {"seeds": [1, 20, 300, 4000], "sampling": Sampling.of([7, 8, 9, 10], 0.8, 0, 0.95, 1.2)}


def test_eight_devices_tell_the_same_documents_as_one(monkeypatch):
    want = told(PROMPTS, **SETTINGS)
    assert sum(isinstance(segment, Painted) for document in want for segment in document) > 2
    config = ShardingConfig(fsdp=4, tensor=2)
    mesh = make_mesh(config)
    shardings = param_shardings(abstract_params(MODEL.config), mesh, config)
    params = jax.tree.map(jax.device_put, PARAMS, shardings)
    split = [
        path for path, leaf in flatten_dict(params["language_model"], sep="/").items() if not leaf.is_fully_replicated
    ]
    assert len(split) >= 8, "the llama's weights are split"
    monkeypatch.setattr(test_documents, "PARAMS", params)
    with use(mesh, config):
        got = told(PROMPTS, **SETTINGS)
    for one, other in zip(got, want, strict=True):
        assert_same(one, other)


def test_other_prompts_seeds_and_scales_do_not_compile_again():
    programs = (text.read_prompts, text.write, text.read_queries, text.read_image, images._sample, images._decode)

    def painted(words, seed, guidance, temperature):
        sampling = Sampling.of([seed], temperature, top_k=seed, repetition_penalty=1 + seed / 100)
        segments = told([[Text(words)]], seeds=[seed], sampling=sampling, guidance=guidance)[0]
        return sum(isinstance(segment, Painted) for segment in segments)

    assert painted("of", 1, 3.5, 0.5)
    compiled = [program._cache_size() for program in programs]
    words = ("a blue bird and a story", "a red fox", "a red bird", "a story of a blue fox and", "and")
    later = [painted(text, seed, 1.5 + seed, 0.4 + seed / 10) for seed, text in enumerate(words, 2)]
    assert sum(later) > 0, "some of them paint"
    assert [program._cache_size() for program in programs] == compiled
