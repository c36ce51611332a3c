"""What the frozen image towers make of a corpus, computed once and stored beside it (`data.stored`).

Each process takes files of its own and computes them on its local devices; a file that is there already is left, so
that an interrupted run is simply started again.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from dreamllm_jax.common.configuration import differences
from dreamllm_jax.data import images, stored
from dreamllm_jax.data.document import Image
from dreamllm_jax.data.storage import Corpus, in_order
from dreamllm_jax.model import DreamLLM, DreamLLMConfig

_GROUP = 64  # documents whose pictures are held at once, beside those that are read ahead

ROLES = {"moments": "image_decoder", "features": "vision_encoder"}  # whose tower makes each of the stored arrays
_IDLE = ("initializer_range", "sample_size")  # settings of towers that do not change what they compute
_TOLERANCE = 0.01  # of marks, as a share of the norm: ten times what rounding to bfloat16 does


def _depends(config: DreamLLMConfig, name: str) -> tuple[str, ...]:
    """How the paths begin of the parameters that a kind of stored array depends on."""
    role = ROLES[name]
    return tuple(f"{role}/{path}" for path in getattr(config, role).stored_depends)


def require_frozen(config: DreamLLMConfig, stored: Iterable[str], trained: Iterable[str]) -> None:
    """Raises ValueError, naming it, if a trained parameter's tower is replaced by what it made: see `data.stored`."""
    for name in stored:
        if path := next((path for path in trained if path.startswith(_depends(config, name))), None):
            raise ValueError(f"{path} is trained: leave {name} out of data.stored, or freeze the tower")


def marks(config: DreamLLMConfig, name: str, leaves: Mapping[str, jax.Array]) -> dict[str, tuple[float, float]]:
    """Tells apart the weights behind a kind of stored array: of each, its product with a fixed array of random signs,
    and its norm. Every change moves the product, by a share of the norm that is that of the change."""
    found = _marks({path: x for path, x in leaves.items() if path.startswith(_depends(config, name))})
    return {path: (float(product), float(norm)) for path, (product, norm) in found.items()}


@jax.jit
def _marks(leaves: Mapping[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    def mark(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = x.astype(jnp.float32)
        signs = jax.random.rademacher(jax.random.key(0), x.shape, jnp.float32)
        return jnp.sum(x * signs), jnp.sqrt(jnp.sum(jnp.square(x)))

    return {path: mark(x) for path, x in leaves.items()}


def _settings(config: DreamLLMConfig, name: str) -> dict[str, Any]:
    settings = getattr(config, ROLES[name]).stored_settings
    return json.loads(json.dumps({key: value for key, value in settings.items() if key not in _IDLE}))


def require_same_towers(
    directory: str | os.PathLike, corpus: str, name: str, config: DreamLLMConfig, leaves: Mapping[str, jax.Array]
) -> None:
    """Checks that what is stored of a corpus was made by this model's tower.

    Raises:
      ValueError: it was made by another's.
    """
    found = stored.read_description(stored.folder(directory, corpus, name))
    ours = marks(config, name, leaves)
    changed = [
        f"{ROLES[name]}.{key} is {there!r}, and here {here!r}"
        for key, (there, here) in differences(found.tower, _settings(config, name)).items()
    ]
    moved = found.weights.keys() != ours.keys() or any(
        abs(product - ours[path][0]) > _TOLERANCE * norm for path, (product, norm) in found.weights.items()
    )
    if changed or moved:
        difference = changed[0] if changed else "weights differ from this run's"
        raise ValueError(
            f"the stored {name} of corpus {corpus!r} were made by {found.model}, whose {difference}: leave {name} out "
            f"of data.stored, or remove {stored.folder(directory, corpus, name)} and compute them with this model"
        )


def precompute(
    directory: str | os.PathLike,
    corpus: str,
    name: str,
    model: DreamLLM,
    params: Mapping,
    *,
    made_by: str,
    size: int,
    dtype: str,
    batch: int,
) -> int:
    """Computes and stores the moments or features of all images of a corpus.

    Args:
      params: the parameters of the image towers at least.
      made_by: the model's name, for messages.
      size: pixels on a side of the painted images; for features, the vision encoder's own size is taken.
      batch: images at once on each local device.

    Returns:
      How many documents this process computed now.

    Raises:
      ValueError: the corpus already has such arrays of another shape, type or model.
    """
    documents = Corpus(directory, corpus)
    target = stored.folder(directory, corpus, name)
    tower = getattr(model.config, ROLES[name])
    if name == "features":
        size = tower.image_size
    shape = tower.stored_shape(size, size)
    leaves = flatten_dict(dict(params), sep="/")
    description = stored.Description(
        shape, dtype, len(documents), made_by, _settings(model.config, name), marks(model.config, name, leaves)
    )
    found = stored.read_description(target)
    if found is None:
        target.mkdir(parents=True, exist_ok=True)
        stored.write_description(target, description)  # so that nothing else goes on with what this leaves
    else:
        if (found.shape, found.dtype, found.documents) != (description.shape, dtype, len(documents)):
            raise ValueError(f"{target} holds {name} of {found.shape} {found.dtype}; remove it to compute others")
        require_same_towers(directory, corpus, name, model.config, leaves)
        if found.complete:
            return 0
    compute = _on_local_devices(model, params, name, batch)

    def crop(image: Image) -> np.ndarray | None:
        """The pixels that the tower is given; None if the image cannot be decoded."""
        try:
            return tower.preprocess(images.decode(image.data), size, size)
        except images.ImageError:
            return None

    parts = stored.parts(target, len(documents))
    mine = list(parts)[jax.process_index() :: jax.process_count()]
    missing = [path for path in mine if not path.exists()]
    done = sum(len(parts[path]) for path in missing)
    with tqdm(total=done, desc=f"{corpus} {name}", unit="document", disable=jax.process_index() > 0) as bar:

        def arrays(numbers: range) -> Iterator[np.ndarray]:
            cropped = in_order(lambda number: [crop(image) for image in documents[number].images], numbers)
            while pictures := list(itertools.islice(cropped, _GROUP)):
                results = compute([p for document in pictures for p in document if p is not None])
                for document in pictures:
                    # An image that cannot be decoded leaves a gap, which training counts as such.
                    each = [np.full(shape, np.nan) if p is None else next(results) for p in document]
                    yield np.array(each, np.float32).astype(jnp.dtype(dtype))
                    bar.update()

        for path in missing:
            stored.write_part(path, arrays(parts[path]))
    if all(path.exists() for path in parts):  # true of whichever process ends last
        stored.write_description(target, dataclasses.replace(description, complete=True))
    return done


def _on_local_devices(
    model: DreamLLM, params: Mapping, name: str, batch: int
) -> Callable[[Sequence[np.ndarray]], Iterator[np.ndarray]]:
    """A function from pictures to the towers' results, `batch` of them at once on each device of this process."""
    mesh = Mesh(np.array(jax.local_devices()), ("images",))
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("images"))
    role = ROLES[name]
    tower = jax.device_put({role: params[role]}, everywhere)
    apply = jax.jit(lambda tower, x: getattr(model.bind({"params": tower}), role).stored(x), out_shardings=split)
    step = batch * mesh.size

    def compute(pictures: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        for start in range(0, len(pictures), step):
            given = np.stack(pictures[start : start + step])
            padded = np.concatenate([given, np.zeros((step - len(given), *given.shape[1:]), given.dtype)])
            yield from np.asarray(apply(tower, jax.device_put(padded, split)))[: len(given)]

    return compute
