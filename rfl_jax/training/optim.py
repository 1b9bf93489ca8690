"""Learning-rate schedules by the original's names, and the optimizer."""

import optax

from rfl_jax.config import Config


def learning_rate(cfg: Config, updates: int) -> optax.Schedule:
    """Rate of each optimizer update. All schedules warm up linearly over `warmup_steps`, then stay (`constant`), or
    fall to 0 at the last update (`linear`, `cosine`).
    """
    peak, warmup = cfg.learning_rate, cfg.warmup_steps
    rest = max(updates - warmup, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "constant_with_warmup": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[cfg.lr_scheduler_type]
    if warmup == 0:
        return after
    # As in transformers: the first update has rate 0, the one after the warm-up the full rate.
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def optimizer(cfg: Config, updates: int) -> optax.GradientTransformation:
    """Gradient clipping by global norm, then AdamW."""
    return optax.chain(
        optax.clip_by_global_norm(cfg.max_grad_norm),
        optax.adamw(learning_rate(cfg, updates), weight_decay=cfg.weight_decay),
    )
