"""Where tests start processes: forks of one that has the libraries already, which takes seconds to import them."""

import multiprocessing

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "dreamllm_jax.evaluation.creation",
        "dreamllm_jax.interop.conversion",
        "dreamllm_jax.interop.verify",
        "dreamllm_jax.runs.check",
        "dreamllm_jax.serving.server",
        "tensorboardX",
        "tests.lives",
        "tests.processes",
        "tests.frozen",
    ]
)
