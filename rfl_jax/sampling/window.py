"""The window: which of the denoising steps that may carry gradient do.

Steps from `mid_timestep` to `final_timestep` of networks that train may (of all networks where the text encoder trains). The
others run without gradient and hand the latents on: what such a step does to them is a constant.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from rfl_jax.config import Config
from rfl_jax.errors import UserError
from rfl_jax.sampling.schedule import Span

# Folded into the run's key, so that one choice has nothing to do with another, nor with a noise.
STEPS, FRAMES, DIRECT = 0x57E9, 0xF3A3, 0xD12E


@dataclasses.dataclass(frozen=True)
class Window:
    """The choice that is made once.

    Attributes:
        steps: those with gradient, or those among which each update draws some.
        drawn: how many steps of each network are drawn; empty: all.
    """

    steps: tuple[int, ...]
    drawn: Mapping[str, int]


def choose_window(cfg: Config, experts: Sequence[str], first: int) -> Window | None:
    """The steps of a configuration's window; None: all that may carry gradient, of whatever network.

    Args:
        cfg: of the run.
        experts: the network of each step.
        first: step that may carry gradient.

    Raises:
        UserError: there are no such steps, or a network that trains has none of them.
    """
    window, defaults = cfg.window, type(cfg.window)()
    if window == defaults:
        return None
    every = "text_encoder" in cfg.trained
    steps = [i for i, expert in enumerate(experts) if i >= first and (every or expert in cfg.trained)]
    if not steps:
        key = next(f.name for f in dataclasses.fields(window) if getattr(window, f.name) != getattr(defaults, f.name))
        raise UserError(
            f"config.window.{key}: expected {getattr(defaults, key)}, as nothing that trains takes part in the steps, "
            f"got {getattr(window, key)}"
        )
    if window.mode == "last" and not window.steps:
        return None
    networks = list(dict.fromkeys(experts[i] for i in steps))
    among = " and ".join(_told([i for i in steps if experts[i] == name], name) for name in networks)
    if window.steps > len(steps):
        raise UserError(f"config.window.steps: expected at most {len(steps)} ({among}), got {window.steps}")
    chosen, drawn = steps, {}
    if window.mode == "last":
        chosen = steps[-window.steps :]
    elif window.mode == "uniform":
        # The middle of each of so many equal parts.
        chosen = [steps[int((i + 0.5) * len(steps) / window.steps)] for i in range(window.steps)]
    elif window.mode == "list":
        chosen = sorted({int(number) for number in window.list})
        if not set(chosen) <= set(steps):
            raise UserError(f"config.window.list: expected some of {among}, got {','.join(window.list)}")
    elif not (window.direct or cfg.nft.group):
        drawn = _shares({name: [experts[i] for i in steps].count(name) for name in networks}, window.steps)
    served = {experts[i] for i in chosen}
    missing = [n for n in networks if (n in cfg.trained and n not in served) or drawn.get(n) == 0]
    if missing:
        key, got = ("list", ",".join(window.list)) if window.mode == "list" else ("steps", window.steps)
        way = ", or window.mode=random" if window.direct or cfg.nft.group else ""
        raise UserError(
            f"config.window.{key}: expected some step of {' and '.join(missing)} too ({among}){way}, got {got}"
        )
    return Window(tuple(chosen), drawn)


def _told(steps: Sequence[int], network: str) -> str:
    if steps[0] == steps[-1]:
        return f"step {steps[0]} of {network}"
    return f"steps {steps[0]} to {steps[-1]} of {network}"


def _shares(counts: Mapping[str, int], total: int) -> dict[str, int]:
    """So many steps divided in proportion among networks, one of each at least while they last."""
    shares = dict.fromkeys(counts, 0)
    for _ in range(total):
        shares[max(counts, key=lambda name: counts[name] / shares[name] if shares[name] else float("inf"))] += 1
    return shares


def draw_steps(drawn: Mapping[Span, int], key: Array, update: Array | int) -> dict[Span, Int[Array, " k"]]:
    """Which steps of each span carry gradient in an update, in rising order.

    Args:
        drawn: how many.
        key: the run's.
        update: how many updates were made. The choice is a function of both, whatever the mesh and the clips, and
            whether or not the run was interrupted.
    """
    key = jax.random.fold_in(jax.random.fold_in(key, STEPS), update)
    return {
        span: jnp.sort(
            jax.random.choice(
                jax.random.fold_in(key, span.start), jnp.arange(span.start, span.stop), (count,), replace=False
            )
        )
        for span, count in drawn.items()
    }


def draw_frames(key: Array, update: Array | int, frames: int, of: int) -> Int[Array, ""]:
    """The first latent frame of those scored in an update: a function of key and update, from 1 on, as the first frame
    is given.

    Args:
        key: the run's.
        update: how many updates were made.
        frames: latent frames that are scored.
        of: latent frames there are, more than these.
    """
    key = jax.random.fold_in(jax.random.fold_in(key, FRAMES), update)
    return jax.random.randint(key, (), 1, of - frames + 1)
