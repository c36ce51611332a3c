"""Qwen2 and Qwen3 come in, go out and are verified, as LLaMA is; their vocabulary has room for special tokens."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from transformers import AutoModelForCausalLM  # noqa: E402

from dreamllm_jax.checkpoints import saved  # noqa: E402
from dreamllm_jax.data.tokenizer import load_tokenizer  # noqa: E402
from dreamllm_jax.interop import verify  # noqa: E402
from dreamllm_jax.interop.files import open_model  # noqa: E402
from tests import public_models  # noqa: E402
from tests.conversion.helpers import assert_identical, run, tensors, towers  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*CLIPImageProcessor.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),  # diffusers
]

ROWS = 384  # of which the tokenizer has some 300
QWEN = {
    "qwen2": {
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
    },
    "qwen3": {"head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}


@pytest.mark.parametrize("family", QWEN)
def test_what_comes_in_goes_out(original, family, tmp_path, capsys):
    """Every tensor but the rows of new tokens, of which there are no more than before."""
    given = public_models.save_language_model(tmp_path / "given", family=family, vocab_size=ROWS, **QWEN[family])
    others = towers(original) | {"language_model": given}
    run("import", **others, to=tmp_path / "ours", num_queries=3)
    found = saved.find(str(tmp_path / "ours"))
    assert found.config.language_model.kind == family and found.config.language_model.vocab_size == ROWS
    assert "8 rows of the language model are of no token of its tokenizer, and begin anew" in capsys.readouterr().err

    out = tmp_path / "out"
    run("export", checkpoint=tmp_path / "ours", format="hf", to=out, max_shard_size="20KB", no_check=True)
    assert len(list(out.glob("*.safetensors"))) > 2
    want, got = (open_model(folder, "model") for folder in (given, out))
    assert got.keys() == want.keys() and ("lm_head.weight" in got) == (family == "qwen3")
    new = load_tokenizer(given).new_tokens
    assert len(new) == 8 and max(new) < ROWS
    for name in want:
        there, here = want[name].read(), got[name].read()
        if there.shape[0] == ROWS:
            assert 0.01 < here[[*new]].std() < 0.03
            there, here = np.delete(there, new, 0), np.delete(here, new, 0)
        np.testing.assert_array_equal(here, there, err_msg=name)

    theirs, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(theirs) is public_models.LANGUAGE_MODELS[family] and not any(report.values())
    before = json.loads((given / "config.json").read_text())["rope_parameters"]
    assert theirs.config.rope_parameters.items() >= before.items()
    run("verify", checkpoint=tmp_path / "ours", torch=out)
    differences = verify.compare(found.config, found.part, out)
    assert [difference.dtype for difference in differences] == ["float32", "bfloat16"]
    assert differences[0].relative <= 1e-5 and all(difference.passed for difference in differences)

    run("import", **others | {"language_model": out}, to=tmp_path / "again", num_queries=3)
    assert_identical(tensors(tmp_path / "again"), tensors(tmp_path / "ours"))
    assert saved.find(str(tmp_path / "again")).config == found.config
