"""The run's configuration: ConfigDict at the edge, frozen dataclasses inside.

Top-level keys are the original's, with its names and meanings; what is added is grouped. Each setting's type carries its
range and its meaning: `python -m rfl_jax.config > docs/settings.md` prints them.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import ml_collections

from rfl_jax import remat
from rfl_jax.errors import UserError, did_you_mean
from rfl_jax.models.lora import TARGETS
from rfl_jax.models.wan.config import DIT_PRESETS
from rfl_jax.rewards.detect import COMPATS
from rfl_jax.rewards.face import RewardConfig
from rfl_jax.rewards.term import Term, TermSettings
from rfl_jax.rewards.terms import FACE, find_term
from rfl_jax.settings import (
    Above,
    AtLeast,
    Below,
    Listed,
    MultipleOf,
    Names,
    Numbers,
    OneOf,
    Pairs,
    Rows,
    Setting,
    StepRange,
    Table,
    Within,
    build,
    edge_form,
    names,
    own_settings,
    sections,
    settings,
)

TRAINABLE = ("dit", "dit2", "vae", "text_encoder")
BOUNDARIES = Within(0, 1, "0 <= min <= max <= 1")
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


@dataclasses.dataclass(frozen=True)
class Original:
    """The original's settings, with its names, meanings and defaults."""

    learning_rate: Annotated[float, AtLeast(0), "Rate of AdamW after the warm-up."] = 2.5e-6
    lr_scheduler_type: Annotated[
        Literal["constant", "constant_with_warmup", "linear", "cosine"],
        "Course of the rate after the warm-up; linear and cosine fall to 0 at the last update.",
    ] = "constant"
    weight_decay: Annotated[float, AtLeast(0), "Weight decay of AdamW."] = 0.0
    warmup_steps: Annotated[
        int, AtLeast(0), "Optimizer updates over which the rate rises linearly from 0; 0: none."
    ] = 10
    per_device_train_batch_size: Annotated[
        int, AtLeast(1), "Samples that each of the mesh's data x fsdp groups takes at once."
    ] = 1
    gradient_accumulation_steps: Annotated[int, AtLeast(1), "Micro-batches of an optimizer update."] = 1
    num_train_epochs: Annotated[int, AtLeast(1), "Passes over the clips, where max_steps is -1."] = 1
    train_batch_size: Annotated[
        int,
        AtLeast(1),
        "Samples of a step: a multiple of per_device_train_batch_size x data x fsdp x gradient_accumulation_steps.",
    ] = 8
    max_grad_norm: Annotated[float, Above(0), "Global norm that gradients are clipped to."] = 1.0
    seed: Annotated[int, AtLeast(0), "Seed of noises, adapters and the clips' order."] = 42
    save_steps: Annotated[int, AtLeast(1), "Steps between checkpoints; the last step has one too."] = 25
    logging_steps: Annotated[
        int, AtLeast(1), "Steps between points in TensorBoard and Weights & Biases; metrics.jsonl has every step."
    ] = 1
    resume_from_checkpoint: Annotated[
        str, "Workdir of the run to go on from where this workdir has no checkpoint; empty: from the beginning."
    ] = ""
    model_name: Annotated[Literal["wan2_2"], "Family of networks."] = "wan2_2"
    model_paths: Annotated[
        str, "JSON list, or file of one: high-noise expert, low-noise expert (absent for the 5B), text encoder, VAE."
    ] = ""
    model_id_with_origin_paths: Annotated[
        Names, "The same on the Hugging Face hub as org/name[@revision]:pattern, where model_paths is empty."
    ] = ()
    tokenizer_path: Annotated[str, "UMT5's tokenizer.json or its folder; empty: fetched from the hub."] = ""
    reward_model_path: Annotated[
        str,
        "Folder with a face detector and an embedder, as antelopev2, buffalo_l or AuraFace-v1 (ONNX, or converted).",
    ] = ""
    trainable_models: Annotated[
        Names, Listed(TRAINABLE, empty=True), "Networks that train: in full, where lora_base_model does not name them."
    ] = ("dit2",)
    lora_base_model: Annotated[
        Names, Listed(("dit", "dit2"), empty=True), "Networks that train by adapters; empty: none."
    ] = ("dit2",)
    lora_target_modules: Annotated[Names, Listed(tuple(TARGETS)), "Linear layers of each block that have adapters."] = (
        tuple(TARGETS)
    )
    lora_rank: Annotated[int, AtLeast(1), "Rank of the adapters; their alpha is the same."] = 32
    use_gradient_checkpointing: Annotated[
        bool, "Recompute a block's activations in the backward pass, where remat_policy is empty."
    ] = True
    use_gradient_checkpointing_offload: Annotated[
        bool, "Keep the blocks' inputs in pinned host memory meanwhile, where remat_policy is empty."
    ] = False
    extra_inputs: Annotated[
        Names, Listed(("input_image", "end_image")), "Frames of the clip that the network is given: first, and last."
    ] = ("input_image",)
    max_timestep_boundary: Annotated[float, BOUNDARIES, "Steps whose sigma lies above it have no gradient."] = 1.0
    min_timestep_boundary: Annotated[
        float, BOUNDARIES, "Sigma from which on the high-noise expert serves a step, below it the low-noise one."
    ] = 0.9
    num_inference_steps: Annotated[int, AtLeast(1), "Denoising steps of a video."] = 8
    mid_timestep: Annotated[int, AtLeast(0), "First denoising step with gradient, counted from 0."] = 4
    final_timestep: Annotated[int, AtLeast(0), "Last denoising step with gradient, counted from 0."] = 7
    file_name: Annotated[str, "csv of the clips to train on, with columns video and prompt."] = "metadata.csv"


