"""This library's side of `benchmarks.torch_step`: the training step of the miniature and its phases."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import nnx
from safetensors.numpy import load

from benchmarks import sides
from benchmarks.sides import Inputs, Outcome, Side, in_one
from configs.mini import miniature
from convert.export import adapter_file
from rfl_jax.chips import compiler_options
from rfl_jax.config import Config, parse, plain
from rfl_jax.memory import keep_freed_memory
from rfl_jax.miniature.data import draw_clips
from rfl_jax.models.weights import flat_arrays
from rfl_jax.networks.parts import Frozen, States
from rfl_jax.remat import steps_options
from rfl_jax.runs import RunFolder
from rfl_jax.sampling.rollout import rollout
from rfl_jax.sampling.sampler import bind_experts, latent_shape, make_sampler, split_prefix, start_noise
from rfl_jax.training.inputs import prepare_inputs
from rfl_jax.training.setup import Run, set_up

keep_freed_memory()  # as every command does


def configuration(folder: Path, batch: int, frames: int, size: int, seed: int) -> Config:
    """The miniature's, for clips in `folder`: every step is the same, and none takes its prefix from the cache."""
    config = miniature(str(folder / "clips" / "metadata.csv"), "")
    config.update(eval_every=0, train_batch_size=batch, per_device_train_batch_size=batch, seed=seed)
    config.update(lr_scheduler_type="constant", warmup_steps=0)
    config.update_from_flattened_dict(
        {
            "data.num_frames": frames,
            "data.height": size,
            "data.width": size,
            "reward.detector_size": size,
            "data.cache_dir": str(folder / "cache"),
            "noise.prefix_cache": "off",
        }
    )
    return parse(config)


def prepare(folder: Path, batch: int, frames: int, size: int, seed: int) -> None:
    """Draws the clips of a comparison and prepares them, as a run does once before it starts."""
    draw_clips(folder / "clips", batch, seed, frames, size)
    cfg = configuration(folder, batch, frames, size, seed)
    prepare_inputs(cfg, RunFolder(epath.Path(folder / "run")), jax.devices()[:1])


