"""What is measured of one video: identity, motion, copying of the first frame, the picture itself, and the terms of the reward."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from rfl_jax.config import Config
from rfl_jax.networks.terms import shown_as
from rfl_jax.rewards import motion as of_videos
from rfl_jax.rewards.terms import find_term


@dataclasses.dataclass(frozen=True)
class Measure:
    """Attributes:
    title: on tables and pages.
    better: "higher" or "lower"; empty where neither is better by itself.
    unit: of its values.
    """

    title: str
    better: str
    unit: str = ""


MEASURES = {
    "face_sim": Measure("FaceSim, reward's embedder", "higher"),
    "judge_sim": Measure("FaceSim, judging embedder", "higher"),
    "motion": Measure("motion of landmarks between frames", "", "px"),
    "face_fraction": Measure("frames with a face", "higher"),
    "dynamics": Measure("change of pixels between frames", "", "of 255"),
    "copying": Measure("copying of the first frame's pose and expression", "lower"),
    "flicker": Measure("temporal flicker", "lower", "of 255"),
    "sharpness": Measure("sharpness", "higher"),
}


@dataclasses.dataclass(frozen=True)
class ByTerm:
    """What a term of the reward says of a video.

    Attributes:
        score: higher is better.
        frames: by frame.
    """

    score: float
    frames: Float[np.ndarray, " t"]


@dataclasses.dataclass(frozen=True)
class ByPerson:
    """The people of the real clip in a video, the largest first.

    Attributes:
        face: cosine of each one's face with her own of the real clip, by the reward's embedder; 0 without a face.
        judge: likewise of each one's face with everybody's, by the embedder that only judges.
        found: whether she has a face in a frame.
        counts: whether she is there in that frame of the real clip.
        boxes: of her face in pixels.
    """

    face: Float[np.ndarray, "t p"]
    judge: Float[np.ndarray, "t p p"]
    found: Bool[np.ndarray, "t p"]
    counts: Bool[np.ndarray, "t p"]
    boxes: Float[np.ndarray, "t p 4"]

    @property
    def known(self) -> list[int]:
        """Those whom the real clip has."""
        return [int(i) for i in np.flatnonzero(self.counts.any(0))]

    def measures(self) -> list[dict[str, float]]:
        """Of each: similarities, and in which share of the frames that she should be in she has a face."""
        told = []
        for i in self.known:
            at = self.counts[:, i]
            means = {
                "face_sim": self.face[at, i],
                "judge_sim": self.judge[at, i, i],
                "face_fraction": self.found[at, i],
            }
            told.append({name: float(values.mean()) for name, values in means.items()})
        return told

    def frames(self) -> list[list[Any]]:
        """Of each by frame her box, null without a face."""
        return [
            [[round(float(x), 1) for x in box] if there else None for box, there in zip(boxes, found, strict=True)]
            for boxes, found in ((self.boxes[:, i], self.found[:, i]) for i in self.known)
        ]

    def swaps(self) -> int:
        """How often two people exchange their faces, or exchange them back: the judging embedder finds both more like the other,
        in frames that have both.
        """
        count = 0
        for i, j in itertools.combinations(self.known, 2):
            both = self.found[:, i] & self.found[:, j] & self.counts[:, i] & self.counts[:, j]
            right, wrong = (
                self.judge[both, i, i] + self.judge[both, j, j],
                self.judge[both, i, j] + self.judge[both, j, i],
            )
            # Nobody is swapped before the first frame.
            count += int(np.sum(np.diff((wrong > right).astype(int), prepend=0) != 0))
        return count


def term_measures(cfg: Config) -> dict[str, Measure]:
    """The measures of a run's terms by name; the face's term has its own in `MEASURES`."""
    kinds = {name: find_term(term.type) for name, term in cfg.other_terms.items()}
    return {shown_as(name): Measure(kind.title or name, "higher", kind.unit) for name, kind in kinds.items()}


def measures_of(result: Mapping[str, Any]) -> dict[str, Measure]:
    """The measures of an evaluation.json, by name."""
    return MEASURES | {name: Measure(**shown) for name, shown in result.get("terms", {}).items()}


@dataclasses.dataclass(frozen=True)
class Scored:
    """A video and what the networks found in it.

    Attributes:
        video: frames.
        face: cosine of each frame's face with the real clip's faces, by the reward's embedder; 0 without a face.
        judge: the same by the embedder that only judges.
        mask: whether a frame has a face.
        kps: its five points in pixels.
        boxes: its box x1, y1, x2, y2 in pixels.
        terms: of the reward besides the face's, by the names of their measures.
        people: each by herself, where all people count; `face` and `judge` are then means over those who are there in the real
            clip's frame, `mask`, `kps` and `boxes` the largest face's.
    """

    video: UInt8[np.ndarray, "t h w 3"]
    face: Float[np.ndarray, " t"]
    judge: Float[np.ndarray, " t"]
    mask: Bool[np.ndarray, " t"]
    kps: Float[np.ndarray, "t 5 2"]
    boxes: Float[np.ndarray, "t 4"]
    terms: Mapping[str, ByTerm] = dataclasses.field(default_factory=dict)
    people: ByPerson | None = None

    @property
    def compared(self) -> Bool[np.ndarray, " t"]:
        """The frames whose similarity counts: those with a face, or of all people those in which the real clip has any."""
        return self.mask if self.people is None else np.any(self.people.counts, 1)

    def measures(self) -> dict[str, float]:
        """The values of `MEASURES`, and of the terms. What needs a face is 0 where no frame has one."""
        at = self.compared
        return {
            "face_sim": float(self.face[at].mean()) if at.any() else 0.0,
            "judge_sim": float(self.judge[at].mean()) if at.any() else 0.0,
            "motion": motion(self.kps, self.mask),
            "face_fraction": float(self.mask.mean()),
            "dynamics": dynamics(self.video),
            "copying": copying(self.kps, self.mask),
            "flicker": flicker(self.video),
            "sharpness": sharpness(self.video),
            **{name: term.score for name, term in self.terms.items()},
        }

    def frames(self) -> dict[str, list[Any]]:
        """Per frame: similarities and boxes, null without a face; and the terms' scores."""

        def where(values: Sequence[Any], mask: Bool[np.ndarray, " t"]) -> list[Any]:
            return [value if there else None for value, there in zip(values, mask, strict=True)]

        return {
            "face_sim": where([round(float(x), 4) for x in self.face], self.compared),
            "judge_sim": where([round(float(x), 4) for x in self.judge], self.compared),
            "box": where([[round(float(x), 1) for x in box] for box in self.boxes], self.mask),
            **{name: [round(float(x), 4) for x in term.frames] for name, term in self.terms.items()},
        }


