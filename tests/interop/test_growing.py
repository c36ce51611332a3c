"""Rows of embedding and output matrix for the tokens that a language model is given."""

import numpy as np
import pytest

from dreamllm_jax.interop.language_model import EMBEDDING, HEAD, grow, open_language_model
from tests import public_models


@pytest.mark.parametrize("init", ["normal", "mean"])
def test_a_vocabulary_padded_to_a_multiple_does_not_grow(init, tmp_path):
    """Rows beyond the tokenizer's ids stay as they are, and teach new ones nothing."""
    part = open_language_model(public_models.save_language_model(tmp_path, vocab_size=384))
    new = list(range(300, 308))
    grown = grow(part, 308, new, init, 0)
    assert grown.config == part.config
    for name in (EMBEDDING, HEAD):
        before, after = part.tensors[name].read(), grown.tensors[name].read()
        assert grown.tensors[name].shape == before.shape == after.shape
        (changed,) = np.nonzero((before != after).any(axis=1))
        assert changed.tolist() == new
        if init == "mean":
            np.testing.assert_allclose(after[new], np.tile(before[:300].mean(axis=0), (8, 1)), rtol=1e-5, atol=1e-7)
