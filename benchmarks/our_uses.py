"""This library's side of `benchmarks.torch_step` outside of training: what networks do to prepare, sample and evaluate."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from safetensors.numpy import save

from benchmarks import sides
from benchmarks.our_side import configuration
from benchmarks.sides import Outcome, Side, UseInputs
from convert import store
from convert.export import entries
from rfl_jax.chips import compiler_options
from rfl_jax.data.encoding import negative_context
from rfl_jax.data.sizes import clip_settings
from rfl_jax.data.videos import read_clip
from rfl_jax.networks.faces import open_judge, open_reward
from rfl_jax.networks.parts import Frozen, Networks
from rfl_jax.networks.table import describe, open_network
from rfl_jax.runs import RunFolder
from rfl_jax.sampling.sampler import Sampler, bind_experts
from rfl_jax.sampling.schedule import Span
from rfl_jax.training.inputs import prepare_inputs

GUIDANCE, TIMESTEP = 3.5, 500.0


class OurUses(Side):
    """The miniature's networks on the clips that `our_side.prepare` has drawn.

    Args:
        what: "prepare", "sample" or "evaluate".
        folder, shape: of `our_side.configuration`.
    """

    def __init__(self, what: str, folder: Path, *shape: int) -> None:
        self._cfg = cfg = configuration(folder, *shape)
        self._inputs = prepare_inputs(cfg, RunFolder(epath.Path(folder / "run")), jax.devices()[:1])
        clips = self._inputs.clips.training
        loaded = [clip.load() for clip in clips]
        names = ("y", "context", "ids", "mask")
        self._arrays = {name: np.stack([arrays[name] for arrays in loaded]) for name in names}
        self._arrays["video"] = np.stack([read_clip(clip.clip.video, **clip_settings(cfg)) for clip in clips])
        self._arrays["negative_context"] = negative_context(cfg, self._inputs.sources)[None]
        shape_of_latents = (*self._arrays["y"].shape[:4], self._inputs.sampler.dit.out_dim)
        self._arrays["noise"] = np.random.default_rng(cfg.seed).normal(size=shape_of_latents).astype(np.float32)
        self.actions = {"prepare": self._prepare, "sample": self._sample, "evaluate": self._evaluate}[what]()

    def first(self) -> Outcome:
        """What every action gives."""
        return {name: np.asarray(action()) for name, action in self.actions.items()}

    def inputs(self) -> UseInputs:
        """What the actions begin with, and the text encoder as transformers has it."""
        files = self._inputs.sources.text_encoder
        component = store.SAFETENSORS["umt5"]
        _, arrays = component.convert(list(files), dtype="float32")
        weights = save({x.key: np.asarray(x.read()) for x in entries(arrays, component.namings["transformers"])})
        sizes = dataclasses.asdict(describe(self._cfg, "text_encoder", files))
        return UseInputs(tuple(self.actions), self._arrays, sizes, weights, GUIDANCE, TIMESTEP)

    def _prepare(self) -> dict[str, Callable[[], Any]]:
        cfg, sources, arrays = self._cfg, self._inputs.sources, self._arrays
        video = arrays["video"][0]
        return {
            sides.ENCODE: self._action(
                open_network(cfg, "vae", sources.vae, "prepare"),
                lambda vae, image: vae.encode_first_frame(image, len(video)),
                video[None, 0],
            ),
            sides.TEXT: self._action(
                open_network(cfg, "text_encoder", sources.text_encoder, "prepare"),
                lambda text, ids, mask: text.context(ids, mask),
                arrays["ids"][:1],
                arrays["mask"][:1],
            ),
            sides.POOL: self._action(
                open_reward(cfg, sources.reward), lambda reward, video: reward.pool(video)[0], video
            ),
        }

    def _sample(self) -> dict[str, Callable[[], Any]]:
        cfg, sources, arrays = self._cfg, self._inputs.sources, self._arrays
        span = Span("dit2", 0, 1, gradient=False)
        sampler = Sampler(self._inputs.sampler.dit, np.zeros(1, np.float32), (span,), {"dit2": GUIDANCE})

        def velocity(dit: Any, batch: dict[str, jax.Array], x: jax.Array, t: jax.Array) -> jax.Array:
            graph, weights = nnx.split(dit)
            networks = Networks({"dit2": graph}, {}, ())
            experts, _ = bind_experts(networks, sampler, {}, Frozen({"dit2": weights}, {}), batch)
            return experts["dit2"].velocity(x, t)

        dit = open_network(cfg, "dit2", sources.files("dit2"), "sample", self._inputs.mesh)
        batch = {name: arrays[name] for name in ("y", "context", "negative_context")}
        t = np.full(len(arrays["noise"]), TIMESTEP, np.float32)
        vae = open_network(cfg, "vae", sources.vae, "sample")
        return {
            sides.GUIDED: self._action(dit, velocity, batch, arrays["noise"], t),
            sides.DECODE: self._action(vae, lambda vae, z: jax.numpy.clip(vae.decode(z), -1, 1), arrays["noise"]),
        }

    def _evaluate(self) -> dict[str, Callable[[], Any]]:
        reward = open_reward(self._cfg, self._inputs.sources.reward)
        judge = open_judge(self._cfg, reward, self._cfg.eval.judge_model_path)

        def judged(networks: Any, frames: jax.Array) -> jax.Array:
            kps, _, found = networks["reward"].find(frames)
            embeddings = [networks[name].embed(frames, kps, found) for name in ("reward", "judge")]
            return jax.numpy.concatenate(embeddings, -1)

        video = self._arrays["video"]
        frames = video.reshape(-1, *video.shape[2:])
        return {sides.JUDGE: self._action({"reward": reward, "judge": judge}, judged, frames)}

    def _action(self, module: Any, f: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        graph, weights = nnx.split(module)
        jitted = jax.jit(
            lambda weights, *arguments: f(nnx.merge(graph, weights), *arguments), compiler_options=compiler_options()
        )
        placed = jax.device_put(arguments)

        def run() -> Any:
            with jax.set_mesh(self._inputs.mesh):
                return jax.block_until_ready(jitted(weights, *placed))

        return run


def open_side(what: str, folder: Path, *shape: int) -> OurUses:
    """Our side of a use of networks."""
    return OurUses(what, folder, *shape)
