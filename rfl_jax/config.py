"""The run's configuration: ConfigDict at the edge, frozen dataclasses inside.

Top-level keys are the original's, with its names and meanings; what is added is grouped.
"""

import dataclasses
import json
import re
import types
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

import ml_collections

from rfl_jax import remat
from rfl_jax.errors import UserError
from rfl_jax.models.lora import TARGETS
from rfl_jax.models.wan.config import DIT_PRESETS
from rfl_jax.rewards.detect import COMPATS
from rfl_jax.rewards.face import RewardConfig

TRAINABLE = ("dit", "dit2", "vae", "text_encoder")
SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine")
DTYPES = ("float32", "bfloat16")
MEMORIES = ("device", "pinned_host")
ATTENTIONS = ("auto", "xla", "splash", "cudnn")


@dataclasses.dataclass(frozen=True)
class MeshSection:
    """Devices along each axis; one of them may be -1, which takes the rest.

    Attributes:
        data: replicas of the weights.
        fsdp: shards of the weights; samples are spread over data x fsdp.
        context: shards of each sample (tokens, frames, columns of pixels), and of the weights.
    """

    data: int = -1
    fsdp: int = 1
    context: int = 1


@dataclasses.dataclass(frozen=True)
class RewardSection(RewardConfig):
    """`RewardConfig`, and the weights of the two terms of the loss.

    Attributes:
        weight: of the face reward.
        kl_weight: of the KL to the untrained network.
    """

    weight: float = 1.0
    kl_weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class NoiseSection:
    """Start noise.

    Attributes:
        mode: "fresh" draws one for each (seed, sample, epoch); "fixed" is the original's single noise for all.
        per_sample: how many fresh noises a clip has before the first comes again; 0: never.
        prefix_cache: whether the denoising steps before the first network that trains are computed once, in
            preparation: "auto" where they are the same in every epoch, "on", "off".
    """

    mode: str = "fresh"
    per_sample: int = 4
    prefix_cache: str = "auto"


@dataclasses.dataclass(frozen=True)
class SamplingSection:
    """Attributes:
    shift: of the sigma schedule.
    guidance_scale: classifier-free guidance; 1 is none (distilled experts).
    negative_prompt: what guidance steers away from.
    """

    shift: float = 5.0
    guidance_scale: float = 1.0
    negative_prompt: str = ""


@dataclasses.dataclass(frozen=True)
class DataSection:
    """Attributes:
    num_frames: longest clip, 4n+1; shorter ones are cut to 4n+1.
    max_pixels: height * width of a frame at most; larger ones are scaled down.
    height, width: 0 takes each clip's own size; both given: all clips are scaled and cropped to it.
    on_bad_row: "error" stops at the first unusable row, "skip" reports and leaves it out.
    cache_dir: prepared samples; empty puts them into the workdir.
    """

    num_frames: int = 81
    max_pixels: int = 480 * 480
    height: int = 0
    width: int = 0
    on_bad_row: str = "error"
    cache_dir: str = ""


@dataclasses.dataclass(frozen=True)
class EvalSection:
    """Evaluation after the last step, and validation while training runs.

    Attributes:
        file_name: csv of held-out clips; empty: no evaluation.
        judge_model_path: folder of antelopev2 files whose embedder only judges.
        num_samples: clips at most.
        validation_samples: clips at most of a validation: the first of them.
        max_motion_loss: share of the motion before training; when more of it is gone and the held-out reward has risen,
            now or at an earlier validation, the alarm is given.
        max_copying_rise: when the copying of the first frame (0..1) has risen by more, likewise.
    """

    file_name: str = ""
    judge_model_path: str = ""
    num_samples: int = 16
    validation_samples: int = 8
    max_motion_loss: float = 0.2
    max_copying_rise: float = 0.08


