"""What a term of the reward is: a score of videos with one contract, whoever wrote it."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from rfl_jax.rewards.face import LOSS_WEIGHT, Seen
from rfl_jax.settings import AtLeast

Prepared = Mapping[str, Array]  # of a batch of real clips, by name


@dataclasses.dataclass(frozen=True)
class TermSettings:
    """What every term is told. A term with more to tell has a `Settings` of its own that inherits from this."""

    type: Annotated[
        str, "A term on board, or MODULE:CLASS on the import path; the row's name where it is left out."
    ] = ""
    weight: Annotated[float, AtLeast(0), "Factor of the term in the reward; 0: it is watched, not trained on."] = 1.0
    every: Annotated[
        int, AtLeast(1), "Of so many optimizer updates one has the term, so many times as strong; 1: each."
    ] = 1
    ceiling: Annotated[bool, "No gradient of a score beyond what the real clip scores under the term."] = False
    against: Annotated[
        Literal["real", "untrained"],
        "What training compares with: the real clip, or the video that the network before training makes of the same noise.",
    ] = "real"
    hold: Annotated[
        bool,
        "Besides what `weight` asks of each video, keep their mean where it is compared with, by a push on all of them that adapts.",
    ] = False


# What becomes of a score, not what it is: nothing that is prepared depends on these.
COMMON = tuple(field.name for field in dataclasses.fields(TermSettings))


@dataclasses.dataclass
class TermScore:
    """What a term says of a batch of videos.

    Attributes:
        score: [b] higher is better; a finite number even where it says nothing.
        valid: [b] whether it says anything; where not, a video has no reward by this term, and no gradient of it.
        per_frame: [b, t] by frame, on the score's scale.
        drift: [b] how much more (above 0) or less than what it is compared with a video has, differentiable; of terms that `hold`
            can be asked of.
    """

    score: Float[Array, " b"]
    valid: Bool[Array, " b"]
    per_frame: Float[Array, "b t"]
    drift: Float[Array, " b"] | None = None


jax.tree_util.register_dataclass(TermScore, ["score", "valid", "per_frame", "drift"], [])


class Term(nnx.Module):
    """A term of the reward. Networks of its own are its attributes: their weights are kept on every device.

    Preparation has it whole: there it is asked `tokens`, `prepare_prompt` and `prepare`. Training is handed what `slim` leaves.

    Attributes:
        cfg: its settings.
        title, unit: as tables and pages show it.
        mean, std: of its scores, roughly, before training: the loss is -(score - mean) / std x 0.1, as the original's is of
            the face's score, so that terms of weight 1 pull alike.
        floor: a score that is worth nothing: the alarm counts from there what share of a score was lost.
        network: kind of the converted network that it is constructed with, beside its settings, of which `path` names the folder;
            empty without one. A ValueError of the constructor says what is wrong with the network.
        holds: whether its scores tell a `drift`.
        whole: whether it compares with the first frame, so that some frames alone (`reward.frames`) are not enough.
        takes: arrays of a prepared clip that it is handed besides its own: "pool".
        version: another number makes what was prepared by its code before unused.
    """

    Settings: ClassVar[type[TermSettings]] = TermSettings
    title: ClassVar[str] = ""
    unit: ClassVar[str] = ""
    mean: ClassVar[float] = 0.0
    std: ClassVar[float] = 1.0
    floor: ClassVar[float] = 0.0
    network: ClassVar[str] = ""
    holds: ClassVar[bool] = False
    whole: ClassVar[bool] = False
    takes: ClassVar[tuple[str, ...]] = ()
    version: ClassVar[int] = 1

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg

    @classmethod
    def files(cls, cfg: Any) -> tuple[str, ...]:
        """Files that a term of these settings reads; where their content changes, clips are prepared anew."""
        return (cfg.path,) if cls.network else ()

    @classmethod
    def tokens(cls, cfg: Any, prompt: str) -> dict[str, np.ndarray]:
        """What it reads of a clip's prompt, as numbers, by name: the same shapes for every prompt."""
        del cfg, prompt
        return {}

    def prepare_prompt(self, tokens: Prepared) -> dict[str, Array]:
        """What it needs to know of the prompts whose `tokens` [b, ...] these are, likewise by name [b, ...] and kept."""
        del tokens
        return {}

    def slim(self) -> None:
        """Drops the weights that only preparation needs."""

    def prepare(self, seen: Seen) -> dict[str, Array]:
        """What it needs to know of real clips, by name [b, ...]; kept beside each clip."""
        del seen
        return {}

    def __call__(self, seen: Seen, prepared: Prepared) -> TermScore:
        """Scores videos, differentiable in their pixels.

        Args:
            seen: the videos, and their faces; every term shares them.
            prepared: of the real clips: `prepare`'s arrays, and those that it `takes`.
        """
        raise NotImplementedError

    def ceiling(self, seen: Seen, prepared: Prepared) -> Float[Array, " b"]:
        """What the real clips score themselves."""
        del seen
        return prepared[REAL]

    def loss(self, score: Float[Array, " b"]) -> Float[Array, " b"]:
        """The standardised loss of a score."""
        return -(score - self.mean) / self.std * LOSS_WEIGHT


REAL = "real"  # the array with a clip's own score, beside those of `Term.prepare`


def prepare_term(term: Term, seen: Seen, clip: Prepared, tokens: Prepared) -> dict[str, Array]:
    """All that is kept of real clips for a term: its own arrays, and the clips' own score.

    Args:
        term: which.
        seen: the real clips.
        clip: their arrays, of which the term takes some.
        tokens: of their prompts, see `Term.tokens`.
    """
    arrays = {**term.prepare(seen), **term.prepare_prompt(tokens)}
    own = term(seen, {**arrays, **{name: clip[name] for name in term.takes}})
    return {**arrays, REAL: own.score}
