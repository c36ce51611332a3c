"""Photographs that come with scikit-image and scikit-learn, whole and in parts, captioned here.

The pictures are in the public domain, or CC BY for `china.jpg` and `flower.jpg`; the packages' README files name them.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from dreamllm_jax.data import images

# File, caption, and the part shown as (left, top, right, bottom) in fractions of the picture.
WHOLE = (0.0, 0.0, 1.0, 1.0)
CAPTIONS = (
    ("astronaut.png", "a smiling astronaut in an orange suit", WHOLE),
    ("camera.png", "a man looking through a camera on a tripod", WHOLE),
    ("chelsea.png", "the face of a striped cat", WHOLE),
    ("coffee.png", "a cup of coffee on a red saucer", WHOLE),
    ("coins.png", "four rows of old coins", WHOLE),
    ("grass.png", "blades of grass", WHOLE),
    ("gravel.png", "grey gravel", WHOLE),
    ("hubble_deep_field.jpg", "distant galaxies on a black sky", WHOLE),
    ("ihc.png", "brown and blue tissue under a microscope", WHOLE),
    ("moon.png", "craters on the moon", WHOLE),
    ("motorcycle_left.png", "a red motorcycle in a garage", WHOLE),
    ("retina.jpg", "the retina of an eye", WHOLE),
    ("rocket.jpg", "a rocket on its launch pad at dusk", WHOLE),
    ("brick.png", "a pavement of long bricks", WHOLE),
    ("china.jpg", "a Chinese pagoda above a lake", WHOLE),
    ("flower.jpg", "an orange dahlia in bloom", WHOLE),
    ("astronaut.png", "a woman with short hair", (0.3, 0.0, 0.62, 0.32)),
    ("astronaut.png", "a model of the space shuttle", (0.68, 0.02, 0.95, 0.6)),
    ("astronaut.png", "a white helmet with a dark visor", (0.5, 0.65, 1.0, 1.0)),
    ("astronaut.png", "the stripes of a flag", (0.0, 0.1, 0.2, 0.5)),
    ("chelsea.png", "one green eye of a cat", (0.28, 0.2, 0.5, 0.55)),
    ("coffee.png", "a spoon on a saucer", (0.5, 0.4, 0.75, 0.85)),
    ("coins.png", "one large coin", (0.8, 0.48, 1.0, 0.77)),
    ("motorcycle_left.png", "the front wheel of a motorcycle", (0.66, 0.5, 0.95, 0.95)),
)


def pairs(count: int, size: int) -> Iterator[tuple[bytes, str]]:
    """The first `count` pictures as (JPEG with a shorter side of at most `size` pixels, caption).

    Raises:
      ModuleNotFoundError: a package is missing; the message says how to install it.
      ValueError: more pairs than there are captions.
    """
    if count > len(CAPTIONS):
        raise ValueError(f"there are {len(CAPTIONS)} captioned photographs, not {count}")
    for name, caption, part in CAPTIONS[:count]:
        picture = images.decode(_find(name).read_bytes())
        sides = (picture.width, picture.height) * 2
        picture = picture.crop(tuple(round(x * side) for x, side in zip(part, sides, strict=True)))
        yield images.to_jpeg(picture, size), caption


def _find(name: str) -> Path:
    for package, folder in (("skimage", "data"), ("sklearn", "datasets/images")):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"the photographs need {package}: pip install 'dreamllm_jax[quickstart]'")
        path = Path(spec.origin).parent / folder / name
        if path.is_file():
            return path
    raise FileNotFoundError(f"the installed scikit-image and scikit-learn do not have the picture {name}")
