"""A file is never half written."""

import subprocess
import sys
import time

import pytest

from dreamllm_jax.common.directories import remove_unfinished, write_whole

CONTENTS = ["a" * 20_000_000, "b" * 20_000_000]
WRITER = """
import itertools, sys
from dreamllm_jax.common.directories import write_whole
for letter in itertools.cycle("ab"):
    write_whole(sys.argv[1], letter * 20_000_000)
    print(letter, flush=True)
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_the_old_or_the_new(tmp_path):
    path = tmp_path / "file"
    for kill in range(8):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as process:
            process.stdout.readline()  # it writes the next
            time.sleep(0.003 * kill)
            process.kill()
        assert path.read_text() in CONTENTS
    write_whole(path, b"bytes too")
    assert path.read_bytes() == b"bytes too"
    (tmp_path / ".mine.txt").touch()
    remove_unfinished(tmp_path)
    assert {one.name for one in tmp_path.iterdir()} == {"file", ".mine.txt"}


def test_a_writer_that_fails_leaves_the_old(tmp_path):
    write_whole(tmp_path / "file", "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "file", "\ud800")
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "nowhere" / "file", "new")
    assert (tmp_path / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
