"""Videos from prompts and first frames, with what a run trained or with adapters of another tool.

pipeline = open_pipeline("configs/mini.py", lora="runs/mini")
video = pipeline("A person smiles and nods.", "face.png", seed=1)
write_video("out.mp4", video)
"""

import dataclasses
import functools
import runpy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from convert import adapters, store
from rfl_jax import hosts
from rfl_jax.config import Config, parse, takes_image
from rfl_jax.data.prepare import clip_multiple, open_text_encoder, video_size
from rfl_jax.data.text import PromptTokenizer
from rfl_jax.data.videos import fit_frame, frame_size, read_image, to_uint8
from rfl_jax.errors import UserError
from rfl_jax.models.lora import TARGETS, add_lora, is_adapters
from rfl_jax.models.wan.conditioning import first_frame_condition
from rfl_jax.models.wan.config import DIT_PRESETS, DiTConfig
from rfl_jax.models.weights import fill, flat_shapes
from rfl_jax.runs import RunFolder, find_checkpoint, read_network, trained_networks
from rfl_jax.sampling.schedule import Phase, experts_at
from rfl_jax.sampling.solvers import SOLVERS, make_solver
from rfl_jax.sharding import BATCH, batch_shards, make_mesh, replicated, shardings
from rfl_jax.sources import Sources, experts_of, find_sources
from rfl_jax.training.prefix import open_dit
from rfl_jax.training.setup import check_weights
from rfl_jax.training.state import Frozen, Networks
from rfl_jax.training.step import Sampler, bind_experts

Video = UInt8[np.ndarray, "t h w 3"]


@dataclasses.dataclass(frozen=True)
class Options:
    """How videos are sampled.

    Attributes:
        steps: denoising steps.
        shift: of the sigma schedule.
        guidance: classifier-free guidance scales of the high-noise and of the low-noise expert; 1 is none.
        negative_prompt: what guidance steers away from.
        solver: "euler" (as in training) or "unipc".
        frames: of a video, 4n+1.
        height, width: 0 takes the first frame's shape under `data.max_pixels`.
    """

    steps: int
    shift: float
    guidance: tuple[float, float]
    negative_prompt: str
    solver: str
    frames: int
    height: int
    width: int


def options_of(cfg: Config, **changes: Any) -> Options:
    """The options of a run's configuration, as changed.

    Raises:
        UserError: a value that makes no sense, by its name.
    """
    scale = cfg.sampling.guidance_scale
    found = Options(
        steps=cfg.num_inference_steps,
        shift=cfg.sampling.shift,
        guidance=(scale, scale),
        negative_prompt=cfg.sampling.negative_prompt,
        solver="euler",
        frames=cfg.data.num_frames,
        height=cfg.data.height,
        width=cfg.data.width,
    )
    found = dataclasses.replace(found, **{name: value for name, value in changes.items() if value is not None})
    multiple = clip_multiple(cfg)
    for name, right, expected in (
        ("steps", found.steps >= 1, "at least 1"),
        ("shift", found.shift > 0, "a positive number"),
        ("solver", found.solver in SOLVERS, f"one of {', '.join(SOLVERS)}"),
        ("frames", found.frames >= 1 and found.frames % 4 == 1, "4n+1"),
        ("height", found.height >= 0 and found.height % multiple == 0, f"a multiple of {multiple}"),
        ("width", found.width >= 0 and found.width % multiple == 0, f"a multiple of {multiple}"),
        ("height", bool(found.height) == bool(found.width), "height and width both, or neither"),
    ):
        if not right:
            raise UserError(f"{name}: expected {expected}, got {getattr(found, name)}")
    return found


