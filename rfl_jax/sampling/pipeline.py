"""Videos from prompts and first frames, with what a run trained or with adapters of another tool.

pipeline = open_pipeline("configs/mini.py", lora="runs/mini")
video = pipeline("A person smiles and nods.", "face.png", seed=1)
write_video("out.mp4", video)
"""

import dataclasses
import functools
import runpy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from PIL import Image
from tqdm import tqdm

from rfl_jax import hosts
from rfl_jax.chips import compiler_options
from rfl_jax.config import Config, config_file, parse
from rfl_jax.data.batching import filled, in_batches, micro_batch
from rfl_jax.data.sizes import clip_multiple, video_size
from rfl_jax.data.text import PromptTokenizer
from rfl_jax.data.videos import fit_frame, frame_size, read_image, to_uint8
from rfl_jax.errors import UserError
from rfl_jax.models.wan.conditioning import conditioning_of
from rfl_jax.models.wan.config import DIT_PRESETS, DiTConfig
from rfl_jax.networks.check import check_weights
from rfl_jax.networks.parts import Frozen, Networks, split_placed
from rfl_jax.networks.table import describe, open_network
from rfl_jax.sampling.options import Options, Request, Video, options_of
from rfl_jax.sampling.sampler import Sampler, bind_experts
from rfl_jax.sampling.schedule import Span, experts_at
from rfl_jax.sampling.solvers import make_solver
from rfl_jax.sampling.trained import add_trained, read_trained
from rfl_jax.sharding import BATCH, batch_shards, make_mesh, replicated
from rfl_jax.sources import Sources, experts_of, find_sources
from rfl_jax.terminal import waiting


def start_latents(seed: int, shape: Sequence[int]) -> np.ndarray:
    """Standard normal latents of a seed."""
    return np.asarray(jax.random.normal(jax.random.key(seed), tuple(shape)))