@dataclasses.dataclass(frozen=True)
class Config(Original):
    """All settings of a run."""

    preset: Annotated[str, OneOf(DIT_PRESETS), "Sizes of the networks, by checkpoint."] = "wan2_2_i2v_a14b"
    init_lora: Annotated[
        str,
        "File of adapters to begin with; of several networks NETWORK=FILE,NETWORK=FILE. The KL's reference has none.",
    ] = ""
    max_steps: Annotated[int, AtLeast(1, -1, "whole epochs"), "Steps of the run."] = -1
    max_bad_steps: Annotated[
        int,
        AtLeast(1),
        "Steps in a row that end the run when loss, gradients or weights are not finite; such updates are skipped.",
    ] = 5
    sample_every: Annotated[
        int, AtLeast(0), "Steps between videos in samples/; the first and the last step have one too; 0: none."
    ] = 25
    eval_every: Annotated[int, AtLeast(0), "Steps between validations on eval.file_name's clips; 0: none."] = 0
    early_stop: Annotated[
        int, AtLeast(0), "Validations in a row without a better judging score after which training ends; 0: never."
    ] = 0
    wandb_project: Annotated[str, "Weights & Biases project that is told as well; empty: none."] = ""
    dtype: Annotated[
        Literal["float32", "bfloat16"], "Computation, and weights that do not train; those that do are float32."
    ] = "bfloat16"
    frozen_weights: Annotated[
        Literal["", "int8"], "DiT weights that do not train in full: 8-bit integers; empty: in dtype."
    ] = ""
    frozen_activations: Annotated[
        Literal["", "int8"],
        "Inputs of int8 weights where nothing is differentiated: 8-bit integers, a scale per token; empty: in dtype.",
    ] = ""
    frozen_memory: Annotated[
        Literal["device", "pinned_host"],
        "Where DiT weights that do not train in full wait; pinned_host: in host memory, each block for its turn.",
    ] = "device"
    optimizer_memory: Annotated[
        Literal["device", "pinned_host"], "Where the optimizer's moments wait; pinned_host: in host memory."
    ] = "device"
    remat_policy: Annotated[
        str,
        OneOf(("", *remat.NAMES)),
        "What the backward pass of a block keeps; empty: as use_gradient_checkpointing and its offload say.",
    ] = ""
    vae_caches: Annotated[
        str, OneOf(remat.VAE_CACHES), "What becomes of the decoder's causal caches until the backward pass."
    ] = "keep"
    attention: Annotated[
        Literal["auto", "xla", "flash", "cudnn"],
        "Attention kernel; auto: flash on TPU, cuDNN on GPU, XLA on CPU.",
    ] = "auto"
    compiler_options: Annotated[
        Names, Pairs(), "Options of XLA, over those that rfl_jax sets for the platform (rfl_jax/chips.py)."
    ] = ()
    mesh: MeshSection = MeshSection()
    reward: RewardSection = RewardSection()
    kl: KLSection = KLSection()
    real: RealSection = RealSection()
    motion: MotionSection = MotionSection()
    window: WindowSection = WindowSection()
    noise: NoiseSection = NoiseSection()
    sampling: SamplingSection = SamplingSection()
    data: DataSection = DataSection()
    eval: EvalSection = EvalSection()
    ema: EmaSection = EmaSection()
    guard: GuardSection = GuardSection()
    profile: ProfileSection = ProfileSection()

    @property
    def validates(self) -> bool:
        """Whether held-out clips are judged while training runs."""
        return self.eval_every > 0 and bool(self.eval.file_name)

    @property
    def real_arrays(self) -> Names:
        """Arrays of the real clips that are prepared for guards alone: "latents", "motion", "copying"."""
        asked = {"latents": self.real.weight, "motion": self.motion.weight, "copying": self.motion.copy_weight}
        return tuple(name for name, weight in asked.items() if weight)

    @property
    def people_arrays(self) -> Names:
        """Arrays that are prepared of the real clips' people where all of them count, see `FaceReward.people`."""
        return ("people_pool", "people_boxes") if self.reward.people == "all" else ()

    @property
    def terms(self) -> dict[str, TermSettings]:
        """The terms of the reward by name: the table's, or the face alone."""
        return dict(self.reward.terms) or {FACE: TermSettings(FACE, ceiling=self.reward.ceiling)}

    @property
    def face_term(self) -> TermSettings:
        """The term of the face, which is watched where the table does not have it."""
        return next((term for term in self.terms.values() if term.type == FACE), TermSettings(FACE, weight=0.0))

    @property
    def other_terms(self) -> dict[str, TermSettings]:
        """The terms besides the face's, by name."""
        return {name: term for name, term in self.terms.items() if term.type != FACE}

    @property
    def needs_untrained(self) -> bool:
        """Whether a term compares with the video that the network before training makes of the same noise."""
        return any(term.against == "untrained" for term in self.terms.values())

    @property
    def trained(self) -> Names:
        """Networks that train, in full or by adapters."""
        named = {*self.trainable_models, *self.lora_base_model}
        return tuple(name for name in TRAINABLE if name in named)

    @property
    def trains_dit(self) -> bool:
        """Whether any DiT trains, in full or by adapters."""
        return not {"dit", "dit2"}.isdisjoint(self.trained)

    @property
    def adapted(self) -> Names:
        """Networks that train by adapters."""
        return self.lora_base_model

    def trains_in_full(self, network: str) -> bool:
        """Whether a network's own weights train, not adapters."""
        return network in self.trainable_models and network not in self.adapted

    def named_in(self, network: str) -> str:
        """The setting that makes a network train."""
        return "lora_base_model" if network in self.adapted else "trainable_models"

    def quantizes(self, network: str) -> bool:
        """Whether a DiT's weights are kept as 8-bit integers."""
        return self.frozen_weights == "int8" and network in ("dit", "dit2") and not self.trains_in_full(network)

    def streams(self, network: str) -> bool:
        """Whether a DiT's frozen weights wait in host memory for their layer's turn."""
        return self.frozen_memory == "pinned_host" and network in ("dit", "dit2") and not self.trains_in_full(network)

    @property
    def init_loras(self) -> dict[str, str]:
        """Files of adapters to begin with, by network."""
        if not self.init_lora or len(self.adapted) == 1:
            return {self.adapted[0]: self.init_lora} if self.init_lora else {}
        pairs = (item.partition("=") for item in names(self.init_lora))
        return {network: file for network, _, file in pairs}

    @property
    def policy(self) -> str:
        """The remat policy: the named one, else the one that the original's two switches mean."""
        if self.remat_policy:
            return self.remat_policy
        if not self.use_gradient_checkpointing:
            return "none"
        return "offload" if self.use_gradient_checkpointing_offload else "full"


