"""What the pages about launching tell people to type is tried, or marked as needing a cloud account."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch.cloud import Cloud, parse

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "docs" / "launch.md", ROOT / "docs" / "troubleshooting.md", ROOT / "README.md"]
MARK = "# needs a cloud account"
OURS = re.compile(r"^(launch/tpu_vm\.sh \w+|python launch/gke\.py \w+|bash launch/local_pod\.sh)")


def blocks(page: Path) -> list[list[str]]:
    """Lines of a page's blocks of bash, continued ones joined."""
    found = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [block.replace("\\\n", " ").splitlines() for block in found]


def lines(program: str) -> list[str]:
    return [line for page in PAGES for block in blocks(page) for line in block if line.startswith(program)]


def test_what_is_not_tried_is_marked():
    for page in PAGES[:2]:
        for block in blocks(page):
            assert block[0] == MARK or all(OURS.match(line) for line in block), block
            for line in block:
                assert not (line.startswith("launch/") and not OURS.match(line)), line


def test_our_commands_run(checkout, tmp_path):
    """All of them, with --dry-run; what they print is understood by gcloud and kubectl."""
    cloud = Cloud(tmp_path / "cloud")
    exports, tried = [], set()
    for block in [block for page in PAGES for block in blocks(page)]:
        for line in block:
            if line.startswith("export "):
                exports.append(line)
            match = OURS.match(line)
            if match:
                dry = f"{match[0]} --dry-run{line[match.end() :]}"
                done = cloud.run(["bash", "-c", "\n".join([f"cd {checkout}", *exports, f"{dry}"])])
                assert done.returncode == 0 and not cloud.calls, f"{dry}\n{done.stderr}"
                for shown in done.stdout.replace("<< 'END'", "\n").splitlines():
                    if shown.startswith(("gcloud ", "kubectl ")):
                        parse(shlex.split(shown))
                tried.add(match[0])
    actions = {
        f"launch/tpu_vm.sh {action}"
        for action in ["keep", "create", "setup", "run", "status", "logs", "stop", "delete"]
    }
    actions |= {f"python launch/gke.py {action}" for action in ["apply", "status", "logs", "delete"]}
    assert tried == actions | {"bash launch/local_pod.sh"}


def test_options_of_beam_exist():
    """Beam overlooks an option that it does not know."""
    pipeline_options = pytest.importorskip("apache_beam.options.pipeline_options")
    for line in lines("python -m dreamllm_jax.data import"):
        beam = [word.removeprefix("--beam=") for word in shlex.split(line) if word.startswith("--beam=")]
        for options in beam:
            given = [word.removeprefix("--").split("=")[0] for word in shlex.split(options)]
            known = pipeline_options.PipelineOptions(shlex.split(options)).get_all_options(drop_default=True)
            assert set(given) <= set(known), set(given) - set(known)


def test_dataflow_takes_the_job():
    """It is built, checked and not handed in: --dry_run."""
    pytest.importorskip("apitools")
    from dreamllm_jax.data import importing

    (line,) = lines("python -m dreamllm_jax.data import")
    (beam,) = [word.removeprefix("--beam=") for word in shlex.split(line) if word.startswith("--beam=")]
    beam = beam.replace("BUCKET", "bucket").replace("PROJECT", "project")  # as names are written
    importing._on_beam([("source", "part", 0, "work", "options")], f"{beam} --dry_run=True --no_auth")


@pytest.mark.skipif(not shutil.which("gcloud"), reason="the real gcloud is not installed")
@pytest.mark.slow
def test_the_real_gcloud_understands_the_rest(tmp_path, monkeypatch):
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "gcloud"))
    told = [line for page in PAGES for block in blocks(page) for line in block if line.startswith("gcloud ")]
    assert len(told) >= 5
    for line in told:
        if not line.startswith("gcloud auth"):
            lint = [
                "gcloud",
                "meta",
                "lint-gcloud-commands",
                f"--command-string={' '.join(line.split()).replace('PROJECT', 'project')}",
            ]
            done = subprocess.run(lint, capture_output=True, text=True, timeout=120, check=False)
            assert '"success": true' in done.stdout, f"{line}\n{done.stdout}{done.stderr}"
