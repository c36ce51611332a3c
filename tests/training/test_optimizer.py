import jax.numpy as jnp
import numpy as np
import optax

from dreamllm_jax.training.optimizer import OptimizerConfig, join_average, make_optimizer, split_average


def test_averages_follow_the_parameters_and_leave_the_updates_alone():
    config = {"learning_rate": 0.1, "warmup_ratio": 0.0}
    plain, averaging = (make_optimizer(OptimizerConfig(**config, ema_decay=decay), 10) for decay in (0.0, 0.75))
    params = {"a": jnp.asarray([1.0, -2.0])}
    states, both, mean = [plain.init(params), averaging.init(params)], [params, params], np.asarray(params["a"])
    for step in range(4):
        gradient = {"a": jnp.asarray([step - 1.5, 1.0])}
        for i, optimizer in enumerate((plain, averaging)):
            updates, states[i] = optimizer.update(gradient, states[i], both[i])
            both[i] = optax.apply_updates(both[i], updates)
        mean = 0.75 * mean + 0.25 * np.asarray(both[1]["a"])
    np.testing.assert_array_equal(both[0]["a"], both[1]["a"])
    rest, average = split_average(states[1])
    np.testing.assert_allclose(average["a"], mean, rtol=1e-6)
    assert join_average(rest, average) == states[1] and split_average(states[0]) == (states[0], None)