class OurSide(Side):
    """A run of the miniature that repeats a step on its first batch, with adapters that are off their start, where half
    of their gradients would be zero.

    Args:
        run: before its first step.
        seed: of what the adapters are moved by.
    """

    def __init__(self, run: Run, seed: int) -> None:
        self.actions = {sides.STEP: self._step}
        rng = np.random.default_rng(seed)

        def moved(p: jax.Array) -> jax.Array:
            return jax.device_put(np.asarray(p) + 0.02 * rng.normal(size=p.shape).astype(np.float32), p.sharding)

        self._run = run
        self._batch = run.inputs.batches.place_share(next(run.iterator()))
        self._state = dataclasses.replace(run.state, params=jax.tree.map(moved, run.state.params))
        self._adapters = _named(self._state.params["dit2"])
        self._rng = rng

    def first(self) -> Outcome:
        """Takes the prefix and the first step: latents after the prefix, mean score, loss, clipped gradients."""
        self._batch = self._run.update.start(self._run.frozen, self._batch, self._run.inputs.key)
        metrics = self._step()
        # After one update Adam's first moment is the clipped gradient times 1 - 0.9.
        gradients = load(_named(optax.tree.get(self._state.opt_state, "mu")["dit2"]))
        shown = {"prefix": self._micro["prefix"], "score": metrics["face_score"], "loss": metrics["loss"]}
        return {"gradients": in_one(gradients), **{name: np.asarray(x) for name, x in shown.items()}}

    def inputs(self) -> Inputs:
        """What the first step began with."""
        inputs, batch = self._run.inputs, self._micro
        shape = latent_shape(inputs.sampler, batch)
        noise = start_noise(inputs.key, batch["clip"], batch["noise_index"], shape, self._run.cfg.noise.mode)
        arrays = {name: np.asarray(x) for name, x in (*batch.items(), ("noise", noise))}
        prefix, sampler = split_prefix(self._run.cfg, make_sampler(self._run.cfg))
        return Inputs(arrays, self._adapters, sampler.sigmas, prefix.spans, sampler.spans, plain(self._run.cfg))

    def open_phases(self) -> None:
        """Makes the phases of the step things that can be timed."""
        run, params, frozen, batch = self._run, self._state.params, self._run.frozen, self._micro
        sampler, networks = run.inputs.sampler, run.networks
        options: dict[str, Any] = steps_options(run.cfg.policy)
        still, gradient = (tuple(span for span in sampler.spans if span.gradient == wanted) for wanted in (False, True))

        def steps(params: States, frozen: Frozen, x: jax.Array, spans: Any) -> Any:
            experts, keep = bind_experts(networks, sampler, params, frozen, batch)
            return rollout(experts, x, sampler.sigmas, spans, keep=keep, **options)

        def taken(params: States, frozen: Frozen, x: jax.Array) -> jax.Array:
            return steps(params, frozen, x, still).latents

        def trained(params: States, frozen: Frozen, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = steps(params, frozen, x, gradient)
            return out.latents, jnp.mean(out.kl)

        def decode(z: jax.Array, frozen: Frozen) -> jax.Array:
            return networks.build("vae", {}, frozen).decode(z)

        def find(reward: nnx.State, frames: jax.Array) -> Any:
            return networks.merge("reward", reward).find(frames)

        def embed(frames: jax.Array, reward: nnx.State, kps: jax.Array, found: jax.Array) -> jax.Array:
            return networks.merge("reward", reward).embed(frames, kps, found)

        reward = frozen.rest["reward"]
        with jax.set_mesh(run.mesh):
            x = jax.jit(taken)(params, frozen, batch["prefix"])
            z = jax.jit(trained)(params, frozen, x)[0]
            video = jax.jit(decode)(z, frozen)
            frames = jnp.clip(video, -1, 1).reshape(-1, *video.shape[2:])
            kps, _, found = jax.jit(find)(reward, frames)
        self.actions |= {
            sides.PREFIX: lambda: jax.block_until_ready(run.update.start(frozen, self._batch, run.inputs.key)),
            sides.STILL: self._jitted(taken, params, frozen, batch["prefix"]),
            sides.GRADIENT: self._backward(trained, params, frozen, x),
            sides.DECODE: self._jitted(decode, z, frozen),
            sides.DECODE_BACK: self._backward(decode, z, frozen),
            sides.DETECT: self._jitted(find, reward, frames),
            sides.EMBED_BACK: self._backward(embed, frames, reward, kps, found),
        }

    @property
    def _micro(self) -> dict[str, jax.Array]:
        return {name: x[0] for name, x in self._batch.items()}

    def _step(self) -> Any:
        run = self._run
        with jax.set_mesh(run.mesh):
            self._state, metrics = run.update.step(self._state, run.frozen, self._batch, run.inputs.key)
        return jax.block_until_ready(metrics)

    def _jitted(self, f: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        jitted = jax.jit(f, compiler_options=compiler_options())

        def run() -> Any:
            with jax.set_mesh(self._run.mesh):
                return jax.block_until_ready(jitted(*arguments))

        return run

    def _backward(self, f: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        """Value and gradient, in the first argument, of a random sum of what a function returns."""

        def total(first: Any, rest: tuple[Any, ...], weights: list[jax.Array]) -> jax.Array:
            outputs = jax.tree.leaves(f(first, *rest))
            return jnp.asarray(sum(jnp.vdot(w, x) for w, x in zip(weights, outputs, strict=True)))

        with jax.set_mesh(self._run.mesh):
            shapes = jax.tree.leaves(jax.eval_shape(f, *arguments))
        weights = [jnp.asarray(self._rng.normal(size=x.shape), jnp.float32) for x in shapes]
        return self._jitted(jax.value_and_grad(total), arguments[0], arguments[1:], weights)


def _named(state: nnx.State) -> bytes:
    """Adapters as a file in diffusers' naming."""
    return adapter_file({name: np.asarray(x) for name, x in flat_arrays(state).items()}, "diffusers", {})


def open_side(folder: Path, batch: int, frames: int, size: int, seed: int) -> OurSide:
    """Our side, with clips from `prepare`."""
    cfg = configuration(folder, batch, frames, size, seed)
    return OurSide(set_up(cfg, RunFolder(epath.Path(folder / "run")), jax.devices()[:1]), seed)
