"""Encoded images to uint8 pixels of the size a model wants.

Normalisation happens on the device. Pictures are decoded here
with Pillow alone and with every trap closed: unknown formats, bombs, truncated files, rotation by EXIF, palettes,
transparency, 16 bits, CMYK, animations.
"""

import functools
import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import ExifTags, Image, ImageOps

from dreamllm_jax.common.directories import NO_POINTER, is_lfs_pointer

# TGA is last, for its files do not begin with a sign of their own.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "DIB", "TGA")
# What their files are called, without the dot; in capitals too.
EXTENSIONS = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "dib", "tif", "tiff", "ppm", "pgm", "pbm", "pnm"),
    *("avif", "jp2", "j2k", "jpf", "jpx", "jpc", "j2c", "ico", "tga"),
)
SUFFIXES = tuple(f".{extension}" for extension in EXTENSIONS)
MAX_PIXELS = 64_000_000
MAX_ASPECT = 32  # longer side : shorter side; a thread whose shorter side is enlarged would fill the memory


class ImageError(ValueError):
    """An image that cannot be used; `reason` is one word for counting: format, lfs_pointer, size, broken or mode."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def decode(data: bytes, shorter: int = 0) -> Image.Image:
    """Decodes the first frame to RGB: upright, complete, on white where it was transparent.

    Args:
      data: the encoded image.
      shorter: pixels on the shorter side that will be kept, 0 for all. A JPEG of more than twice as many is decoded at
        a fraction of its size, several times faster and nowhere more than 3 of 256 levels off.

    Raises:
      ImageError: not an image of a known format, beyond `MAX_PIXELS` or `MAX_ASPECT`, damaged, or of an unknown mode.
    """
    if is_lfs_pointer(data):
        raise ImageError("lfs_pointer", NO_POINTER)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise ImageError("format", f"not an image of a known format ({', '.join(FORMATS)})") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("size", str(error)) from error
    except Exception as error:  # Pillow's plugins raise whatever a damaged header leads them to
        raise ImageError("broken", str(error)) from error
    if image.width * image.height > MAX_PIXELS:
        raise ImageError("size", f"an image of {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ImageError("size", f"an image of {image.width} x {image.height} pixels is too narrow")
    try:
        if shorter:
            image.draft(None, (2 * shorter, 2 * shorter))
        bits = _bits(image)
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image), bits)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError("broken", str(error)) from error


def size_of(data: bytes) -> tuple[int, int]:
    """(width, height) of an image as it is seen upright, from its header alone; (1, 1) if that cannot be read."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            turned = turned and image.format != "TIFF"  # whose size Pillow gives as it is seen
            return (image.height, image.width) if turned else image.size
    except Exception:  # Pillow's plugins raise whatever a damaged header leads them to
        return 1, 1


@functools.lru_cache(maxsize=256)
def black(size: tuple[int, int]) -> bytes:
    """A black picture of this (width, height), encoded."""
    return to_png(Image.new("RGB", size))


def nearest(size: tuple[int, int], shapes: Sequence[tuple[int, int]], cropped: bool) -> int:
    """Which (height, width) is the next in shape to an image of this (width, height), of which there is one at least.

    That which loses the least of the image where this is `cropped`; where it is squeezed instead, that whose ratio of
    width to height differs least, as InternVL chooses (`find_closest_aspect_ratio`). Of those of the same ratio it is
    the largest that has less than twice the image's pixels, or else the smallest.
    """
    image, best, distance = size[0] / size[1], 0, math.inf
    for index, (height, width) in sorted(enumerate(shapes), key=lambda one: math.prod(one[1])):
        this = abs(math.log(size[0] * height / (size[1] * width))) if cropped else abs(image - width / height)
        if this < distance or (this == distance and 2 * math.prod(size) > height * width):
            best, distance = index, this
    return best


def decode_named(data: bytes, where: object) -> Image.Image:
    """As `decode`; an error says where the image is."""
    try:
        return decode(data)
    except ImageError as error:
        raise ImageError(error.reason, f"{where} cannot be used: {error}") from None


def _bits(image: Image.Image) -> int:
    """Bits of a channel in the file, of which `load` makes 8; its transparent colour keeps them."""
    rawmode = str(image.tile[0].args) if image.format == "PNG" and image.tile else ""
    packed = {"1": 1, "L;2": 2, "L;4": 4}  # levels of grey in less than a byte
    return packed.get(rawmode, 16 if "16" in rawmode else 8)