@dataclasses.dataclass(frozen=True)
class ProfileSection:
    """Attributes:
    steps: steps to trace, "3-5" or "3"; empty: none.
    """

    steps: str = ""


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run. The first block is the original's; defaults are its defaults.

    Attributes:
        init_lora: adapters to begin with, in any naming that `convert.lora` reads; where several networks have
            adapters, NETWORK=FILE[,NETWORK=FILE]. The KL and the evaluation's "base" remain the network without.
        eval_every: steps between validations on the clips of `eval.file_name`; 0: none.
        early_stop: validations in a row without a better judging score after which training ends; 0: never.
        wandb_project: of Weights & Biases, which is then told as well; empty: not.
    """

    learning_rate: float = 2.5e-6
    lr_scheduler_type: str = "constant"
    weight_decay: float = 0.0
    warmup_steps: int = 10
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    num_train_epochs: int = 1
    train_batch_size: int = 8
    max_grad_norm: float = 1.0
    seed: int = 42
    save_steps: int = 25
    logging_steps: int = 1
    resume_from_checkpoint: str = ""
    model_name: str = "wan2_2"
    model_paths: str = ""
    model_id_with_origin_paths: str = ""
    tokenizer_path: str = ""
    reward_model_path: str = ""
    trainable_models: str = "dit2"
    lora_base_model: str = "dit2"
    lora_target_modules: str = "q,k,v,o,ffn.0,ffn.2"
    lora_rank: int = 32
    use_gradient_checkpointing: bool = True
    use_gradient_checkpointing_offload: bool = False
    extra_inputs: str = "input_image"
    max_timestep_boundary: float = 1.0
    min_timestep_boundary: float = 0.9
    num_inference_steps: int = 8
    mid_timestep: int = 4
    final_timestep: int = 7
    file_name: str = "metadata.csv"

    preset: str = "wan2_2_i2v_a14b"
    init_lora: str = ""
    max_steps: int = -1
    sample_every: int = 25
    eval_every: int = 0
    early_stop: int = 0
    wandb_project: str = ""
    dtype: str = "bfloat16"
    frozen_weights: str = ""
    frozen_memory: str = "device"
    optimizer_memory: str = "device"
    remat_policy: str = ""
    vae_caches: str = "keep"
    attention: str = "auto"
    mesh: MeshSection = MeshSection()
    reward: RewardSection = RewardSection()
    noise: NoiseSection = NoiseSection()
    sampling: SamplingSection = SamplingSection()
    data: DataSection = DataSection()
    eval: EvalSection = EvalSection()
    profile: ProfileSection = ProfileSection()

    @property
    def validates(self) -> bool:
        """Whether held-out clips are judged while training runs."""
        return self.eval_every > 0 and bool(self.eval.file_name)

    @property
    def profiled(self) -> tuple[int, int] | None:
        """First and last step to trace."""
        return parse_steps(self.profile.steps)

    @property
    def trained(self) -> tuple[str, ...]:
        """Networks that train, in full or by adapters."""
        named = set(_names(self.trainable_models)) | set(self.adapted)
        return tuple(name for name in TRAINABLE if name in named)

    @property
    def adapted(self) -> tuple[str, ...]:
        """Networks that train by adapters."""
        return _names(self.lora_base_model)

    def quantizes(self, network: str) -> bool:
        """Whether a DiT's weights are kept as 8-bit integers."""
        in_full = network in self.trained and network not in self.adapted
        return self.frozen_weights == "int8" and network in ("dit", "dit2") and not in_full

    def streams(self, network: str) -> bool:
        """Whether a DiT's frozen weights wait in host memory for their layer's turn."""
        in_full = network in self.trained and network not in self.adapted
        return self.frozen_memory == "pinned_host" and network in ("dit", "dit2") and not in_full

    @property
    def lora_targets(self) -> tuple[str, ...]:
        return _names(self.lora_target_modules)

    @property
    def init_loras(self) -> dict[str, str]:
        """Files of adapters to begin with, by network."""
        if not self.init_lora or len(self.adapted) == 1:
            return {self.adapted[0]: self.init_lora} if self.init_lora else {}
        pairs = (item.partition("=") for item in _names(self.init_lora))
        return {network: file for network, _, file in pairs}

    @property
    def inputs(self) -> tuple[str, ...]:
        return _names(self.extra_inputs)

    @property
    def policy(self) -> str:
        """The remat policy: the named one, else the one that the original's two switches mean."""
        if self.remat_policy:
            return self.remat_policy
        if not self.use_gradient_checkpointing:
            return "none"
        return "offload" if self.use_gradient_checkpointing_offload else "full"


