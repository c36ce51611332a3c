"""What the pages tell people to type is understood."""

import argparse
import dataclasses
import re
import runpy
import shlex
import typing
from pathlib import Path

import pytest

from dreamllm_jax import convert, evaluate, generate, report
from dreamllm_jax.common.configuration import flat
from dreamllm_jax.data import __main__ as data_commands
from dreamllm_jax.experiment import recipes
from dreamllm_jax.experiment.experiment import Experiment, read_experiment
from dreamllm_jax.runs.check import describe
from dreamllm_jax.towers.connectors.transformer import TransformerConfig

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path, program: str) -> list[list[str]]:
    """The arguments of a page's commands in blocks of bash."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = len(program.split())
    return [shlex.split(line, comments=True)[words:] for line in lines if line.startswith(program)]


def all_commands(program: str) -> list[list[str]]:
    return [arguments for page in PAGES for arguments in commands(page, program)]


PARSERS = {
    "convert": convert.parser,
    "data": data_commands.parser,
    "evaluate": evaluate.make_parser,
    "generate": generate.make_parser,
    "report": report.make_parser,
}
COMMANDS = [(name, words) for name in PARSERS for words in all_commands(f"python -m dreamllm_jax.{name} ")]


@pytest.mark.parametrize(
    ("program", "arguments"), COMMANDS, ids=lambda value: value if isinstance(value, str) else None
)
def test_commands_are_understood(program, arguments):
    parsed = vars(PARSERS[program]().parse_args(arguments))
    for word in arguments:
        if word.startswith("--"):
            flag, _, value = word.removeprefix("--").partition("=")
            read = str(parsed[flag.replace("-", "_")])
            exact = read in (value, f"{value}.0", f"['{value}']")
            # What a flag of convert becomes may be written otherwise: a path, a projector, a number of bytes.
            otherwise = value in str(parsed) or value in TransformerConfig.PUBLISHED
            assert not value or exact or (program == "convert" and otherwise), word
    if parsed.get("command") in ("text", "image", "document"):
        assert parsed["prompt"] or parsed["continue"], "there is something to begin with"


@pytest.mark.parametrize("name", PARSERS)
def test_every_flag_is_explained(name):
    def flags(parser):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                helped = {choice.dest for choice in action._choices_actions if choice.help}
                assert helped == set(action.choices), name
                for command in action.choices.values():
                    yield from flags(command)
            else:
                yield action

    assert not [action.dest for action in flags(PARSERS[name]()) if not action.help]


def test_trainings_of_published_sizes_begin_with_a_model():
    """For nothing that is frozen in them can be learnt."""
    found = []
    for page in (*PAGES, ROOT / "launch" / "tpu_vm.py", ROOT / "launch" / "gke.py", ROOT / "launch" / "skypilot.yaml"):
        for command in re.findall(r"dreamllm_jax\.train\b.*", re.sub(r"\\+\n", " ", page.read_text())):
            if "--config=configs/stage" in command or "$CONFIG" in command:
                found.append(command)
                assert "--check" in command or "--config.parameters.init_from=" in command, f"{page}: {command}"
    assert len(found) >= 8


def test_every_command_is_on_some_page():
    measured = {arguments[0] for arguments in all_commands("python -m dreamllm_jax.evaluate ")}
    assert measured == {"recall", "scenes", "language", "comprehension", "creation", "reference", "table"}
    assert {arguments[0] for arguments in all_commands("python -m dreamllm_jax.data ")} >= {"import", "precompute"}
    told = {arguments[0] for arguments in all_commands("python -m dreamllm_jax.generate ")}
    assert told == {"text", "image", "document", "serve"}


def test_the_page_about_data_knows_all_formats():
    listed = re.findall(r"^\| `(\w+)` \| ", (ROOT / "docs" / "data.md").read_text(), re.MULTILINE)
    assert listed[: len(data_commands.FORMATS)] == list(data_commands.FORMATS)


def test_the_page_about_data_imports_what_it_then_trains_on():
    (block, *_) = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / "data.md").read_text(), re.M | re.S)
    (recipe,) = re.findall(r"--config=(\S+?):", block)
    assert set(re.findall(r"--name=(\w+)", block)) == set(recipes.load(ROOT / recipe).data.corpora)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A place where the page's own configuration stands beside the shipped ones."""
    (program,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "ablations.md").read_text(), re.M | re.S)
    (tmp_path / "mine.py").write_text(program)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)


