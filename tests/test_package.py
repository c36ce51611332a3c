"""The package as a whole: its version, what it imports, and which part may know which."""

import ast
import importlib.metadata
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dreamllm_jax

PACKAGE = Path(dreamllm_jax.__file__).parent

# A row of the table in docs/architecture.md: parts, what they are, the parts that they import.
ROW = re.compile(r"^\| (`.*?) \| .* \| (`.*`|nothing|any) \|$", re.MULTILINE)
# Thin layers over packages that look for torch by themselves, in ways that hiding it breaks.
OVER_OTHERS = ("dreamllm_jax.evaluation.language", "dreamllm_jax.evaluation.cider")
INTEROP_KNOWS_NAMES_AND_SHAPES = ("interop/names.py", "interop/files.py")


def parts_imported(file):
    """Parts of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} uses a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("dreamllm_jax."))


def test_version_is_the_installed_one():
    try:
        installed = importlib.metadata.version("dreamllm_jax")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs from the checkout without being installed")
    assert installed == dreamllm_jax.__version__


def test_public_names_are_there_and_cost_nothing_before_they_are_used():
    """Programs of launch/ import parts of the package where there is no JAX."""
    program = "import sys; sys.modules['jax'] = None; import dreamllm_jax.parallel.chips, dreamllm_jax.common.exits"
    subprocess.run([sys.executable, "-c", program], check=True)
    for name in dreamllm_jax.__all__:
        assert getattr(dreamllm_jax, name).__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'load_modle'"):
        dreamllm_jax.load_modle  # noqa: B018


def test_changelog_begins_with_the_version():
    headings = [line for line in (PACKAGE.parent / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert headings[0].split()[1] == dreamllm_jax.__version__


def rows() -> list[tuple[set[str], set[str] | None]]:
    """The table's parts and what they import; None for the command lines, which may import anything."""
    table = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    found = []
    for where, imports in ROW.findall(table):
        parts = {name.strip("/").removesuffix(".py") for cell in re.findall("`(.*?)`", where) for name in cell.split()}
        found.append((parts, None if imports == "any" else set(re.findall("`(.*?)`", imports))))
    return found


@pytest.mark.parametrize(("parts", "imports"), rows(), ids=lambda value: "+".join(sorted(value or ())))
def test_parts_import_what_the_page_says(parts, imports):
    if imports is None:
        return
    found = {name for part in parts for file in files_of(part) for name in parts_imported(file)}
    assert found - parts - {"__version__"} == imports


def test_arrows_go_one_way():
    """No part imports, through whatever others, one that imports it."""
    parts = {part: imports or set() for parts, imports in rows() for part in parts}

    def reached(part, seen):
        for other in parts.get(part, set()) - seen:
            reached(other, seen | {other})
            seen |= reached(other, seen | {other}) | {other}
        return seen

    assert not {part for part in parts if part in reached(part, set())}


def test_an_experiment_knows_configurations_alone():
    """Of what it configures: no module, no numerics."""
    tree = ast.parse((PACKAGE / "experiment" / "experiment.py").read_text())
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    parts = ("data", "model", "objectives", "towers", "training", "parallel")
    names = {
        alias.name for node in froms if node.module.split(".")[1:2] in [[p] for p in parts] for alias in node.names
    }
    assert {name for name in names if not name.endswith("Config")} == {"RowShape", "SlotGroup", "row_shards"}


# What is called as a tower and is none: functions, settings, a metric, another program.
NO_TOWERS = re.compile(
    r'mode="clip"|\.clip\(|clip_(norm|by_global_norm|sample|score)|clipping|would clip|CLIP score'
    r"|llama(\.cpp|3|_2)|Llama 2",
    re.IGNORECASE,
)


@pytest.mark.parametrize("tower", ["unet", "clip", "llama"])
def test_few_files_know_a_tower_by_name(tower):
    """Outside of the towers' own files and of PyTorch's layouts."""
    word, found = re.compile(rf"(?<![a-z]){tower}", re.IGNORECASE), set()
    for file in PACKAGE.rglob("*.py"):
        path = file.relative_to(PACKAGE)
        if path.parts[0] not in ("towers", "interop") and word.search(NO_TOWERS.sub("", file.read_text())):
            found.add(str(path))
    assert len(found) <= 6, found


def test_few_files_stand_at_the_top():
    assert len(list(PACKAGE.glob("*.py"))) <= 10


def test_the_page_knows_all_parts():
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert {part for parts, _ in rows() for part in parts} == (there | {"data/__main__"}) - {"__init__"}


def files_of(part):
    """Those of a part, but for command lines."""
    folder = PACKAGE / part
    files = folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]
    return [file for file in files if file.name != "__main__.py"]


@pytest.mark.parametrize("file", INTEROP_KNOWS_NAMES_AND_SHAPES)
def test_interop_knows_names_and_shapes(file):
    assert set(parts_imported(PACKAGE / file)) <= {"interop", "common", "layers"}


def test_training_needs_neither_tensorflow_nor_torch():
    """Every part is imported, and of the command lines (each defines its own flags) the training one.

    Torch is hidden (transformers imports it wherever it is found); TensorFlow must not have been imported, and to train
    not even transformers, which takes seconds.
    """
    modules = [module.name for module in pkgutil.walk_packages([str(PACKAGE)], "dreamllm_jax.")]
    modules = [name for name in modules if name.count(".") > 1 and not name.endswith("__main__")]
    modules = [name for name in modules if name not in OVER_OTHERS]
    program = (
        "import importlib, sys\n"
        "sys.modules['torch'] = None\n"
        "import dreamllm_jax.train\n"
        "print('transformers' in sys.modules)\n"
        f"for name in {modules}: importlib.import_module(name)\n"
        "print('tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "False\nFalse\n"), done.stderr


def test_what_is_built_has_every_file(tmp_path):
    """Also those that are not Python, such as the chat page."""
    command = [sys.executable, "setup.py", "--quiet", "build_py", f"--build-lib={tmp_path}"]
    subprocess.run(command, cwd=PACKAGE.parent, check=True, capture_output=True)
    built, here = (
        {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file() and file.suffix != ".pyc"}
        for root in (tmp_path / PACKAGE.name, PACKAGE)
    )
    assert "serving/page.html" in built and built == here


def test_what_is_published_as_source_has_every_file(tmp_path):
    """The tests of a source distribution find the pages, configurations and scripts that they read."""
    command = [sys.executable, "setup.py", "--quiet", "egg_info", f"--egg-base={tmp_path}"]
    subprocess.run(command, cwd=PACKAGE.parent, check=True, capture_output=True)
    published = set((tmp_path / "dreamllm_jax.egg-info" / "SOURCES.txt").read_text().splitlines())
    folders = ("benchmarks", "configs", "docs", "dreamllm_jax", "launch", "tests")
    files = [file for folder in folders for file in (PACKAGE.parent / folder).rglob("*") if file.is_file()]
    here = {str(file.relative_to(PACKAGE.parent)) for file in files if file.suffix != ".pyc"}
    assert here | {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "setup.py"} <= published


def test_extras_that_messages_name_exist():
    texts = "".join(file.read_text() for file in PACKAGE.rglob("*.py"))
    named = set(re.findall(r"pip install .dreamllm_jax\[(\w+)\]", texts))
    extras = set(re.findall(r'^ +"(\w+)": ', (PACKAGE.parent / "setup.py").read_text(), re.MULTILINE))
    assert {"torch", "serve", "evaluation", "beam", "quickstart"} <= named <= extras
