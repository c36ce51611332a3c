"""What the frozen image towers make of a corpus, computed once and stored beside it (`data.stored`).

Each process takes files of its own and computes them on its local devices; a file that is there already is left, so
that an interrupted run is simply started again.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from dreamllm_jax.checkpoints.marks import ROLES, marks, require_same_towers, settings_of
from dreamllm_jax.data import images, stored
from dreamllm_jax.data.document import Image
from dreamllm_jax.data.storage import Corpus, in_order
from dreamllm_jax.model import DreamLLM
from dreamllm_jax.runs.latents import Latents

_GROUP = 64  # documents whose pictures are held at once, beside those that are read ahead


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
    latents: str = "",
) -> int:
    """Computes and stores the moments or features of all images of a corpus.

    Args:
      params: the parameters of the image towers at least.
      made_by: the model's name, for messages.
      size: pixels on a side of the painted images; for features, the vision encoder's own size is taken.
      batch: images at once on each local device.
      latents: a folder of latents that another program has computed, which are taken as moments (see `runs.latents`).

    Returns:
      How many documents this process computed, or took, now.

    Raises:
      ValueError: the corpus already has such arrays of another shape, type or model; the latents are not this model's.
    """
    if name == "moments" and model.config.image_decoder.encodes_features:
        raise ValueError(
            "this model's image decoder makes latents of what the vision encoder sees: there are no moments to compute"
        )
    documents = Corpus(directory, corpus)
    target = stored.folder(directory, corpus, name)
    tower = getattr(model.config, ROLES[name])
    if name == "features":
        size = tower.image_size
    shape = tower.stored_shape(size, size)
    leaves = flatten_dict(dict(params), sep="/")
    description = stored.Description(
        shape, dtype, len(documents), made_by, settings_of(model.config, name), marks(model.config, name, leaves)
    )
    given = Latents(Path(latents), directory, corpus, model, shape) if latents else None
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

    if given:
        given.require_alike(documents, crop, compute)
    parts = stored.parts(target, len(documents))
    mine = list(parts)[jax.process_index() :: jax.process_count()]
    missing = [path for path in mine if not path.exists()]
    done = sum(len(parts[path]) for path in missing)
    with tqdm(total=done, desc=f"{corpus} {name}", unit="document", disable=jax.process_index() > 0) as bar:

        def computed(numbers: range) -> Iterator[list[np.ndarray | None]]:
            cropped = in_order(lambda number: [crop(image) for image in documents[number].images], numbers)
            while pictures := list(itertools.islice(cropped, _GROUP)):
                results = compute([p for document in pictures for p in document if p is not None])
                yield from ([None if p is None else next(results) for p in document] for document in pictures)

        def arrays(numbers: range) -> Iterator[np.ndarray]:
            for document in in_order(given.read, numbers) if given else computed(numbers):
                # An image that cannot be decoded leaves a gap, which training counts as such.
                each = [np.full(shape, np.nan) if array is None else array for array in document]
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
