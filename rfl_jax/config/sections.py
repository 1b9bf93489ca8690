"""The settings that this trainer adds, in groups: each with type, range, default and meaning."""

import dataclasses
from typing import Annotated, Literal

from rfl_jax.rewards.detect import COMPATS
from rfl_jax.rewards.face import RewardConfig
from rfl_jax.rewards.terms import find_term
from rfl_jax.settings import (
    Above,
    AtLeast,
    Below,
    MultipleOf,
    Names,
    Numbers,
    OneOf,
    Rows,
    StepRange,
    Table,
    Within,
)

DEVICES = AtLeast(1, -1, "the rest")


@dataclasses.dataclass(frozen=True)
class MeshSection:
    """Devices along each axis of the mesh; one of them may be -1, which takes the rest."""

    data: Annotated[int, DEVICES, "Replicas of the weights."] = -1
    fsdp: Annotated[int, DEVICES, "Shards of the weights; samples are spread over data x fsdp."] = 1
    context: Annotated[
        int, DEVICES, "Shards of each sample (tokens, frames, columns of pixels), and of the weights besides fsdp."
    ] = 1


@dataclasses.dataclass(frozen=True)
class RewardSection(RewardConfig):
    """How faces are found and compared, what else is rewarded, and the weights of reward and KL in the loss."""

    compat: Annotated[
        str, OneOf(COMPATS), "insightface: its exact warp; roll: the original trainer's pre-processing and crop."
    ] = RewardConfig.compat
    channel_order: Annotated[
        Literal["rgb", "bgr"], "Channels that ArcFace is given; bgr swaps them, as the original does."
    ] = "rgb"
    detector_size: Annotated[int, MultipleOf(32), "Side in pixels of the square that the detector sees."] = (
        RewardConfig.detector_size
    )
    use_first_frame: Annotated[
        bool, "Whether the real clip's first frame, which the network is given, counts among its faces."
    ] = RewardConfig.use_first_frame
    people: Annotated[
        Literal["largest", "all"],
        "Who counts: the largest face of each frame, as in the original, or all people of the real clip, each by herself.",
    ] = "largest"
    frames: Annotated[
        int,
        AtLeast(0),
        "Latent frames that are decoded with gradient and scored: others in a row each update, never the first; 0: all.",
    ] = 0
    weight: Annotated[float, "Factor of the reward in the loss: of the face's, or of the sum of reward.terms."] = 1.0
    kl_weight: Annotated[float, AtLeast(0), "Factor of the KL to the untrained network in the loss."] = 1.0
    ceiling: Annotated[
        bool, "No gradient of a score beyond what the real clip's own faces score against each other."
    ] = False
    terms: Annotated[
        Rows,
        Table(lambda name: find_term(name).Settings),
        "Terms of the reward by name, each with type, weight, every, ceiling and its own settings; empty: the face alone.",
    ] = ()


@dataclasses.dataclass(frozen=True)
class KLSection:
    """The KL to the untrained network, whose factor is `reward.kl_weight`."""

    every: Annotated[
        int,
        AtLeast(1),
        "Of so many denoising steps with gradient a random one is compared with the reference, for all of them; 1: each.",
    ] = 1
    target: Annotated[
        float,
        AtLeast(0),
        "Budget of the KL, whose weight grows while it is above, by 11 % an update at most, and falls back below; 0: none.",
    ] = 0.0


@dataclasses.dataclass(frozen=True)
class RealSection:
    """The real-data loss: flow matching on the real clips' own latents, by the DiTs that train."""

    weight: Annotated[float, AtLeast(0), "Factor of the real-data loss; 0: none."] = 0.0
    every: Annotated[int, AtLeast(1), "Optimizer updates of which one has the real-data loss."] = 1


@dataclasses.dataclass(frozen=True)
class MotionSection:
    """What is taken from the reward of a video that stands still where the real clip moves."""

    weight: Annotated[
        float,
        Within(0, 1),
        "Share of its reward that a video without motion loses, less as it moves up to as much as the real clip; 0: none.",
    ] = 0.0
    copy_weight: Annotated[
        float,
        Within(0, 1),
        "Share that a video loses which only repeats its first frame, less down to the real clip's copying; 0: none.",
    ] = 0.0


@dataclasses.dataclass(frozen=True)
class WindowSection:
    """Which of the denoising steps from `mid_timestep` to `final_timestep` carry gradient, and how."""

    mode: Annotated[
        Literal["last", "random", "uniform", "list"],
        "The last window.steps of them; as many at random, others each update; as many evenly spaced; those in window.list.",
    ] = "last"
    steps: Annotated[
        int, AtLeast(0), "Steps that carry gradient; 0: all of them, with last, or those in window.list."
    ] = 0
    list: Annotated[Names, Numbers(), "Steps that carry gradient, counted from 0, with mode list."] = ()
    stop_input_gradient: Annotated[
        bool,
        "Cut the latents off before the network in every step: each velocity has gradient, none goes through two (DRTune).",
    ] = False
    direct: Annotated[
        bool,
        "Sample without gradient, add known noise, differentiate one step from there and remove the noise left (Direct-Align).",
    ] = False