@dataclasses.dataclass(frozen=True)
class Request:
    """One video.

    Attributes:
        prompt: caption.
        image: first frame; None for text-to-video.
        end_image: last frame, where `extra_inputs` names it.
        seed: of its noise.
    """

    prompt: str
    image: Image.Image | None = None
    end_image: Image.Image | None = None
    seed: int = 0


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
    trained: dict[str, np.ndarray]
    _contexts: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    _velocities: dict[tuple[str, float], Any] = dataclasses.field(default_factory=dict)

    @property
    def shape(self) -> DiTConfig:
        return DIT_PRESETS[self.cfg.preset]

    @property
    def at_once(self) -> int:
        """Videos sampled together."""
        return self.cfg.per_device_train_batch_size * batch_shards(self.mesh)

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
        kinds = [(self._size(request, options), request.image is None) for request in requests]
        guided = any(scale != 1.0 for scale in options.guidance)
        self._encode_texts([r.prompt for r in requests] + ([options.negative_prompt] if guided else []))
        batches = []
        for kind in dict.fromkeys(kinds):
            same = [i for i, found in enumerate(kinds) if found == kind]
            batches += [(kind[0], same[i : i + self.at_once]) for i in range(0, len(same), self.at_once)]
        conditions = self._conditions(requests, batches, options.frames)
        with tqdm(total=len(batches) * options.steps, desc="denoise", disable=None) as bar:
            for (size, numbers), y in zip(batches, conditions, strict=True):
                # A batch that is not full is filled up with its last sample.
                rows = [numbers[min(i, len(numbers) - 1)] for i in range(self.at_once if len(requests) > 1 else 1)]
                batch = {"context": np.stack([self._contexts[requests[i].prompt] for i in rows])}
                if y is not None:
                    batch["y"] = np.stack([y[numbers.index(i)] for i in rows])
                noise = np.stack([start_latents(requests[i].seed, self._latents(size, options.frames)) for i in rows])

                def step_done(step: int, x: jax.Array) -> None:
                    bar.update()
                    observe(step, x)

                latents = self._denoise(batch, noise, options, step_done)
                video = self._decode(latents)
                for i, number in enumerate(numbers):
                    yield number, to_uint8(video[i])

    def _check(self, request: Request) -> None:
        takes, optional = takes_image(self.cfg), self.shape.first_frame_in_latents
        if request.image is None and takes and not optional:
            raise UserError(f"image: expected a first frame, which {self.cfg.preset} needs")
        if request.image is not None and not takes:
            raise UserError(f"image: expected none, {self.cfg.preset} makes videos of text alone")
        if request.end_image is not None and (request.image is None or optional or not takes):
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
        return store.describe("vae", self.sources.vae).stride

    def _latents(self, size: tuple[int, int], frames: int) -> tuple[int, int, int, int]:
        time, rows, columns = self._stride
        return (frames - 1) // time + 1, size[0] // rows, size[1] // columns, self.shape.out_dim

    def _encode_texts(self, prompts: Sequence[str]) -> None:
        """Text features of prompts that were not met before, each beside its prompt."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._contexts]
        if not new:
            return
        tokenize = PromptTokenizer(self.sources.tokenizer, self.shape.text_len)
        encoder = open_text_encoder(self.cfg, self.sources)
        if self.trained:
            encoder = replace_arrays(encoder, self.trained)
        graph, weights = nnx.split(encoder)
        encode = jax.jit(lambda weights, ids, mask: nnx.merge(graph, weights).context(ids, mask)[0])
        for prompt in tqdm(new, desc="encode prompts", disable=None if len(new) > 1 else True):
            ids, mask = tokenize([prompt])
            self._contexts[prompt] = np.asarray(encode(weights, ids, mask).astype(jnp.float32))

    def _conditions(
        self, requests: Sequence[Request], batches: Sequence[tuple[tuple[int, int], list[int]]], frames: int
    ) -> list[np.ndarray | None]:
        """Of each batch the conditioning arrays of its requests; None without first frames."""
        if all(request.image is None for request in requests):
            return [None] * len(batches)
        graph, weights = nnx.split(store.open_component("vae", self.sources.vae, weights_dtype="float32"))
        in_latents = self.shape.first_frame_in_latents

        @jax.jit
        def encode(weights: nnx.State, image: jax.Array, last: jax.Array | None) -> jax.Array:
            vae = nnx.merge(graph, weights)
            if not in_latents:
                return first_frame_condition(vae, image, frames, last)[0]
            later = (frames - 1) // vae.cfg.stride[0]
            return jnp.pad(vae.encode(image[:, None])[0], ((0, later), (0, 0), (0, 0), (0, 0)))

        def pixels(image: Image.Image | None, size: tuple[int, int]) -> np.ndarray | None:
            return None if image is None else fit_frame(image, *size)[None].astype(np.float32) / 127.5 - 1

        found: list[np.ndarray | None] = []
        for size, numbers in batches:
            of_batch = [requests[i] for i in numbers]
            if of_batch[0].image is None:
                found.append(None)
                continue
            encoded = [encode(weights, pixels(r.image, size), pixels(r.end_image, size)) for r in of_batch]
            found.append(np.stack([np.asarray(y.astype(jnp.float32)) for y in encoded]))
        return found

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
        if self.shape.first_frame_in_latents and "y" in placed:
            x = x.at[:, :1].set(placed["y"][:, :1])
        return x

    def _velocity(self, expert: str, guidance: float) -> Any:
        """`(weights, batch, latents, timesteps) -> latents as the expert sees them, velocity`, jitted."""
        if (expert, guidance) not in self._velocities:
            sampler = Sampler(self.shape, np.zeros(1), (Phase(expert, 0, 1, False),), {expert: guidance})

            def velocity(weights: Frozen, batch: dict[str, jax.Array], x: jax.Array, t: jax.Array) -> Any:
                experts, keep = bind_experts(self.networks, sampler, {}, weights, batch)
                x = keep(x)
                return x, experts[expert].velocity(x, t)

            self._velocities[expert, guidance] = jax.jit(velocity)
        return self._velocities[expert, guidance]

    @functools.cached_property
    def _decoder(self) -> Any:
        graph = self.networks.graphs["vae"]
        decode = lambda weights, z: jnp.clip(nnx.merge(graph, weights).decode(z), -1, 1)  # noqa: E731
        return jax.jit(decode, out_shardings=replicated(self.mesh))

    def _decode(self, latents: jax.Array) -> np.ndarray:
        with jax.set_mesh(self.mesh):
            return np.asarray(self._decoder(self.weights["vae"], latents))


def open_pipeline(config: Config | Path | str, *, lora: str = "", step: str = "") -> Pipeline:
    """A pipeline with its weights on the mesh.

    Args:
        config: of a run, or a config file.
        lora: folder of a run, whose trained weights are taken, or a file of adapters in any naming that `convert.lora`
            reads; NETWORK=FILE[,NETWORK=FILE] says which expert a file is for (by default the one that its header
            names, else the low-noise one).
        step: of the run's checkpoint, or "best"; the last by default.

    Raises:
        UserError: weights that are not found, not readable, or of another network.
    """
    cfg = config if isinstance(config, Config) else read_config(config)
    sources = find_sources(cfg, experts=experts_of(cfg))
    check_weights(cfg, sources)
    mesh = make_mesh(dataclasses.asdict(cfg.mesh))
    trained = read_trained(cfg, lora, step)
    graphs, weights = {}, {}
    for name, files in (("dit", sources.dit), ("dit2", sources.dit2)):
        if not files:
            continue
        memory = "pinned_host" if cfg.streams(name) else None
        module = replace_arrays(open_dit(cfg, name, files, mesh, stored=cfg.dtype), trained.get(name, {}))
        graphs[name], state = nnx.split(module)
        weights[name] = jax.tree.map(hosts.place, state, shardings(state, "dit", mesh, blocks_memory=memory))
    vae = store.open_component("vae", sources.vae, weights_dtype=cfg.dtype, dtype=jnp.dtype(cfg.dtype), remat=False)
    graphs["vae"], state = nnx.split(replace_arrays(vae, trained.get("vae", {})))
    weights["vae"] = jax.tree.map(lambda x: hosts.place(x, replicated(mesh)), state)
    return Pipeline(cfg, sources, mesh, Networks(graphs, {}, ()), weights, trained.get("text_encoder", {}))


def read_config(file: Path | str) -> Config:
    """The configuration that a config file gives.

    Raises:
        UserError: no such file, or a configuration that makes no sense.
    """
    if not Path(file).is_file():
        raise UserError(f"{file}: no such file, expected a config file")
    return parse(runpy.run_path(str(file))["get_config"]())


def read_trained(cfg: Config, source: str, step: str = "") -> dict[str, dict[str, np.ndarray]]:
    """Trained arrays by network and path: adapters or weights.

    Args:
        cfg: configuration of the pipeline.
        source, step: `lora` and `step` of `open_pipeline`.
    """
    if not source:
        if step:
            raise UserError("--step: expected a run in --lora")
        return {}
    if "=" not in source and (epath.Path(source) / "config.json").exists() and not store.is_converted(source):
        checkpoint = find_checkpoint(RunFolder(epath.Path(source)), step)
        return {name: read_network(checkpoint, name) for name in trained_networks(checkpoint)}
    if step:
        raise UserError(f"--step: {source} is no run, whose checkpoint could be chosen")
    experts = ("dit", "dit2")[: experts_of(cfg)]
    found = {}
    for item in source.split(","):
        network, _, file = item.rpartition("=")
        if not epath.Path(file).exists():
            raise UserError(f"--lora: {file}: no such run or file of adapters")
        network = network or adapters.network_of(file) or experts[-1]
        if network not in experts:
            raise UserError(f"--lora: {item}: {cfg.preset} has no {network}, expected {' or '.join(experts)}")
        found[network] = store.restore(file) if store.is_converted(file) else adapters.convert(file, cfg.preset)[1]
    return found


def replace_arrays(module: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The module with trained adapters added, or with trained weights in place of its own.

    Raises:
        UserError: they are of a network of other sizes.
    """
    if not arrays:
        return module
    if is_adapters(arrays):
        layers = {name.rsplit(".", 1)[0] for name in arrays}
        targets = [target for target, ours in TARGETS.items() if any(n.endswith(f".{ours}") for n in layers)]
        rank = next(x.shape[-1] for name, x in arrays.items() if name.endswith("lora_a"))
        shapes = flat_shapes(module)
        for name in layers:
            expected = shapes.get(f"{name}.kernel")
            found = (*arrays[f"{name}.lora_a"].shape[:-1], arrays[f"{name}.lora_b"].shape[-1])
            if expected is not None and tuple(expected) != found:
                raise UserError(f"--lora: {name} is {found}, expected {tuple(expected)} as the network's")
        add_lora(module, rank=rank, targets=targets, key=jax.random.key(0))
        return fill(module, {name: jnp.asarray(x) for name, x in arrays.items()}, partial=True)
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    flat = dict(nnx.to_flat_state(params))
    for path, leaf in flat.items():
        new = arrays.get(".".join(map(str, path)))
        if new is not None:
            if new.shape != leaf[...].shape:
                raise UserError(f"--lora: {'.'.join(map(str, path))} is {new.shape}, expected {leaf[...].shape}")
            flat[path] = leaf.replace(jnp.asarray(new, leaf[...].dtype))
    return nnx.merge(graph, nnx.from_flat_state(flat), rest)
