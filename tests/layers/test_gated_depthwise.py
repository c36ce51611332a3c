"""The gated depthwise convolution's kernel against plain XLA, and that against `lax.conv_general_dilated`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamllm_jax.layers.gated_depthwise import gated_depthwise, gated_depthwise_xla, stack_taps, supported
from dreamllm_jax.parallel.mesh import ShardingConfig, constrain, make_mesh, use
from tests.parity import relative_error


def arrays(images, size, channels, dtype=np.float32):
    rng = np.random.default_rng(0)
    halves = (rng.normal(size=(images, size[0] * size[1], channels)).astype(dtype) for _ in range(3))
    kernel = rng.normal(size=(3, 3, 1, 2 * channels)).astype(np.float32)
    before, bias = rng.normal(size=(2, 2 * channels)).astype(np.float32)
    return *halves, before, kernel, bias


def convolve(x, before, kernel, bias, size):
    """By XLA's own convolution."""
    x = jax.nn.silu(x + before).reshape(len(x), *size, -1)
    layout, groups = ("NHWC", "HWIO", "NHWC"), x.shape[-1]
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout, feature_group_count=groups)
    return (y + bias).reshape(len(x), -1, groups)


def output_and_gradients(function, values, gates, dout, *weights):
    out, pull = jax.vjp(function, values, gates, *weights)
    return out, *pull(dout.astype(out.dtype))


@pytest.mark.parametrize("size", [(3, 5), (1, 2)])
def test_shifted_products_are_a_convolution(size):
    values, gates, dout, *weights = arrays(2, size, 6)

    def ours(values, gates, *weights):
        return gated_depthwise_xla(values, gates, stack_taps(*weights), size)

    def theirs(values, gates, *weights):
        one, two = zip(*(jnp.split(x, 2, axis=-1) for x in weights), strict=True)
        return convolve(values, *one, size) * jax.nn.silu(convolve(gates, *two, size))

    got, want = (output_and_gradients(f, values, gates, dout, *weights) for f in (ours, theirs))
    assert max(map(relative_error, got, want)) < 2e-6


# Chunks of one line and of several; blocks of channels that are whole and partial; images that share a block.
@pytest.mark.parametrize(("images", "size", "channels"), [(3, (4, 16), 128), (2, (8, 8), 200), (1, (3, 32), 64)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernel_is_plain_xla(images, size, channels, dtype):
    values, gates, dout, *weights = arrays(images, size, channels, jnp.dtype(dtype))
    taps = stack_taps(*weights)
    assert supported(jnp.zeros(values.shape, jnp.bfloat16), size)

    def kernel_(*args):
        return gated_depthwise(*args, size, True)

    got = output_and_gradients(kernel_, values, gates, dout, taps)
    want = output_and_gradients(lambda *args: gated_depthwise_xla(*args, size), values, gates, dout, taps)
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in want]
    assert max(map(relative_error, got, want)) < (1e-5 if dtype == "float32" else 4e-3)


def test_what_the_kernel_takes():
    def takes(positions, size, dtype="bfloat16"):
        return supported(jax.ShapeDtypeStruct((1, positions, 8), dtype), size)

    assert takes(256, (16, 16)) and takes(1024, (32, 32)) and takes(64 * 56, (64, 56))
    assert not takes(256, (16, 16), "float32") and not takes(36, (6, 6)) and not takes(24, (3, 8))
    assert not takes(128 * 128, (128, 128))


def test_images_are_split_over_the_mesh():
    """Each device convolves its own images; what they find of the taps' gradients is added up."""
    size, config = (2, 8), ShardingConfig(data=2, fsdp=2)
    values, gates, dout, *weights = arrays(4, size, 64)
    taps = stack_taps(*weights)
    with use(make_mesh(config, jax.devices()[:4]), config):

        @jax.jit
        def run(values, gates, taps, dout):
            split = (constrain(x, ("images", None, None)) for x in (values, gates))
            return output_and_gradients(lambda *args: gated_depthwise(*args, size, True), *split, dout, taps)

        got = run(values, gates, taps, dout)
        assert "all-gather" not in run.lower(values, gates, taps, dout).compile().as_text()
    want = output_and_gradients(lambda *args: gated_depthwise_xla(*args, size), values, gates, dout, taps)
    assert max(map(relative_error, got, want)) < 1e-5