@dataclasses.dataclass(frozen=True)
class Rule:
    """What ties settings to each other.

    Attributes:
        keys: the settings; the first is the one that a refusal names.
        holds: whether a configuration keeps it.
        expected: of the first setting, as the others are.
    """

    keys: Names
    holds: Callable[[Config], bool]
    expected: str | Callable[[Config], str]


def _compares_with_first_frame(cfg: Config) -> str:
    """The first term that does; empty if none does."""
    return next((name for name, term in cfg.terms.items() if find_term(term.type).whole), "")


def _compares_without_preparing(cfg: Config) -> str:
    """The first term that is to compare with what it does not prepare; empty if none is."""
    return next(
        (
            name
            for name, term in cfg.terms.items()
            if term.against != "real" and find_term(term.type).prepare is Term.prepare
        ),
        "",
    )


RULES = (
    Rule(
        ("vae_caches", "remat_policy", "use_gradient_checkpointing"),
        lambda cfg: cfg.vae_caches == "keep" or cfg.policy != "none",
        "keep, as nothing is rematerialised",
    ),
    Rule(
        ("frozen_activations", "frozen_weights"),
        lambda cfg: not cfg.frozen_activations or cfg.frozen_weights == "int8",
        "empty, as frozen_weights is",
    ),
    Rule(
        ("init_lora", "lora_base_model"),
        lambda cfg: not cfg.init_lora or bool(cfg.adapted),
        "empty, as lora_base_model is",
    ),
    Rule(
        ("init_lora", "lora_base_model"),
        lambda cfg: len(cfg.adapted) < 2 or set(cfg.init_loras) <= set(cfg.adapted),
        "NETWORK=FILE[,NETWORK=FILE], as several networks have adapters",
    ),
    Rule(
        ("trainable_models", "lora_base_model"),
        lambda cfg: bool(cfg.trained),
        f"at least one of {', '.join(TRAINABLE)}",
    ),
    Rule(
        ("mid_timestep", "final_timestep"),
        lambda cfg: cfg.mid_timestep <= cfg.final_timestep,
        lambda cfg: f"0..final_timestep ({cfg.final_timestep})",
    ),
    Rule(
        ("final_timestep", "num_inference_steps"),
        lambda cfg: cfg.final_timestep < cfg.num_inference_steps,
        lambda cfg: f"less than num_inference_steps ({cfg.num_inference_steps})",
    ),
    Rule(
        ("min_timestep_boundary", "max_timestep_boundary"),
        lambda cfg: cfg.min_timestep_boundary <= cfg.max_timestep_boundary,
        BOUNDARIES.text,
    ),
    Rule(
        ("window.list", "window.mode"),
        lambda cfg: (cfg.window.mode == "list") == bool(cfg.window.list),
        lambda cfg: (
            "numbers of steps, as window.mode is list" if not cfg.window.list else "empty, unless window.mode is list"
        ),
    ),
    Rule(
        ("window.steps", "window.mode"),
        lambda cfg: cfg.window.mode == "last" or (cfg.window.mode == "list") == (cfg.window.steps == 0),
        lambda cfg: (
            "0, as window.list tells the steps"
            if cfg.window.steps
            else f"at least 1, as window.mode is {cfg.window.mode}"
        ),
    ),
    Rule(
        ("window.direct", "window.steps", "window.list", "window.mode"),
        lambda cfg: not cfg.window.direct or max(cfg.window.steps, len(cfg.window.list)) == 1,
        "false, unless window.steps is 1 or window.list one number",
    ),
    Rule(
        ("window.stop_input_gradient", "window.direct"),
        lambda cfg: not (cfg.window.stop_input_gradient and cfg.window.direct),
        "false, as window.direct takes one step",
    ),
    Rule(
        ("reward.frames", "data.num_frames"),
        lambda cfg: cfg.reward.frames <= cfg.data.num_frames // 4,
        lambda cfg: f"at most {cfg.data.num_frames // 4}, as data.num_frames is {cfg.data.num_frames}",
    ),
    Rule(
        ("reward.frames", "motion.copy_weight"),
        lambda cfg: not (cfg.reward.frames and cfg.motion.copy_weight),
        "0, as motion.copy_weight compares with the first frame",
    ),
    Rule(
        ("reward.frames", "reward.terms"),
        lambda cfg: not (cfg.reward.frames and _compares_with_first_frame(cfg)),
        lambda cfg: f"0, as the term {_compares_with_first_frame(cfg)} compares with the first frame",
    ),
    Rule(
        ("reward.people", "reward.frames"),
        lambda cfg: not (cfg.reward.people == "all" and cfg.reward.frames),
        "largest, as people are followed from the first frame, which reward.frames leaves out",
    ),
    Rule(
        ("reward.terms",),
        lambda cfg: sum(term.type == FACE for term in cfg.terms.values()) <= 1,
        f"at most one term of the type {FACE}",
    ),
    Rule(
        ("reward.terms",),
        lambda cfg: any(term.weight for term in cfg.terms.values()) or cfg.real.weight > 0,
        "a term with a weight above 0, as nothing else is trained on",
    ),
    Rule(
        ("reward.terms",),
        lambda cfg: not _compares_without_preparing(cfg),
        lambda cfg: (
            f"against real in the row {_compares_without_preparing(cfg)}, whose term prepares nothing of a clip"
        ),
    ),
    Rule(
        ("reward.terms", "trainable_models", "lora_base_model"),
        lambda cfg: cfg.trains_dit or not cfg.needs_untrained,
        "against real in every row, as no DiT trains",
    ),
    Rule(
        ("reward.ceiling", "reward.terms"),
        lambda cfg: not (cfg.reward.ceiling and cfg.reward.terms),
        "false, as each term in reward.terms has its own",
    ),
    *(
        Rule(
            (f"motion.{name}", "reward.terms"),
            lambda cfg, name=name: not getattr(cfg.motion, name) or cfg.face_term.weight > 0,
            "0, as reward.terms does not train on the face, whose reward it weighs",
        )
        for name in ("weight", "copy_weight")
    ),
    Rule(
        ("extra_inputs",),
        lambda cfg: "input_image" in cfg.extra_inputs,
        "input_image or input_image,end_image",
    ),
    Rule(
        ("data.height", "data.width"),
        lambda cfg: (cfg.data.height > 0) == (cfg.data.width > 0),
        "height and width both, or neither",
    ),
    Rule(
        ("mesh.data", "mesh.fsdp", "mesh.context"),
        lambda cfg: dataclasses.astuple(cfg.mesh).count(-1) <= 1,
        "at most one axis of -1",
    ),
    Rule(
        ("kl.target", "reward.kl_weight"),
        lambda cfg: not cfg.kl.target or cfg.reward.kl_weight > 0,
        "0, as reward.kl_weight is",
    ),
    Rule(
        ("kl.target", "trainable_models", "lora_base_model"),
        lambda cfg: not cfg.kl.target or cfg.trains_dit,
        "0, as no DiT trains",
    ),
    Rule(
        ("real.weight", "trainable_models", "lora_base_model"),
        lambda cfg: not cfg.real.weight or cfg.trains_dit,
        "0, as no DiT trains",
    ),
    Rule(
        ("guard.on_alarm", "eval_every", "eval.file_name"),
        lambda cfg: cfg.guard.on_alarm == "warn" or cfg.validates,
        "warn, as no held-out clips are judged (eval_every, eval.file_name)",
    ),
    Rule(("early_stop", "eval_every"), lambda cfg: not cfg.early_stop or cfg.eval_every > 0, "0, as eval_every is"),
    Rule(
        ("eval.judge_model_path", "eval.file_name"),
        lambda cfg: bool(cfg.eval.judge_model_path) or not cfg.eval.file_name,
        "a folder, as eval.file_name is set",
    ),
)


