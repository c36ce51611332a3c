"""Compiled programs are kept with the run, unless the user chose a place."""

import jax
import pytest

from dreamllm_jax import compilation


@pytest.fixture
def cache_setting():
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_are_kept_with_the_run_or_where_the_user_says(tmp_path, cache_setting):
    jax.config.update("jax_compilation_cache_dir", "chosen")
    compilation.keep_programs(tmp_path)
    assert jax.config.jax_compilation_cache_dir == "chosen"
    jax.config.update("jax_compilation_cache_dir", None)
    compilation.keep_programs(tmp_path)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / compilation.CACHE)
