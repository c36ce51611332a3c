import pytest

from tests.conversion.helpers import run


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    """A checkpoint of the original program with its tokenizer, beside what it was made of: three towers, and ours."""
    pytest.importorskip("torch")
    from tests import public_models

    root = tmp_path_factory.mktemp("original")
    towers = {
        "llama": public_models.save_llama(root / "llama"),
        "clip": public_models.save_clip(root / "clip"),
        "diffusion": public_models.save_diffusion(root / "diffusion"),
    }
    run("import", **towers, to=root / "ours", num_queries=3)
    run("export", checkpoint=root / "ours", format="dreamllm", to=root / "original", no_check=True)
    return root