def several(real: Scored) -> bool:
    """Whether a clip has several people of whom each counts."""
    return real.people is not None and len(real.people.known) > 1


def motion(kps: Float[np.ndarray, "t 5 2"], mask: Bool[np.ndarray, " t"]) -> float:
    """`rfl_jax.rewards.motion.motion` of one video, in pixels."""
    return float(of_videos.motion(kps[None].astype(np.float64), mask[None])[0])


def copying(kps: Float[np.ndarray, "t 5 2"], mask: Bool[np.ndarray, " t"]) -> float:
    """`rfl_jax.rewards.motion.copying` of one video, 0..1."""
    return float(of_videos.copying(kps[None].astype(np.float64), mask[None])[0])


def dynamics(video: UInt8[np.ndarray, "t h w 3"]) -> float:
    """Mean absolute change of a pixel from frame to frame, of 255."""
    return float(np.abs(np.diff(video.astype(np.int16), axis=0)).mean()) if len(video) > 1 else 0.0


def flicker(video: UInt8[np.ndarray, "t h w 3"]) -> float:
    """Mean absolute departure of a pixel from the mean of its neighbours in time, of 255: what moves evenly has none."""
    x = video.astype(np.float32)
    return float(np.abs(x[1:-1] - (x[:-2] + x[2:]) / 2).mean()) if len(video) > 2 else 0.0


def sharpness(video: UInt8[np.ndarray, "t h w 3"]) -> float:
    """Variance of the luma's Laplacian (four neighbours), mean over frames."""
    luma = video.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    inner = luma[:, 1:-1, 1:-1]
    laplacian = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:] - 4 * inner
    return float(laplacian.var((1, 2)).mean())


def means(clips: Sequence[Mapping[str, Any]], measures: Iterable[str] = MEASURES) -> dict[str, float]:
    """The mean of each measure over clips."""
    return {name: float(np.mean([clip[name] for clip in clips])) for name in measures}
