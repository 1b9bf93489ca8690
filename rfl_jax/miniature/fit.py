"""The plain optimisation loop behind every pretrained network of the miniature."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tqdm import trange

Loss = Callable[[Any, jax.Array], tuple[jax.Array, dict]]


def fit(loss: Loss, params: Any, *, steps: int, learning_rate: float, seed: int, label: str, ema: float = 0.995) -> Any:
    """Minimises `loss(params, key) -> (value, metrics to show)` with Adam and a cosine schedule.

    Returns:
        The exponential moving average of the parameters.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(100, steps // 5), steps, learning_rate * 0.01)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=1e-4))

    @jax.jit
    def step(params: Any, average: Any, state: Any, key: jax.Array) -> tuple:
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, key)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: a * ema + p * (1 - ema), average, params)
        return params, average, state, {"loss": value, **metrics}

    state, average = tx.init(params), params
    keys = jax.random.split(jax.random.key(seed), steps)
    bar = trange(steps, desc=label, mininterval=5)
    for i in bar:
        params, average, state, metrics = step(params, average, state, keys[i])
        if i % 50 == 0 or i == steps - 1:
            bar.set_postfix({name: f"{float(jnp.asarray(x)):.4f}" for name, x in metrics.items()})
    return average
