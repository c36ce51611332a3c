"""Every test runs on eight simulated CPU devices; DREAMLLM_JAX_TEST_PLATFORM=tpu (or cuda) tests on an accelerator."""

import importlib.metadata
import os
from pathlib import Path

platform = os.environ.setdefault("DREAMLLM_JAX_TEST_PLATFORM", "cpu")
os.environ["JAX_PLATFORMS"] = platform
if platform == "cpu":
    # Compiling is most of what tests do; less optimised code compiles several times faster and computes the same.
    options = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
    options.append("--xla_cpu_parallel_codegen_split_count=1")  # there is a test on every core already
    # Devices that wait for each other must not run out of threads (XLA has one a device), which ends the process:
    # there are more, and a device waits in one collective at a time. Nor does a machine that was paused end it.
    os.environ.setdefault("NPROC", "16")
    options.append("--xla_cpu_enable_concurrency_optimized_scheduler=false")
    options.append("--xla_cpu_collective_call_terminate_timeout_seconds=300")
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # gone since: an unknown flag ends the process
        options.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *options])
# Compiled programs are kept for other processes and later runs, small ones too, of which a training run has a hundred;
# delete the folder to be rid of them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

from absl import flags  # noqa: E402

flags.FLAGS.mark_as_parsed()  # grain reads flags, and pytest's own command line is not for absl

# Files whose tests take minutes, the longest first: begun last, they would be waited for alone.
LONGEST = (
    "training/test_hosts.py",
    "runs/test_run.py",
    "conversion/test_formats.py",
    "objectives/test_objectives.py",
    "planning/test_pods.py",
    "experiment/test_flops.py",
    "training/test_kills.py",
    "evaluation/test_creation.py",
    "towers/test_unet.py",
    "runs/test_family.py",
    "serving/test_browser.py",
    "test_bucket.py",
    "generation/test_text.py",
    "towers/test_sana_transformer.py",
)


def pytest_collection_modifyitems(items: list) -> None:
    """Sorts the longest to the front."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    """Makes Python faster, now that everything is imported."""
    from tests import frozen  # noqa: F401
