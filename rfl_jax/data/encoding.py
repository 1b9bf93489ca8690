"""From a clip and its caption to the arrays that training takes: text features, conditioning, face pools."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rfl_jax.chips import compiler_options
from rfl_jax.config import Config
from rfl_jax.data.cache import ClipArrays
from rfl_jax.data.text import PromptTokenizer
from rfl_jax.hosts import is_writer
from rfl_jax.models.wan.conditioning import conditioning_of
from rfl_jax.models.wan.config import DIT_PRESETS
from rfl_jax.models.wan.vae import VAE
from rfl_jax.networks.check import check_trainable
from rfl_jax.networks.faces import open_judge, open_reward
from rfl_jax.networks.table import open_network
from rfl_jax.networks.terms import open_terms, term_tokens
from rfl_jax.rewards.face import FaceReward
from rfl_jax.rewards.motion import copying, motion
from rfl_jax.rewards.term import prepare_term
from rfl_jax.sources import Sources
from rfl_jax.terminal import waiting


class ClipEncoder:
    """The networks that only preparation needs, opened when the first clip asks for them. Dropping this object frees
    them before the DiTs are loaded.

    Args:
        cfg: the run.
        sources: where its weights are.
        judge: folder of a second embedder's ONNX file, whose pool is stored as well; empty for none.
    """

    def __init__(self, cfg: Config, sources: Sources, judge: str = "") -> None:
        check_trainable(cfg)
        self.cfg = cfg
        self.sources = sources
        self.judge = judge
        self.tokenizer = PromptTokenizer(sources.tokenizer, DIT_PRESETS[cfg.preset].text_len)

    def encode(self, video: np.ndarray, prompt: str) -> ClipArrays:
        """Arrays of one clip.

        Args:
            video: [t, h, w, 3] in [-1, 1].
            prompt: caption.

        Returns:
            ids and mask [s], context [s, d], y [t', h', w', c], pool (and judge_pool) [t, e], and found [t]: which
            frames have a face.
        """
        ids, mask = self.tokenizer([prompt])
        first = "_encode" not in vars(self)
        with waiting("read text encoder, VAE and face networks, and compile them", show=first and is_writer()):
            arrays = {name: np.asarray(x.astype(jnp.float32)) for name, x in self._encode(video, ids, mask).items()}
        return {"ids": ids[0], "mask": mask[0], **arrays}

    def encode_real(self, video: np.ndarray, names: Sequence[str]) -> ClipArrays:
        """What guards compare with.

        Args:
            video: [t, h, w, 3] in [-1, 1].
            names: of these: "latents" [t', h', w', c] of the whole clip; "motion", in pixels, and "copying", both [], as
                `rfl_jax.rewards.motion` has them.
        """
        first = "_encode_real" not in vars(self)
        with waiting("compile the encoding of whole clips", show=first and is_writer()):
            return {name: np.asarray(x) for name, x in self._encode_real(video, tuple(names)).items()}

    def encode_terms(self, video: np.ndarray, prompt: str, clip: Mapping[str, np.ndarray]) -> dict[str, ClipArrays]:
        """What the terms of the reward besides the face's keep of a clip, by term.

        Args:
            video: [t, h, w, 3] in [-1, 1].
            prompt: caption.
            clip: its arrays, of which terms take some.
        """
        first = "_encode_terms" not in vars(self)
        with waiting("compile the terms of the reward", show=first and is_writer()):
            encoded = self._encode_terms(video, {"pool": clip["pool"]}, term_tokens(self.cfg, prompt))
        return {name: {key: np.asarray(x) for key, x in arrays.items()} for name, arrays in encoded.items()}

    def encode_people(self, video: np.ndarray) -> ClipArrays:
        """What is known of a clip's people, see `FaceReward.people`; of the judge too where there is one.

        Args:
            video: [t, h, w, 3] in [-1, 1].
        """
        first = "_encode_people" not in vars(self)
        with waiting("compile the search for the people of a clip", show=first and is_writer()):
            return {name: np.asarray(x) for name, x in self._encode_people(video).items()}

    @property
    def _options(self) -> dict[str, str]:
        return compiler_options(more=self.cfg.compiler_options)

    @functools.cached_property
    def _vae(self) -> VAE:
        return open_network(self.cfg, "vae", self.sources.vae, "prepare")

    @functools.cached_property
    def _reward(self) -> FaceReward:
        return open_reward(self.cfg, self.sources.reward)

    @functools.cached_property
    def _encode(self) -> Callable[[np.ndarray, np.ndarray, np.ndarray], dict[str, jax.Array]]:
        cfg = self.cfg
        networks: dict[str, Any] = {
            "text": open_network(cfg, "text_encoder", self.sources.text_encoder, "prepare"),
            "vae": self._vae,
            "reward": self._reward,
        }
        if self.judge:
            networks["judge"] = open_judge(cfg, networks["reward"], self.judge)
        # All weights are arguments: what a jitted function closes over becomes a constant of its program.
        graph, weights = nnx.split(networks)
        end = "end_image" in cfg.extra_inputs
        conditioning = conditioning_of(DIT_PRESETS[cfg.preset])
        assert conditioning is not None

        @functools.partial(jax.jit, compiler_options=self._options)
        def encode(weights: nnx.State, video: jax.Array, ids: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
            networks = nnx.merge(graph, weights)
            image, last = video[None, 0], video[None, -1] if end else None
            y = conditioning.encode(networks["vae"], image, video.shape[0], last)[0]
            out = {"context": networks["text"].context(ids, mask)[0], "y": y}
            out["pool"], out["found"] = networks["reward"].pool(video)
            if "judge" in networks:
                out["judge_pool"], _ = networks["judge"].pool(video)
            return out

        return functools.partial(encode, weights)

    @functools.cached_property
    def _encode_real(self) -> Callable[[np.ndarray, tuple[str, ...]], dict[str, jax.Array]]:
        graph, weights = nnx.split({"vae": self._vae, "reward": self._reward})

        @functools.partial(jax.jit, static_argnums=2, compiler_options=self._options)
        def encode(weights: nnx.State, video: jax.Array, names: tuple[str, ...]) -> dict[str, jax.Array]:
            networks = nnx.merge(graph, weights)
            out = {}
            if "latents" in names:
                out["latents"] = networks["vae"].encode(video[None])[0]
            kps, _, found = networks["reward"].find(video)
            measures = {"motion": motion, "copying": copying}
            return out | {name: measures[name](kps[None], found[None])[0] for name in names if name in measures}

        return functools.partial(encode, weights)

    @functools.cached_property
    def _encode_people(self) -> Callable[[np.ndarray], dict[str, jax.Array]]:
        networks: dict[str, FaceReward] = {"reward": self._reward}
        if self.judge:
            networks["judge"] = open_judge(self.cfg, self._reward, self.judge)
        graph, weights = nnx.split(networks)

        @functools.partial(jax.jit, compiler_options=self._options)
        def encode(weights: nnx.State, video: jax.Array) -> dict[str, jax.Array]:
            networks = nnx.merge(graph, weights)
            return networks["reward"].people(video, networks.get("judge"))

        return functools.partial(encode, weights)

    @functools.cached_property
    def _encode_terms(
        self,
    ) -> Callable[[np.ndarray, ClipArrays, dict[str, ClipArrays]], dict[str, dict[str, jax.Array]]]:
        names = list(self.cfg.other_terms)
        graph, weights = nnx.split({"reward": self._reward, "terms": open_terms(self.cfg, "prepare")})

        @functools.partial(jax.jit, compiler_options=self._options)
        def encode(
            weights: nnx.State, video: jax.Array, clip: dict[str, jax.Array], tokens: dict[str, dict[str, jax.Array]]
        ) -> dict[str, dict[str, jax.Array]]:
            networks = nnx.merge(graph, weights)
            terms = dict(zip(names, networks["terms"], strict=True))
            seen = networks["reward"].see(video[None])
            batch, tokens = jax.tree.map(lambda x: x[None], (clip, tokens))
            prepared = {name: prepare_term(term, seen, batch, tokens[name]) for name, term in terms.items()}
            return jax.tree.map(lambda x: x[0], prepared)

        return functools.partial(encode, weights)


def negative_context(cfg: Config, sources: Sources) -> np.ndarray:
    """Text features of the negative prompt [s, d]."""
    text = open_network(cfg, "text_encoder", sources.text_encoder, "prepare")
    ids, mask = PromptTokenizer(sources.tokenizer, DIT_PRESETS[cfg.preset].text_len)([cfg.sampling.negative_prompt])
    return np.asarray(text.context(jnp.asarray(ids), jnp.asarray(mask))[0].astype(jnp.float32))
