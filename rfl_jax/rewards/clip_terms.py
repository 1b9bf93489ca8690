"""Terms by networks of CLIP's kind: how beautiful frames are, and how well people would think that they fit the prompt."""

import dataclasses
import functools
from typing import Annotated, Any, ClassVar

import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int
from tokenizers import Tokenizer

from rfl_jax.errors import UserError, first_line
from rfl_jax.models.clip import CLIP, Fit, prepare_images
from rfl_jax.rewards.embedder import unit
from rfl_jax.rewards.face import Seen
from rfl_jax.rewards.term import Prepared, Term, TermScore, TermSettings
from rfl_jax.settings import AtLeast

TEXT = "text"  # the array of a prompt's vector


class ByFrame(Term):
    """A score of single frames: of some in training, others each update, and of evenly spaced ones elsewhere."""

    @dataclasses.dataclass(frozen=True)
    class Settings(TermSettings):
        path: Annotated[str, "Folder that python -m convert clip wrote."] = ""
        frames: Annotated[int, AtLeast(1), "Frames of a video that are scored: all where it has no more."] = 4

    network = "clip"
    fit: ClassVar[Fit] = "crop"

    def __init__(self, cfg: Any, clip: CLIP) -> None:
        super().__init__(cfg)
        self.clip = clip

    def slim(self) -> None:
        self.clip.text = None

    def rate(self, vectors: Float[Array, "b k e"], prepared: Prepared) -> Float[Array, "b k"]:
        """Scores of frames by their vectors of length 1."""
        raise NotImplementedError

    def __call__(self, seen: Seen, prepared: Prepared) -> TermScore:
        which = seen.drawn(self.cfg.frames)
        vectors = seen.each(self._see, which)
        scores = self.rate(unit(vectors), prepared)
        return TermScore(jnp.mean(scores, 1), jnp.ones(len(scores), bool), by_nearest(scores, which, seen.length))

    def _see(self, frames: Float[Array, "n h w 3"]) -> Float[Array, "n e"]:
        return self.clip.vision(prepare_images(frames, self.clip.cfg.image_size, self.fit))


class ByPrompt(ByFrame):
    """A score of single frames beside the prompt."""

    @classmethod
    def tokens(cls, cfg: Any, prompt: str) -> dict[str, np.ndarray]:
        return {"ids": np.array(_tokenizer(cfg.path).encode(prompt).ids, np.int32)}

    def prepare_prompt(self, tokens: Prepared) -> dict[str, Array]:
        assert self.clip.text is not None
        return {TEXT: unit(self.clip.text(tokens["ids"]))}

    def cosines(self, vectors: Float[Array, "b k e"], prepared: Prepared) -> Float[Array, "b k"]:
        """Of frames and prompt."""
        return jnp.sum(vectors * prepared[TEXT][:, None], 2)


class Aesthetic(ByFrame):
    """How beautiful people would think a frame, about 1 to 10: LAION's aesthetic predictor, linear layers on OpenAI's CLIP ViT-L/14."""

    title = "beauty, aesthetic predictor"
    # Rough: by LAION's own counts half of LAION-5B's English images have 4.5 or more, a quarter 5, one of 200 has 6.
    mean, std, floor = 5.0, 0.6, 2.0

    def __init__(self, cfg: Any, clip: CLIP) -> None:
        if not clip.cfg.head:
            raise ValueError("expected a CLIP with the aesthetic predictor's head, see docs/convert.md")
        super().__init__(cfg, clip)

    def rate(self, vectors: Float[Array, "b k e"], prepared: Prepared) -> Float[Array, "b k"]:
        return self.clip.rate(vectors)[..., 0]


class PickScore(ByPrompt):
    """How well a frame fits the prompt by the choices of Pick-a-Pic's users: the cosine times the network's own factor, about 100,
    as its model card has it.
    """

    title = "text alignment, PickScore"
    # Rough: as public code for fine-tuning image generators has them.
    mean, std, floor = 21.38, 1.18, 15.5

    def rate(self, vectors: Float[Array, "b k e"], prepared: Prepared) -> Float[Array, "b k"]:
        return jnp.exp(self.clip.logit_scale[0].astype(jnp.float32)) * self.cosines(vectors, prepared)


class HPS(ByPrompt):
    """How well a frame fits the prompt by the choices that HPD v2 collected: the cosine, as the authors' own package has it."""

    title = "text alignment, HPS v2"
    # Rough: the means of generators in its own benchmark (HPS v2) are 0.235 to 0.279.
    mean, std, floor = 0.27, 0.02, 0.17
    fit = "pad"

    def rate(self, vectors: Float[Array, "b k e"], prepared: Prepared) -> Float[Array, "b k"]:
        return self.cosines(vectors, prepared)


def by_nearest(
    scores: Float[Array, "b k"], which: Int[Array | np.ndarray, " k"], length: int
) -> Float[Array, "b {length}"]:
    """By frame, of what is known of some: each frame has the nearest one's."""
    distance = jnp.abs(jnp.arange(length)[:, None] - jnp.asarray(which)[None])
    return scores[:, jnp.argmin(distance, 1)]


@functools.lru_cache(maxsize=8)
def _tokenizer(folder: str) -> Tokenizer:
    """The tokenizer beside converted weights, which cuts and fills up texts to the network's length.

    Raises:
        UserError: there is none.
    """
    file = epath.Path(folder) / "tokenizer.json"
    try:
        return Tokenizer.from_str(file.read_text())
    except Exception as error:  # the library raises its bare Exception
        told = "no such file" if not file.exists() else first_line(error)
        raise UserError(f"{file}: expected what python -m convert clip --tokenizer writes there ({told})") from None
