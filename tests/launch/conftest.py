"""A committed copy of what the launch scripts consist of, for they install commits."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """A clean clone, so to speak."""
    folder = tmp_path_factory.mktemp("clone") / "dreamllm_jax"
    shutil.copytree(ROOT / "launch", folder / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__", "parallel/chips", "common/exits"):  # they need nothing else of the package, nor JAX
        path = Path("dreamllm_jax", f"{name}.py")
        for file in (path.parent / "__init__.py", path):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, folder / file)
    (folder / ".gitignore").write_text("__pycache__/\n")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "--quiet"], ["add", "--all"], [*who, "commit", "--quiet", "--message=all"]):
        subprocess.run(["git", "-C", str(folder), *words], check=True)
    return folder