@dataclasses.dataclass
class Pipeline:
    """Networks ready to sample. Text encoder and VAE's encoder are in memory only while they are needed.

    Attributes:
        cfg: configuration.
        sources: where the weights are.
        mesh: devices; samples lie over data x fsdp, a sample over context.
        networks, weights: the DiTs and the VAE.
        trained: trained weights of the text encoder, by our paths; empty if it was not trained.
    """

    cfg: Config
    sources: Sources
    mesh: Mesh
    networks: Networks
    weights: dict[str, nnx.State]
    trained: Mapping[str, np.ndarray]
    _contexts: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    _velocities: dict[tuple[str, float], Any] = dataclasses.field(default_factory=dict)

    @property
    def shape(self) -> DiTConfig:
        return DIT_PRESETS[self.cfg.preset]

    @property
    def _options(self) -> dict[str, str]:
        return compiler_options(self.mesh, self.cfg.compiler_options)

    @property
    def at_once(self) -> int:
        """Videos sampled together."""
        return micro_batch(self.cfg, self.mesh)

    def __call__(
        self, prompt: str, image: Image.Image | Path | str | None = None, *, seed: int = 0, **changes: Any
    ) -> Video:
        """One video.

        Args:
            prompt: caption.
            image: first frame, or its file; None for text-to-video.
            seed: of the noise.
            changes: of `Options`.

        Raises:
            UserError: an unreadable image, an option that makes no sense, or a network that needs an image.
        """
        opened = read_image(image) if isinstance(image, (str, Path)) else image
        request = Request(prompt, opened, seed=seed)
        return next(self.sample([request], options_of(self.cfg, **changes)))[1]

    def sample(
        self,
        requests: Sequence[Request],
        options: Options,
        *,
        observe: Callable[[int, jax.Array], None] = lambda step, latents: None,
    ) -> Iterator[tuple[int, Video]]:
        """Videos as they are done, with the numbers of their requests. Those of one size are sampled together.

        Args:
            requests: what to sample.
            options: how.
            observe: is told each step's number and its latents [b, t, h, w, c].

        Raises:
            UserError: a request that does not fit the network.
        """
        for request in requests:
            self._check(request)
        sizes = [self._size(request, options) for request in requests]
        guided = any(scale != 1.0 for scale in options.guidance)
        self._encode_texts([r.prompt for r in requests] + ([options.negative_prompt] if guided else []))
        kinds = [(size, request.image is None) for size, request in zip(sizes, requests, strict=True)]
        batches = list(in_batches(range(len(requests)), kinds, self.at_once))
        conditions = self._conditions(requests, sizes, batches, options.frames)
        with tqdm(total=len(batches) * options.steps, desc="denoise", disable=None) as bar:
            for numbers, y in zip(batches, conditions, strict=True):
                rows = filled(numbers, self.at_once if len(requests) > 1 else 1)
                batch = {"context": np.stack([self._contexts[requests[i].prompt] for i in rows])}
                if y is not None:
                    batch["y"] = np.stack([y[numbers.index(i)] for i in rows])
                shape = self._latents(sizes[rows[0]], options.frames)
                noise = np.stack([start_latents(requests[i].seed, shape) for i in rows])

                def step_done(step: int, x: jax.Array) -> None:
                    bar.update()
                    observe(step, x)

                latents = self._denoise(batch, noise, options, step_done)
                video = self._decode(latents)
                for i, number in enumerate(numbers):
                    yield number, to_uint8(video[i])

    def _check(self, request: Request) -> None:
        form = conditioning_of(self.shape)
        if request.image is None and form is not None and form.required:
            raise UserError(f"image: expected a first frame, which {self.cfg.preset} needs")
        if request.image is not None and form is None:
            raise UserError(f"image: expected none, {self.cfg.preset} makes videos of text alone")
        if request.end_image is not None and (request.image is None or form is None or not form.takes_end_image):
            raise UserError(f"end image: expected none beside no first frame, or for {self.cfg.preset}")

    def _size(self, request: Request, options: Options) -> tuple[int, int]:
        if options.height:
            return options.height, options.width
        if request.image is None:
            return video_size(self.cfg)[1:]
        multiple = clip_multiple(self.cfg)
        width, height = request.image.size
        size = frame_size(height, width, max_pixels=self.cfg.data.max_pixels, multiple=multiple)
        if not all(size):
            raise UserError(f"image: {width}x{height} pixels, expected at least {multiple} each way")
        return size

    @functools.cached_property
    def _stride(self) -> tuple[int, int, int]:
        return describe(self.cfg, "vae", self.sources.vae).stride

    def _latents(self, size: tuple[int, int], frames: int) -> tuple[int, int, int, int]:
        time, rows, columns = self._stride
        return (frames - 1) // time + 1, size[0] // rows, size[1] // columns, self.shape.out_dim

    def _encode_texts(self, prompts: Sequence[str]) -> None:
        """Text features of prompts that were not met before, each beside its prompt."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._contexts]
        if not new:
            return
        tokenize = PromptTokenizer(self.sources.tokenizer, self.shape.text_len)
        encoder = open_network(self.cfg, "text_encoder", self.sources.text_encoder, "sample")
        graph, weights = nnx.split(add_trained(encoder, self.trained))

        def encoded(weights: nnx.State, ids: jax.Array, mask: jax.Array) -> jax.Array:
            return nnx.merge(graph, weights).context(ids, mask)[0]

        encode = jax.jit(encoded, compiler_options=self._options)
        for prompt in tqdm(new, desc="encode prompts", disable=None if len(new) > 1 else True):
            ids, mask = tokenize([prompt])
            self._contexts[prompt] = np.asarray(encode(weights, ids, mask).astype(jnp.float32))

    def _conditions(
        self,
        requests: Sequence[Request],
        sizes: Sequence[tuple[int, int]],
        batches: Sequence[Sequence[int]],
        frames: int,
    ) -> list[np.ndarray | None]:
        """The conditioning arrays of each batch's requests; None without first frames."""
        form = conditioning_of(self.shape)
        if form is None or all(request.image is None for request in requests):
            return [None] * len(batches)
        graph, weights = nnx.split(open_network(self.cfg, "vae", self.sources.vae, "prepare"))

        @jax.jit
        def encode(weights: nnx.State, image: jax.Array, last: jax.Array | None) -> jax.Array:
            return form.encode(nnx.merge(graph, weights), image, frames, last)[0]

        def pixels(image: Image.Image | None, size: tuple[int, int]) -> np.ndarray | None:
            return None if image is None else fit_frame(image, *size)[None].astype(np.float32) / 127.5 - 1

        def encoded(number: int) -> np.ndarray:
            request, size = requests[number], sizes[number]
            y = encode(weights, pixels(request.image, size), pixels(request.end_image, size))
            return np.asarray(y.astype(jnp.float32))

        return [
            None if requests[numbers[0]].image is None else np.stack([encoded(i) for i in numbers])
            for numbers in batches
        ]

    def _denoise(
        self, batch: dict[str, np.ndarray], noise: np.ndarray, options: Options, done: Callable[[int, jax.Array], None]
    ) -> jax.Array:
        cfg, whole = self.cfg, replicated(self.mesh)
        solver = make_solver(options.solver, options.steps, options.shift)
        boundary = None if self.shape.boundary is None else cfg.min_timestep_boundary
        experts = experts_at(solver.timesteps, boundary)
        guidance: dict[str, float] = dict(zip(("dit", "dit2"), options.guidance, strict=True))
        samples = NamedSharding(self.mesh, BATCH) if len(noise) % batch_shards(self.mesh) == 0 else whole
        placed = {name: hosts.place(x, samples) for name, x in batch.items()}
        if any(scale != 1.0 for scale in options.guidance):
            placed["negative_context"] = hosts.place(self._contexts[options.negative_prompt][None], whole)
        x = hosts.place(noise, samples)
        with jax.set_mesh(self.mesh):
            for i, expert in enumerate(experts):
                velocity = self._velocity(expert, guidance[expert])
                t = jnp.full(len(noise), solver.timesteps[i])
                x, v = velocity(Frozen({expert: self.weights[expert]}, {}), placed, x, t)
                x = solver.step(i, v, x)
                done(i, x)
        form = conditioning_of(self.shape)
        return x if form is None or "y" not in placed else form.keep(x, placed["y"])

    def _velocity(self, expert: str, guidance: float) -> Any:
        """`(weights, batch, latents, timesteps) -> latents as the expert sees them, velocity`, jitted."""
        if (expert, guidance) not in self._velocities:
            sampler = Sampler(self.shape, np.zeros(1, np.float32), (Span(expert, 0, 1, False),), {expert: guidance})

            def velocity(weights: Frozen, batch: dict[str, jax.Array], x: jax.Array, t: jax.Array) -> Any:
                experts, keep = bind_experts(self.networks, sampler, {}, weights, batch)
                x = keep(x)
                return x, experts[expert].velocity(x, t)

            self._velocities[expert, guidance] = jax.jit(velocity, compiler_options=self._options)
        return self._velocities[expert, guidance]

    @functools.cached_property
    def _decoder(self) -> Any:
        def decode(weights: nnx.State, z: jax.Array) -> jax.Array:
            return jnp.clip(self.networks.merge("vae", weights).decode(z), -1, 1)

        return jax.jit(decode, out_shardings=replicated(self.mesh), compiler_options=self._options)

    def _decode(self, latents: jax.Array) -> np.ndarray:
        with jax.set_mesh(self.mesh):
            return np.asarray(self._decoder(self.weights["vae"], latents))


