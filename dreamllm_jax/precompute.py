"""What the frozen image towers make of a corpus, computed once and stored beside it (`data.stored`).

Each process takes files of its own and computes them on its local devices; a file that is there already is left, so
that an interrupted run is simply started again.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from dreamllm_jax.data import images, stored
from dreamllm_jax.data.document import Image
from dreamllm_jax.data.storage import Corpus
from dreamllm_jax.models.dreamllm import DreamLLM, DreamLLMConfig

_GROUP = 64  # documents whose pictures are held at once

# Parameters on which each of the stored arrays depends.
DEPENDS = {"moments": ("vae/encoder", "vae/quant_conv"), "features": ("clip/",)}


def require_frozen(stored: Iterable[str], trained: Iterable[str]) -> None:
    """Raises ValueError, naming it, if a trained parameter's tower is replaced by what it made: see `data.stored`."""
    for name in stored:
        if path := next((path for path in trained if path.startswith(DEPENDS[name])), None):
            raise ValueError(f"{path} is trained: leave {name} out of data.stored, or freeze the tower")


def weight_norms(leaves: Mapping[str, jax.Array]) -> dict[str, float]:
    """For each kind of stored array, the sum of the magnitudes of the weights behind it: tells models apart."""
    return {
        name: float(sum(jnp.abs(x).astype(jnp.float32).sum() for path, x in leaves.items() if path.startswith(begin)))
        for name, begin in DEPENDS.items()
    }


def require_same_towers(directory: str | os.PathLike, corpus: str, name: str, leaves: Mapping[str, jax.Array]) -> None:
    """Checks that what is stored of a corpus was made with these weights.

    Raises:
      ValueError: it was made by another model.
    """
    found = stored.read_description(stored.folder(directory, corpus, name))
    norm = weight_norms(leaves)[name]
    if not math.isclose(found.weight_norm, norm, rel_tol=1e-3):
        raise ValueError(
            f"the stored {name} of corpus {corpus!r} were made by {found.model}, whose weights differ from this run's: "
            f"leave {name} out of data.stored, or compute them with this model"
        )


def shapes(config: DreamLLMConfig, size: int) -> dict[str, tuple[int, ...]]:
    """The shape of what is stored of one image, by name; of painted ones of `size` pixels on a side."""
    *area, channels = config.latent_shape(size)
    return {"moments": (*area, 2 * channels), "features": (config.clip.num_patches, config.clip.hidden_size)}


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
      params: the parameters of `vae` and `clip` at least.
      made_by: the model's name, for messages.
      size: pixels on a side of the painted images; for features, CLIP's own size is taken.
      batch: images at once on each local device.

    Returns:
      How many documents this process computed now.

    Raises:
      ValueError: the corpus already has such arrays of another shape, type or model.
    """
    documents = Corpus(directory, corpus)
    target = stored.folder(directory, corpus, name)
    shape = shapes(model.config, size)[name]
    leaves = flatten_dict(dict(params), sep="/")
    description = stored.Description(shape, dtype, len(documents), made_by, weight_norms(leaves)[name])
    found = stored.read_description(target)
    if found is not None:
        if (found.shape, found.dtype, found.documents) != (description.shape, dtype, len(documents)):
            raise ValueError(f"{target} holds {name} of {found.shape} {found.dtype}; remove it to compute others")
        require_same_towers(directory, corpus, name, leaves)
        return 0
    target.mkdir(parents=True, exist_ok=True)
    compute = _on_local_devices(model, params, name, batch)

    def crop(image: Image) -> np.ndarray | None:
        """The pixels that the tower is given; None if the image cannot be decoded."""
        try:
            picture = images.decode(image.data)
        except images.ImageError:
            return None
        if name == "moments":
            return images.diffusion_pixels(picture, size)
        return images.clip_pixels(picture, model.config.clip.image_size)

    parts = stored.parts(target, len(documents))
    mine = list(parts)[jax.process_index() :: jax.process_count()]
    missing = [path for path in mine if not path.exists()]
    done = sum(len(parts[path]) for path in missing)
    with tqdm(total=done, desc=f"{corpus} {name}", unit="document", disable=jax.process_index() > 0) as bar:

        def arrays(numbers: range) -> Iterator[np.ndarray]:
            for group in (numbers[i : i + _GROUP] for i in range(0, len(numbers), _GROUP)):
                pictures = [[crop(image) for image in documents[i].images] for i in group]
                results = compute([p for document in pictures for p in document if p is not None])
                for document in pictures:
                    # An image that cannot be decoded leaves a gap, which training counts as such.
                    each = [np.full(shape, np.nan) if p is None else next(results) for p in document]
                    yield np.array(each, np.float32).astype(jnp.dtype(dtype))
                    bar.update()

        for path in missing:
            stored.write_part(path, arrays(parts[path]))
    if all(path.exists() for path in parts):
        stored.write_description(target, description)  # by whichever process ends last
    return done


def _on_local_devices(
    model: DreamLLM, params: Mapping, name: str, batch: int
) -> Callable[[Sequence[np.ndarray]], Iterator[np.ndarray]]:
    """A function from pictures to the towers' results, `batch` of them at once on each device of this process."""
    mesh = Mesh(np.array(jax.local_devices()), ("images",))
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("images"))
    tower = jax.device_put({name: params[name] for name in ("vae", "clip") if name in params}, everywhere)
    apply = jax.jit(lambda tower, x: model.apply({"params": tower}, x, method=name), out_shardings=split)
    step = batch * mesh.size

    def compute(pictures: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        for start in range(0, len(pictures), step):
            given = np.stack(pictures[start : start + step])
            padded = np.concatenate([given, np.zeros((step - len(given), *given.shape[1:]), given.dtype)])
            yield from np.asarray(apply(tower, jax.device_put(padded, split)))[: len(given)]

    return compute
