"""Numbers stored in bfloat16: rounded without bias, to neighbours only."""

import jax
import jax.numpy as jnp
import numpy as np

from dreamllm_jax.training.rounding import narrow, stochastic_bfloat16


def test_it_takes_one_of_the_two_neighbours_and_is_right_on_average():
    rng = np.random.default_rng(0)
    values = (rng.normal(size=50) * 10.0 ** rng.integers(-30, 30, 50)).astype(np.float32)
    many = np.broadcast_to(values, (20_000, 50))
    rounded = np.asarray(stochastic_bfloat16(jnp.asarray(many), jax.random.key(0)).astype(jnp.float32), np.float64)
    down = values.view(np.uint32) & np.uint32(0xFFFF0000)
    neighbours = down.view(np.float32), (down + np.uint32(0x10000)).view(np.float32)
    assert np.all((rounded == neighbours[0]) | (rounded == neighbours[1]))
    unit = np.abs(neighbours[1].astype(np.float64) - neighbours[0])
    # Five standard deviations of the mean of 20,000 draws, each off by at most half a unit.
    assert np.all(np.abs(rounded.mean(0) - values) < 5 * 0.5 * unit / np.sqrt(20_000))
    assert np.all(rounded.std(0) > 0)


def test_exact_infinite_and_undefined_numbers_stay():
    exact = jnp.asarray([0.0, -0.0, 1.0, -2.5, jnp.inf, -jnp.inf, jnp.nan, 2.0**-126])
    odd = jax.lax.bitcast_convert_type(jnp.asarray([0x7FFFFFFF], jnp.uint32), jnp.float32)  # the largest NaN
    got = stochastic_bfloat16(jnp.concatenate([exact, odd]), jax.random.key(1)).astype(jnp.float32)
    np.testing.assert_array_equal(got, np.concatenate([exact, odd]))


def test_small_decay_is_not_lost():
    """A moment that decays by a thousandth a step: nearest rounding would leave it where it is."""
    steps, start = 700, jnp.full(2000, 1.0, jnp.bfloat16)

    def decay(x, key):
        return narrow(x.astype(jnp.float32) * 0.999, x, key), None

    end, _ = jax.lax.scan(decay, start, jax.random.split(jax.random.key(2), steps))
    assert (jnp.bfloat16(1.0).astype(jnp.float32) * 0.999).astype(jnp.bfloat16) == 1.0
    np.testing.assert_allclose(np.asarray(end, np.float32).mean(), 0.999**steps, rtol=0.01)


def test_leaves_are_rounded_by_noise_of_their_own():
    tree = {"a": jnp.full(1000, 1.001), "b": jnp.full(1000, 1.001), "step": jnp.int32(3), "wide": jnp.ones(2)}
    like = {"a": jnp.bfloat16(0), "b": jnp.bfloat16(0), "step": jnp.int32(0), "wide": jnp.float32(0)}
    got = narrow(tree, like, jax.random.key(0))
    assert not np.array_equal(got["a"], got["b"])
    assert got["step"] == 3 and got["wide"].dtype == jnp.float32