def open_pipeline(
    config: Config | Path | str,
    *,
    lora: str = "",
    step: str = "",
    raw: bool = False,
    devices: Sequence[Any] | None = None,
) -> Pipeline:
    """A pipeline with its weights on the mesh.

    Args:
        config: of a run, or a config file, or the name of one in configs/.
        lora, step, raw: what was trained, see `rfl_jax.sampling.trained.read_trained`.
        devices: this machine's by default.

    Raises:
        UserError: weights that are not found, not readable, or of another network.
    """
    cfg = config if isinstance(config, Config) else read_config(config)
    sources = find_sources(cfg, experts=experts_of(cfg))
    check_weights(cfg, sources)
    mesh = make_mesh(dataclasses.asdict(cfg.mesh), devices)
    trained = read_trained(cfg, lora, step, raw=raw)
    graphs, weights = {}, {}
    with waiting("read the weights", show=hosts.is_writer()):
        for name in ("dit", "dit2", "vae"):
            if files := sources.files(name):
                module = open_network(cfg, name, files, "sample", None if name == "vae" else mesh)
                module = add_trained(module, trained.get(name, {}))
                graphs[name], weights[name] = split_placed(cfg, name, module, mesh)
    return Pipeline(cfg, sources, mesh, Networks(graphs, {}, ()), weights, trained.get("text_encoder", {}))


def read_config(file: Path | str) -> Config:
    """The configuration that a config file, or the one of that name, gives.

    Raises:
        UserError: no such file, or a configuration that makes no sense.
    """
    file = config_file(str(file))
    if not Path(file).is_file():
        raise UserError(f"{file}: no such file, expected a config file")
    return parse(runpy.run_path(str(file))["get_config"]())
