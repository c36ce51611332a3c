import pytest

from tests.conversion.helpers import FLOWS, run


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    """A checkpoint of the original program with its tokenizer, beside what it was made of: three towers, and ours."""
    pytest.importorskip("torch")
    from tests import public_models

    root = tmp_path_factory.mktemp("original")
    run("import", **public_models.save_towers(root), to=root / "ours", num_queries=3)
    run("export", checkpoint=root / "ours", format="dreamllm", to=root / "original", no_check=True)
    return root


@pytest.fixture(scope="session")
def imported(tmp_path_factory):
    """Kind -> a directory with three public towers and the checkpoint made of them, `ours`."""
    pytest.importorskip("torch")
    from tests import public_models

    roots = {kind: tmp_path_factory.mktemp(kind) for kind in FLOWS}
    for kind, root in roots.items():
        run("import", **public_models.save_towers(root, decoder=kind), to=root / "ours", num_queries=3)
    return roots
