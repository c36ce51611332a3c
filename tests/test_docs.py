"""What the pages tell people to type is understood."""

import re
import shlex
from pathlib import Path

import pytest

from dreamllm_jax.data.__main__ import FORMATS, parser
from dreamllm_jax.generate import make_parser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path, program: str) -> list[list[str]]:
    """The arguments of a page's commands in blocks of bash."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[3:] for line in lines if line.startswith(program)]


def all_commands(program: str) -> list[list[str]]:
    return [arguments for page in PAGES for arguments in commands(page, program)]


@pytest.mark.parametrize("arguments", all_commands("python -m dreamllm_jax.data "), ids=" ".join)
def test_commands_of_data(arguments):
    parsed = [str(value) for value in vars(parser().parse_args(arguments)).values()]
    given = [word.split("=", 1)[1] for word in arguments if word.startswith("--") and "=" in word]
    assert given and set(given) <= set(parsed)


@pytest.mark.parametrize("arguments", all_commands("python -m dreamllm_jax.generate "), ids=" ".join)
def test_commands_that_generate(arguments):
    parsed = vars(make_parser().parse_args(arguments))
    given = dict(word[2:].split("=", 1) for word in arguments if word.startswith("--"))
    assert parsed["command"] == arguments[0]
    assert parsed["command"] == "serve" or parsed["prompt"] or parsed["continue"], "there is something to begin with"
    assert all(str(parsed[name]) in (value, f"{value}.0") for name, value in given.items())


def test_every_command_is_on_some_page():
    assert {arguments[0] for arguments in all_commands("python -m dreamllm_jax.data ")} >= {"import", "precompute"}
    told = {arguments[0] for arguments in all_commands("python -m dreamllm_jax.generate ")}
    assert told == {"text", "image", "document", "serve"}


def test_the_page_about_data_knows_all_formats():
    listed = re.findall(r"^\| `(\w+)` \| ", (ROOT / "docs" / "data.md").read_text(), re.MULTILINE)
    assert listed[: len(FORMATS)] == list(FORMATS)
