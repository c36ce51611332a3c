"""How programs are compiled: where they are kept, and what the compiler is told beside the program itself."""

import jax
from etils import epath

CACHE = "compiled"

# Options of the TPU compiler, each with its reason. Only what was compared on compiled programs stands here.
TPU_OPTIONS: dict[str, bool | int | str] = {}


def keep_programs(workdir: epath.PathLike) -> None:
    """Keeps compiled programs with the run, so that a preempted one starts again without compiling.

    A folder that the user chose, by JAX_COMPILATION_CACHE_DIR, has precedence.
    """
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(epath.Path(workdir) / CACHE))
