import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from dreamllm_jax.data import images
from tests.data.conftest import bomb, encode, png

RED, WHITE = (250, 10, 20), (255, 255, 255)


def only_colour(image: Image.Image) -> tuple[int, ...]:
    pixels = np.asarray(image).reshape(-1, 3)
    assert image.mode == "RGB" and (pixels == pixels[0]).all()
    return tuple(int(v) for v in pixels[0])


def test_palette_grey_and_transparency():
    red = Image.new("RGB", (8, 6), RED)
    assert only_colour(images.decode(encode(red.convert("P", palette=Image.Palette.ADAPTIVE)))) == RED
    assert only_colour(images.decode(encode(Image.new("L", (8, 6), 77)))) == (77, 77, 77)
    assert only_colour(images.decode(encode(Image.new("1", (8, 6), 1)))) == WHITE
    assert only_colour(images.decode(encode(Image.new("RGBA", (8, 6), (*RED, 0))))) == WHITE
    assert only_colour(images.decode(encode(Image.new("LA", (8, 6), (0, 0))))) == WHITE
    assert only_colour(images.decode(encode(red, transparency=RED))) == WHITE
    half = only_colour(images.decode(encode(Image.new("RGBA", (8, 6), (0, 0, 0, 128)))))
    assert all(126 <= v <= 128 for v in half)


def test_sixteen_bits_are_scaled_not_clipped():
    grey = Image.fromarray(np.full((6, 8), 0x8123, np.uint16))
    for kind in ("PNG", "TIFF"):
        assert only_colour(images.decode(encode(grey, kind))) == (0x81, 0x81, 0x81)


def test_cmyk():
    pixels = only_colour(images.decode(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")))
    assert pixels[0] > 240 and max(pixels[1:]) < 15


def test_exif_rotation():
    picture = Image.new("RGB", (20, 10), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert images.decode(encode(picture, "JPEG", exif=exif)).size == (10, 20)


def test_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, (0, 0, 255))]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert only_colour(images.decode(data)) == RED


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def reason(data: bytes) -> str:
    """Why it is refused."""
    with pytest.raises(images.ImageError) as caught:
        images.decode(data)
    return caught.value.reason


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_truncated(kind):
    data = encode(noise(64, 64), kind)
    assert reason(data[: len(data) // 2]) in ("broken", "format")


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n"]
)
def test_no_image_at_all(data):
    assert reason(data) == "format"


def test_pixels_that_would_fill_the_memory_are_refused():
    assert reason(bomb(png(RED), 9_000)) == reason(bomb(png(RED), 60_000)) == "size"
    with pytest.raises(images.ImageError, match="330 x 10 pixels is too narrow"):  # before it is enlarged
        images.decode(png(RED, (330, 10)))
    assert reason(png(RED, (330, 10))) == "size" and images.decode(png(RED, (10, 320))).size == (10, 320)


def test_float_pixels_are_refused():
    assert reason(encode(Image.new("F", (4, 4), 0.5), "TIFF")) == "mode"


@pytest.mark.parametrize("size", [(80, 64), (50, 97), (32, 32), (33, 37), (9, 200), (7, 5)])
def test_centre_crops_equal_the_processor_s(size):
    picture = noise(*size)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_rescale=False, do_normalize=False
    )
    expected = processor(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_array_equal(
        images.centre_crop(picture, 32, 32, Image.Resampling.BICUBIC), expected.astype(np.uint8)
    )


@pytest.mark.parametrize(("size", "left"), [((19, 16), 2), ((21, 16), 2), ((16, 16), 0)])
def test_paint_pixels_crop_like_torchvision(size, left):
    # torchvision rounds half of the margin to even: 3 / 2 -> 2, 5 / 2 -> 2
    pixels = np.asarray(noise(*size))
    expected = pixels[:, left : left + 16]
    np.testing.assert_array_equal(images.paint_pixels(Image.fromarray(pixels), 16, 16), expected)
    np.testing.assert_array_equal(images.paint_pixels(Image.fromarray(pixels), 16, 16, flip=True), expected[:, ::-1])


def test_paint_pixels_are_bilinear():
    picture = noise(64, 48)
    expected = np.asarray(picture.resize((21, 16), Image.Resampling.BILINEAR))[:, 2:18]
    np.testing.assert_array_equal(images.paint_pixels(picture, 16, 16), expected)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(64, 48), (19, 16), (21, 30), (100, 37), (16, 16), (7, 5)])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24)])
def test_sizes_say_what_was_done_to_a_picture(size, height, width, flip):
    """From what a denoiser is told, a picture's pixels are made again."""
    picture = noise(*size)
    told = images.paint_sizes(size, height, width, flip)
    tall, wide, top, left, *target = map(int, told)
    assert told.dtype == np.float32 and (wide, tall) == size and target == [height, width]
    scale = max(width / wide, height / tall)
    whole = picture.resize((max(int(wide * scale), width), max(int(tall * scale), height)), Image.Resampling.BILINEAR)
    whole = whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else whole
    assert 0 <= top <= whole.height - height and 0 <= left <= whole.width - width
    pixels = np.asarray(whole)[top : top + height, left : left + width]
    np.testing.assert_array_equal(images.paint_pixels(picture, height, width, flip), pixels)


def test_jpeg_is_shrunk_only():
    assert images.decode(images.to_jpeg(noise(100, 80), 40)).size == (50, 40)
    assert images.decode(images.to_jpeg(noise(30, 20), 40)).size == (30, 20)
