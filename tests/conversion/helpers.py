"""Converting without a process of its own, and looking at what comes of it."""

from pathlib import Path

import numpy as np

from dreamllm_jax import convert
from dreamllm_jax.checkpoints import saved

FLOWS = ("sana", "stable_diffusion_3")  # image decoders that learn a flow
SCHEDULER = "scheduler/scheduler_config.json"


def run(command: str, **flags) -> None:
    """The command line without a process of its own; `True` is a flag without a value."""
    words = [command]
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        words += [flag] if value is True else [f"{flag}={value}"]
    arguments = convert.parser().parse_args(words)
    arguments.main(arguments)


def towers(root: Path) -> dict[str, Path]:
    """The three towers in a directory, as flags of the import."""
    return {name: root / name for name in ("language_model", "vision_encoder", "image_decoder")}


def tensors(checkpoint) -> dict[str, np.ndarray]:
    found = saved.find(str(checkpoint))
    return found.read(found.leaves())


def assert_identical(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for path in want:
        assert got[path].dtype == want[path].dtype, path
        np.testing.assert_array_equal(got[path], want[path], err_msg=path)