def trained() -> list[list[str]]:
    """Those that begin with a model are run where there is one, see `test_run`."""
    found = [*all_commands("python -m dreamllm_jax.train "), *all_commands("python -m dreamllm_jax.plan ")]
    return [arguments for arguments in found if not arguments[0].startswith("--config=configs/alignment.py")]


@pytest.mark.parametrize("arguments", trained(), ids=" ".join)
def test_commands_that_train_and_plan(arguments, mine):
    file, _, argument = arguments[0].removeprefix("--config=").partition(":")
    flags = [word for word in arguments if word.startswith("--config.")]
    settings = recipes.override(recipes.load(file, argument), flags).to_dict()
    assert read_experiment(settings).steps > 0
    others = {word.split("=")[0] for word in arguments[1:] if word not in flags}
    assert others <= {"--workdir", "--check", "--topology", "--fit", "--effort", "--json"}
    if "--check" in arguments and "tiny" in settings.get("parent", "") + arguments[0]:
        assert "learning rate" in describe(settings)


@pytest.mark.parametrize("arguments", all_commands("python launch/sweep.py "), ids=" ".join)
def test_commands_that_sweep(arguments, mine):
    sweep = runpy.run_path(str(ROOT / "launch" / "sweep.py"))
    config, to = (next(word for word in arguments if word.startswith(name)) for name in ("--config=", "--to="))
    overrides = [word for word in arguments if word.startswith("--config.")]
    runs = sweep["expand"](config.removeprefix("--config="), to.removeprefix("--to="), overrides)
    assert len(runs) >= 3
    submit = next((word for word in arguments if word.startswith("--submit=")), "--submit={command}")
    assert "dreamllm_jax.train" in " ".join(sweep["submission"](submit.removeprefix("--submit="), runs[0]))


def classes(hint) -> set[type]:
    """The dataclasses in a type and in their fields' types."""
    found = set().union(*map(classes, typing.get_args(hint)))
    if dataclasses.is_dataclass(hint):
        found |= {hint}.union(*map(classes, typing.get_type_hints(hint).values()))
    return found


def test_the_page_about_options_lists_every_setting():
    page = (ROOT / "docs" / "options.md").read_text().partition("## The original's")[0]
    lines = "\n".join(line for line in page.splitlines() if line.startswith(("| `", "### `")))
    listed = set(re.findall(r"(\w+)`", lines))
    settings = classes(Experiment)
    assert len(settings) > 20
    every = {f"{one.__name__}.{field.name}" for one in settings for field in dataclasses.fields(one)}
    assert not {name for name in every if name.partition(".")[2] not in listed}


def test_the_page_about_options_names_settings_that_exist():
    page = (ROOT / "docs" / "options.md").read_text()
    known = set(flat(read_experiment(recipes.load(ROOT / "configs" / "stage2_igpt.py", "lora=4").to_dict())))
    known |= {f"data.corpora.NAME.{name}" for name in ("weight", "mode", "template", "drop_text")}
    groups = ("model", "data", "rows", "optimizer", "objective", "parameters", "sharding", "checkpoint", "validation")
    ours = [cell for line in page.splitlines() if line.startswith("| ") for cell in line.split(" | ")[1:]]
    named = {name.split("=")[0] for cell in ours for name in re.findall(r"`([^`]+)`", cell)}
    named = {name for name in named if name.split(".")[0] in groups and "." in name}
    assert len(named) > 30
    wrong = {name for name in named if name not in known and not any(one.startswith(f"{name}.") for one in known)}
    assert not wrong


def test_the_page_about_ablations_lists_them_all():
    page = (ROOT / "docs" / "ablations.md").read_text()
    listed = {
        name for cell in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", page, re.M) for name in re.findall(r"\w+", cell)
    }
    assert listed == {path.stem for path in (ROOT / "configs" / "ablations").glob("*.py")}
