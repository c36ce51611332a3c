"""Compiled programs are kept with the run, unless the user chose a place; what the compiler is told."""

from types import SimpleNamespace

import jax
import pytest

from dreamllm_jax.parallel import compilation


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


@pytest.mark.parametrize(("version", "on_v5p"), [((0, 10, 2), True), ((0, 11, 2), False)])
def test_options_are_those_that_the_compiler_takes(version, on_v5p, monkeypatch):
    def told(platform: str, kind: str) -> dict | None:
        return compilation.compiler_options(SimpleNamespace(platform=platform, device_kind=kind))

    monkeypatch.setattr(jax, "__version_info__", version)
    option = "xla_tpu_enable_async_collective_fusion_fuse_all_gather"
    v5p, v5e = told("tpu", "TPU v5"), told("tpu", "TPU v5 lite")
    assert (option in v5p, v5e, told("cpu", "cpu")) == (on_v5p, compilation.TPU_OPTIONS, None)
    assert v5p | {option: True} == v5e