def parse_steps(text: str) -> tuple[int, int] | None:
    """First and last step of "3-5" or "3"; None of an empty text, or of one that names no steps."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    return (first, last) if 1 <= first <= last else None


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def default_config() -> ml_collections.ConfigDict:
    """The defaults as a ConfigDict, for config files to change."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config()))


T = TypeVar("T")


def parse(values: ml_collections.ConfigDict) -> Config:
    """A validated `Config`.

    Raises:
        UserError: an unknown key, a value of the wrong type, or one that makes no sense, by its name.
    """
    cfg = _build(Config, values.to_dict(), "")
    _check(cfg)
    return cfg


def _build(kind: type[T], values: dict[str, Any], prefix: str) -> T:
    hints = get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise UserError(f"config.{prefix}{unknown[0]}: unknown key, expected one of {', '.join(sorted(hints))}")
    fields = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise UserError(f"config.{prefix}{name}: expected a group of settings, got {value!r}")
            fields[name] = _build(cast(type, hint), value, f"{prefix}{name}.")
        else:
            fields[name] = _typed(value, hint, f"config.{prefix}{name}")
    return kind(**fields)


def _typed(value: Any, hint: Any, where: str) -> Any:
    kinds = get_args(hint) if get_origin(hint) is types.UnionType else (hint,)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if str in kinds and value is None:
        return ""
    if isinstance(value, bool) != (bool in kinds) or not isinstance(value, kinds):
        raise UserError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def _check(cfg: Config) -> None:
    def need(condition: bool, key: str, expected: str) -> None:
        if not condition:
            value = cfg
            for part in key.split("."):
                value = getattr(value, part)
            raise UserError(f"config.{key}: expected {expected}, got {value!r}")

    for key in ("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "train_batch_size",
                "save_steps", "logging_steps", "lora_rank", "num_inference_steps"):  # fmt: skip
        need(getattr(cfg, key) >= 1, key, "a whole number of at least 1")
    for key in ("learning_rate", "weight_decay", "warmup_steps", "sample_every", "seed", "eval_every", "early_stop"):
        need(getattr(cfg, key) >= 0, key, "a number of at least 0")
    need(cfg.max_grad_norm > 0, "max_grad_norm", "a positive number")
    need(cfg.max_steps == -1 or cfg.max_steps >= 1, "max_steps", "at least 1, or -1 for whole epochs")
    need(cfg.model_name == "wan2_2", "model_name", "wan2_2")
    need(cfg.preset in DIT_PRESETS, "preset", f"one of {', '.join(DIT_PRESETS)}")
    need(cfg.lr_scheduler_type in SCHEDULERS, "lr_scheduler_type", f"one of {', '.join(SCHEDULERS)}")
    need(cfg.dtype in DTYPES, "dtype", f"one of {', '.join(DTYPES)}")
    need(cfg.remat_policy in ("", *remat.NAMES), "remat_policy", f"one of {', '.join(remat.NAMES)}, or empty")
    for key in ("frozen_memory", "optimizer_memory"):
        need(getattr(cfg, key) in MEMORIES, key, f"one of {', '.join(MEMORIES)}")
    need(cfg.frozen_weights in ("", "int8"), "frozen_weights", "int8, or empty for the run's dtype")
    need(cfg.vae_caches in remat.VAE_CACHES, "vae_caches", f"one of {', '.join(remat.VAE_CACHES)}")
    need(cfg.vae_caches == "keep" or cfg.policy != "none", "vae_caches", "keep, as nothing is rematerialised")
    need(cfg.attention in ATTENTIONS, "attention", f"one of {', '.join(ATTENTIONS)}")
    need(not cfg.init_lora or bool(cfg.adapted), "init_lora", "empty, as lora_base_model is")
    need(
        not cfg.init_lora or len(cfg.adapted) == 1 or set(cfg.init_loras) <= set(cfg.adapted),
        "init_lora",
        "NETWORK=FILE[,NETWORK=FILE], as several networks have adapters",
    )
    need(bool(cfg.trained), "trainable_models", f"at least one of {', '.join(TRAINABLE)}")
    need(set(_names(cfg.trainable_models)) <= set(TRAINABLE), "trainable_models", f"some of {', '.join(TRAINABLE)}")
    need(set(cfg.adapted) <= {"dit", "dit2"}, "lora_base_model", "some of dit, dit2, or empty")
    need(
        bool(cfg.lora_targets) and set(cfg.lora_targets) <= set(TARGETS),
        "lora_target_modules",
        f"some of {', '.join(TARGETS)}",
    )
    need(0 <= cfg.mid_timestep <= cfg.final_timestep, "mid_timestep", f"0..final_timestep ({cfg.final_timestep})")
    need(
        cfg.final_timestep < cfg.num_inference_steps,
        "final_timestep",
        f"less than num_inference_steps ({cfg.num_inference_steps})",
    )
    need(
        0 <= cfg.min_timestep_boundary <= cfg.max_timestep_boundary <= 1,
        "min_timestep_boundary",
        "0 <= min <= max <= 1",
    )
    need(
        set(cfg.inputs) <= {"input_image", "end_image"} and "input_image" in cfg.inputs,
        "extra_inputs",
        "input_image or input_image,end_image",
    )
    need(cfg.noise.mode in ("fresh", "fixed"), "noise.mode", "fresh or fixed")
    need(cfg.noise.per_sample >= 0, "noise.per_sample", "a number of at least 0")
    need(cfg.noise.prefix_cache in ("auto", "on", "off"), "noise.prefix_cache", "auto, on or off")
    need(cfg.reward.compat in COMPATS, "reward.compat", f"one of {', '.join(COMPATS)}")
    need(cfg.reward.channel_order in ("rgb", "bgr"), "reward.channel_order", "rgb or bgr")
    need(
        cfg.reward.detector_size > 0 and cfg.reward.detector_size % 32 == 0, "reward.detector_size", "a multiple of 32"
    )
    need(cfg.sampling.shift > 0, "sampling.shift", "a positive number")
    need(cfg.data.on_bad_row in ("error", "skip"), "data.on_bad_row", "error or skip")
    need(cfg.data.num_frames >= 5 and cfg.data.num_frames % 4 == 1, "data.num_frames", "4n+1 frames, at least 5")
    need((cfg.data.height > 0) == (cfg.data.width > 0), "data.height", "height and width both, or neither")
    for axis in ("data", "fsdp", "context"):
        need(
            getattr(cfg.mesh, axis) == -1 or getattr(cfg.mesh, axis) >= 1,
            f"mesh.{axis}",
            "at least 1, or -1 for the rest",
        )
    need(dataclasses.astuple(cfg.mesh).count(-1) <= 1, "mesh.data", "at most one axis of -1")
    for key in ("num_samples", "validation_samples"):
        need(getattr(cfg.eval, key) >= 1, f"eval.{key}", "a whole number of at least 1")
    need(0 < cfg.eval.max_motion_loss <= 1, "eval.max_motion_loss", "more than 0 and at most 1")
    need(0 < cfg.eval.max_copying_rise <= 1, "eval.max_copying_rise", "more than 0 and at most 1")
    need(not cfg.early_stop or cfg.eval_every > 0, "early_stop", "0, as eval_every is")
    need(not cfg.profile.steps or cfg.profiled is not None, "profile.steps", "steps such as 3-5, or 3")
    need(
        bool(cfg.eval.judge_model_path) or not cfg.eval.file_name,
        "eval.judge_model_path",
        "a folder, as eval.file_name is set",
    )


def takes_image(cfg: Config) -> bool:
    """Whether the network takes a first frame."""
    shape = DIT_PRESETS[cfg.preset]
    return shape.in_dim > shape.out_dim or shape.first_frame_in_latents


def check_trainable(cfg: Config) -> None:
    """Whether there is a face that training could keep.

    Raises:
        UserError: the network takes no first frame.
    """
    if not takes_image(cfg):
        raise UserError(f"config.preset: expected a network that takes a first frame, got {cfg.preset!r}")


def dumps(cfg: Config) -> str:
    """The configuration as JSON."""
    return json.dumps(dataclasses.asdict(cfg), indent=1, sort_keys=True) + "\n"