def plain(cfg: Config) -> dict[str, Any]:
    """The settings as flags, config files and config.json have them: numbers, texts, dictionaries of them."""
    return edge_form(cfg)


def default_config() -> ml_collections.ConfigDict:
    """The defaults as a ConfigDict, for config files to change."""
    return ml_collections.ConfigDict(plain(Config()))


# Where configs are: inside the installed package, or at the top of a clone.
FOLDERS = (Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs")


def config_file(text: str) -> str:
    """The file of a config that is named alone: `mini` is `configs/mini.py`, `roll:FILE.yaml` likewise with its argument.
    The name of a file stays what it is.

    Raises:
        UserError: there is no config of that name.
    """
    name, colon, argument = text.partition(":")
    if not name.isidentifier() or Path(name).exists():
        return text
    for folder in FOLDERS:
        if (folder / f"{name}.py").is_file():
            return f"{folder / name}.py{colon}{argument}"
    known = sorted(file.stem for folder in FOLDERS for file in folder.glob("[a-z]*.py"))
    near = did_you_mean(name, known) or f", or one of {', '.join(known)}"
    raise UserError(f"--config: {name}: expected a config file{near}")


def check_keys(keys: Iterable[str]) -> None:
    """Refuses dotted keys that name no setting, before a config is asked for them.

    Raises:
        UserError: naming all of them, each with the nearest setting.
    """
    listed = list(settings(Config))
    known = [*(item.key for item in listed), *sections(Config)]
    # What a table has is known when the config is read.
    keys = [key for key in keys if not any(key.startswith(f"{item.key}.") for item in listed if item.kind == Rows)]
    unknown = [
        f"config.{key}: unknown setting{did_you_mean(key, known, 'config.') or ', --help lists all'}"
        for key in keys
        if key not in known
    ]
    if unknown:
        raise UserError("; ".join(unknown))


def parse(values: ml_collections.ConfigDict) -> Config:
    """A validated `Config`.

    Raises:
        UserError: unknown keys, values of the wrong type, and those that make no sense, all of them by name.
    """
    cfg, faults = build(Config, values.to_dict())
    shown = {item.key: item for item in settings(Config)}
    for rule in RULES:
        if faults.keys().isdisjoint(rule.keys) and not rule.holds(cfg):
            value = cfg
            for part in rule.keys[0].split("."):
                value = getattr(value, part)
            expected = rule.expected if isinstance(rule.expected, str) else rule.expected(cfg)
            faults[rule.keys[0]] = f"expected {expected}, got {shown[rule.keys[0]].write(value)!r}"
    if faults:
        raise UserError("; ".join(f"config.{key}: {fault}" for key, fault in faults.items()))
    return cfg


def dumps(cfg: Config) -> str:
    """The configuration as JSON."""
    return json.dumps(plain(cfg), indent=1, sort_keys=True) + "\n"


def grouped() -> Iterator[tuple[str, str, list[Setting]]]:
    """All settings in groups for a reader: name and meaning of the group, its settings."""
    own = own_settings(Config)
    theirs = own_settings(Original)
    yield "The original's", "Names, meanings and defaults are the original's.", list(theirs.values())
    yield "Ours", "A run's settings that the original has not.", [own[key] for key in own if key not in theirs]
    for name, section in sections(Config).items():
        yield name, str(section.__doc__), list(settings(section, f"{name}."))


def default_text(setting: Setting) -> str:
    """A setting's default as a flag has it."""
    value = setting.write(setting.default)
    if setting.kind == Rows:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def markdown() -> str:
    """Tables of all settings."""
    lines = [
        "# Settings",
        "",
        "Of `--config.NAME=VALUE`, and of config files. Printed by `python -m rfl_jax.config > docs/settings.md`.",
    ]
    for title, meaning, group in grouped():
        lines += ["", f"## {title}", "", meaning, "", "| setting | values | default | meaning |", "|---|---|---|---|"]
        for item in group:
            default = f"`{default_text(item)}`" if default_text(item) else "empty"
            lines.append(f"| `{item.key}` | {item.expected} | {default} | {item.meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
