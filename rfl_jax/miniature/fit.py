"""The plain optimisation loop behind every pretrained network of the miniature."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
import orbax.checkpoint as ocp
from tqdm import tqdm


def _matrices(stacked: bool) -> Callable[[Any], Any]:
    """Which axes of a kernel are summed over and which are its outputs; what is no matrix is left to Adam."""

    def axes(x: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        first = 1 if stacked and x.ndim > 2 else 0
        if x.ndim - first < 2 or min(x.shape[-1], x.size // x.shape[-1]) < 8:
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(first, x.ndim - 1)), x.ndim - 1)

    return lambda params: jax.tree.map(axes, params)


Loss = Callable[[Any, jax.Array], tuple[jax.Array, dict]]


def fit(
    loss: Loss, params: Any, *, steps: int, learning_rate: float, seed: int, label: str, folder: Path,
    ema: float = 0.995, keep_every: int = 250, stacked: bool = False,
) -> Any:  # fmt: skip
    """Minimises `loss(params, key) -> (value, metrics to show)` with Muon, a cosine schedule and clipped gradients.

    Muon (orthogonalised momentum, here at Adam's size of updates) takes half the steps of Adam for these networks.

    Args:
        loss: of a random batch drawn from the key.
        params: to begin with.
        steps: of optimisation.
        learning_rate: after the warm-up of 100 steps.
        seed: of the batches; a step's batch depends on it and on the step's number alone.
        label: shown beside the progress bar.
        folder: where the state is kept; a fit that was interrupted goes on from there.
        ema: decay of the average.
        keep_every: steps between checkpoints.
        stacked: whether kernels have a leading axis of layers.

    Returns:
        The exponential moving average of the parameters.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(100, steps // 5), steps, learning_rate * 0.01)
    matrices = optax.contrib.muon(
        schedule, weight_decay=1e-4, adam_b2=0.99, consistent_rms=0.2, muon_weight_dimension_numbers=_matrices(stacked)
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), matrices)

    @jax.jit
    def step(state: tuple, key: jax.Array) -> tuple:
        params, average, opt_state = state
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, key)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: a * ema + p * (1 - ema), average, params)
        return (params, average, opt_state), {"loss": value, **metrics}

    state = (params, params, tx.init(params))
    options = ocp.CheckpointManagerOptions(max_to_keep=1, save_interval_steps=keep_every)
    with ocp.CheckpointManager((folder / label.replace(": ", "_")).absolute(), options=options) as manager:
        begin = manager.latest_step() or 0
        if begin:
            state = manager.restore(begin, args=ocp.args.StandardRestore(state))
        bar = tqdm(range(begin, steps), desc=label, initial=begin, total=steps, mininterval=5)
        for i in bar:
            state, metrics = step(state, jax.random.fold_in(jax.random.key(seed), i))
            if i % 50 == 0 or i == steps - 1:
                bar.set_postfix({name: f"{float(jnp.asarray(x)):.4f}" for name, x in metrics.items()})
            manager.save(i + 1, args=ocp.args.StandardSave(state), force=i + 1 == steps)
    return state[1]