def _to_rgb(image: Image.Image, bits: int) -> Image.Image:
    transparent = image.info.get("transparency")
    if image.mode == "RGB" and transparent is None:
        return image
    if image.mode.startswith("I"):  # 16 bits, or 32 holding 16: Pillow's conversion would clip instead of scale
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 0xFFFF:
            raise ImageError("mode", "integer pixels of more than 16 bits")
        grey = np.where(pixels == transparent, 0xFF, pixels >> 8).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "F":
        raise ImageError("mode", "floating-point pixels")
    if image.mode in ("1", "L", "RGB") and transparent is not None:
        levels = np.asarray(transparent) * 0xFF // ((1 << bits) - 1) if bits < 16 else np.asarray(transparent) >> 8
        image.info["transparency"] = tuple(levels.tolist()) if levels.ndim else int(levels)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or transparent is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def centre_crop(
    image: Image.Image, height: int, width: int, resample: Image.Resampling, rounded: bool = False
) -> np.ndarray:
    """Shrinks or enlarges the image until it just covers the result, whose shape is kept, and crops its centre.

    Args:
      rounded: where the centre lies between two pixels, take the even one, as torchvision's `CenterCrop` does;
        otherwise the first, as transformers' image processors do.

    Returns:
      u8[height, width, 3].
    """
    new, (left, top) = _covering(image.size, height, width, rounded)
    if new != image.size:
        image = image.resize(new, resample)
    return np.asarray(image.crop((left, top, left + width, top + height)))


def _covering(size: tuple[int, int], height: int, width: int, rounded: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, height) of an image of this size when it just covers a result, and (left, top) of the centre there."""
    if height * size[0] <= width * size[1]:
        new = width, int(width * size[1] / size[0])
    else:
        new = int(height * size[0] / size[1]), height
    over = new[0] - width, new[1] - height
    left, top = (round(x / 2) if rounded else x // 2 for x in over)
    return new, (left, top)


def paint_pixels(image: Image.Image, height: int, width: int, flip: bool = False) -> np.ndarray:
    """An image as it is painted: shrunk (bilinear) to cover the size, its centre cropped, mirrored if told to.

    As torchvision's `Resize`, `CenterCrop` and `RandomHorizontalFlip` on a Pillow image.

    Returns:
      u8[height, width, 3].
    """
    pixels = centre_crop(image, height, width, Image.Resampling.BILINEAR, rounded=True)
    return pixels[:, ::-1] if flip else pixels


def paint_sizes(size: tuple[int, int], height: int, width: int, flip: bool = False) -> np.ndarray:
    """What `paint_pixels` does to an image of this (width, height), as some denoisers are told (Podell et al.
    2307.01952, section 2.2).

    Returns:
      f32[6]: height and width of the image; top and left of the crop in what it was resized to, and mirrored if so;
      height and width of the result.
    """
    new, (left, top) = _covering(size, height, width, rounded=True)
    left = new[0] - width - left if flip else left
    return np.array([size[1], size[0], top, left, height, width], np.float32)


def normalise(data: bytes, size: int, least: int = 1) -> bytes:
    """The image as it is stored: RGB, upright, JPEG, at most `size` pixels on its shorter side.

    It is decoded once in any case. A JPEG that is all of this already stays as it is, since compressing it again would
    only add noise; unless the file is larger than its pixels, as one with something else in it is.

    Raises:
      ImageError: as `decode` does, or `small`: the shorter side has fewer than `least` pixels.
    """
    image = decode(data, size)
    if min(image.size) < least:
        raise ImageError("small", f"an image of {image.width} x {image.height} pixels")
    with Image.open(io.BytesIO(data), formats=FORMATS) as original:
        as_it_is = (
            original.format == "JPEG"
            and original.mode == "RGB"
            and min(original.size) <= size
            and original.getexif().get(ExifTags.Base.Orientation, 1) == 1
            and len(data) <= 3 * original.width * original.height + (64 << 10)
        )
    return data if as_it_is else to_jpeg(image, size)


def to_jpeg(image: Image.Image, size: int) -> bytes:
    """The RGB image as JPEG of high quality, shrunk until its shorter side is at most `size`."""
    if min(image.size) > size:
        image = _resize_shorter(image, size, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue()


def to_png(image: Image.Image) -> bytes:
    """The image as PNG."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _resize_shorter(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    width, height = image.size
    if width <= height:
        new = size, int(size * height / width)
    else:
        new = int(size * width / height), size
    return image if new == image.size else image.resize(new, resample)