@dataclasses.dataclass(frozen=True)
class NFTSection:
    """Training on rewards that have no gradient, by comparing a clip's videos with one another (DiffusionNFT)."""

    group: Annotated[
        int,
        AtLeast(0),
        "Videos of a clip that are compared, neighbours in a batch, each of its own noise; 0: the gradient goes through rewards.",
    ] = 0


@dataclasses.dataclass(frozen=True)
class NoiseSection:
    """The noise that a video starts from."""

    mode: Annotated[
        Literal["fresh", "fixed"],
        "fresh: one for each (seed, clip, epoch); fixed: the original's single noise for all.",
    ] = "fresh"
    per_sample: Annotated[
        int, AtLeast(0), "Fresh noises that a clip has before the first comes again; 0: none ever comes again."
    ] = 4
    prefix_cache: Annotated[
        Literal["auto", "on", "off"],
        "Whether the denoising steps before the first network that trains are computed once, in preparation; auto: where "
        "noises repeat.",
    ] = "auto"


@dataclasses.dataclass(frozen=True)
class SamplingSection:
    """The denoising steps, in training and in samples."""

    shift: Annotated[float, Above(0), "Shift of the sigma schedule: shift * s / (1 + (shift - 1) * s)."] = 5.0
    guidance_scale: Annotated[
        float, AtLeast(0), "Scale of classifier-free guidance; 1: none, as distilled experts want it."
    ] = 1.0
    negative_prompt: Annotated[str, "Text that guidance steers away from."] = ""
    guidance_gradient: Annotated[
        Literal["both", "conditional"],
        "Where the gradient of a guided step goes: through both predictions, or through the one with the prompt alone.",
    ] = "both"


@dataclasses.dataclass(frozen=True)
class DataSection:
    """What becomes of the clips."""

    num_frames: Annotated[int, MultipleOf(4, 1), "Frames of a clip at most; shorter ones are cut to 4n+1."] = 81
    max_pixels: Annotated[int, AtLeast(1), "Height x width of a frame at most; larger ones are scaled down."] = (
        480 * 480
    )
    height: Annotated[
        int, AtLeast(0), "Rows that every clip is scaled and cropped to, with width; 0: each clip's own size."
    ] = 0
    width: Annotated[
        int, AtLeast(0), "Columns that every clip is scaled and cropped to, with height; 0: each clip's own size."
    ] = 0
    on_bad_row: Annotated[
        Literal["error", "skip"], "error: the first clip that cannot be used ends the run; skip: reported and left out."
    ] = "error"
    cache_dir: Annotated[str, "Folder or gs:// of prepared clips; empty: cache/ in the workdir."] = ""


@dataclasses.dataclass(frozen=True)
class EvalSection:
    """Evaluation after the last step, and validation while training runs (`eval_every`)."""

    file_name: Annotated[str, "csv of held-out clips, with columns video and prompt; empty: no evaluation."] = ""
    judge_model_path: Annotated[
        str, "Folder, like reward_model_path, whose embedder only judges; needed where file_name is set."
    ] = ""
    num_samples: Annotated[int, AtLeast(1), "Held-out clips that are evaluated at most: the first of them."] = 16
    validation_samples: Annotated[int, AtLeast(1), "Clips of a validation at most: the first of those evaluated."] = 8
    max_motion_loss: Annotated[
        float,
        Above(0, 1),
        "Share of the motion before training; when more of it is gone while the held-out reward rose, the alarm is given.",
    ] = 0.2
    max_copying_rise: Annotated[
        float, Above(0, 1), "When copying of the first frame (0..1) rose by more while the reward rose, likewise."
    ] = 0.08
    max_face_loss: Annotated[
        float,
        Above(0, 1),
        "Share of the frames with a face before training; when more of them have none while the reward rose, likewise.",
    ] = 0.1
    max_term_loss: Annotated[
        float,
        Above(0, 1),
        "Share of the score of a term that is watched (weight 0 in reward.terms); when more is gone while the reward rose, likewise.",
    ] = 0.2


@dataclasses.dataclass(frozen=True)
class EmaSection:
    """An exponential moving average of the weights that train."""

    decay: Annotated[
        float,
        Below(0, 1),
        "Share of itself that an update leaves it, less in the first ones; validation and exports take the average; 0: none.",
    ] = 0.0


@dataclasses.dataclass(frozen=True)
class GuardSection:
    """What is done against a reward that is hacked."""

    on_alarm: Annotated[
        Literal["warn", "lower", "stop"],
        "warn: tell an alarm; lower: back to the best checkpoint, on with half the learning rate; stop: back to it, and end.",
    ] = "warn"
    raise_kl: Annotated[
        float,
        AtLeast(1),
        "Where an alarm lowers the learning rate, factor of the KL's weight from then on; 1: it stays.",
    ] = 2.0
    max_falls: Annotated[int, AtLeast(1), "Alarms that lower the learning rate; the next one ends the run."] = 3


@dataclasses.dataclass(frozen=True)
class ProfileSection:
    """Where the time of a step goes."""

    steps: Annotated[StepRange, "Steps to trace into profile.json; empty: none."] = None
