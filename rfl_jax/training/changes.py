"""What changed between two starts of a run: settings that may and those that may not, and the rows of its csv."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from rfl_jax.config import Config, plain
from rfl_jax.errors import UserError
from rfl_jax.runs import RunFolder, holds_checkpoint

SHOWN = 10  # rows that a line names at most

# What the shapes and the meaning of a checkpoint's arrays depend on.
TRAINED = ("preset", "model_name", "trainable_models", "lora_base_model", "lora_target_modules", "lora_rank")

# Settings that stay while a run goes on. With others it would be another run, whose metrics could not be compared.
FIXED = (
    *TRAINED,
    *("seed", "train_batch_size", "noise.mode"),
    *("extra_inputs", "data.num_frames", "data.max_pixels", "data.height", "data.width"),
    *("max_timestep_boundary", "min_timestep_boundary", "num_inference_steps", "mid_timestep", "final_timestep"),
    *("window.mode", "window.steps", "window.list", "window.stop_input_gradient", "window.direct", "nft.group"),
    *("sampling.shift", "sampling.guidance_scale", "sampling.negative_prompt", "sampling.guidance_gradient"),
    *("reward.compat", "reward.channel_order", "reward.detector_size", "reward.use_first_frame", "reward.frames"),
    "reward.people",
)

# Settings that may change from one start to the next; the change is told.
MAY_CHANGE = (
    # How long and how fast it learns, and from what.
    *("learning_rate", "lr_scheduler_type", "weight_decay", "warmup_steps", "max_grad_norm", "max_bad_steps"),
    *("num_train_epochs", "max_steps", "early_stop", "reward.weight", "reward.kl_weight", "kl.every"),
    *(
        "kl.target",
        "reward.ceiling",
        "reward.terms",
        "real.weight",
        "real.every",
        "motion.weight",
        "motion.copy_weight",
    ),
    "noise.per_sample",
    *("file_name", "data.on_bad_row", "data.cache_dir", "noise.prefix_cache"),
    # Where weights come from. Those that a run begins with are not looked at again.
    *("model_paths", "model_id_with_origin_paths", "tokenizer_path", "reward_model_path"),
    *("init_lora", "resume_from_checkpoint"),
    # What is written, shown and judged.
    *("save_steps", "logging_steps", "sample_every", "eval_every", "wandb_project", "profile.steps"),
    *("eval.file_name", "eval.judge_model_path", "eval.num_samples", "eval.validation_samples"),
    *(
        "eval.max_motion_loss",
        "eval.max_copying_rise",
        "eval.max_face_loss",
        "eval.max_term_loss",
        "guard.on_alarm",
        "guard.raise_kl",
        "guard.max_falls",
    ),
    # An average that is switched on begins at the weights as they are then.
    "ema.decay",
    # How it is computed. Videos of an update are compared when the checkpoint is read.
    *("per_device_train_batch_size", "gradient_accumulation_steps", "mesh.data", "mesh.fsdp", "mesh.context"),
    *("use_gradient_checkpointing", "use_gradient_checkpointing_offload", "remat_policy", "vae_caches"),
    *("dtype", "frozen_weights", "frozen_activations", "frozen_memory", "optimizer_memory"),
    *("attention", "compiler_options"),
)


def changed_settings(before: Mapping[str, Any], cfg: Config) -> dict[str, tuple[Any, Any]]:
    """Settings of which a run's config.json has another value than a configuration: both, by key."""
    old, new = dict(_flat(before)), dict(_flat(plain(cfg)))
    return {key: (old[key], value) for key, value in new.items() if key in old and old[key] != value}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def check_settings(cfg: Config, folder: RunFolder) -> str:
    """Compares a configuration with that of the run which it goes on with: the folder's own, else the one that
    `resume_from_checkpoint` names.

    Returns:
        What changed since the folder's run was last started, in one line; empty if nothing did.

    Raises:
        UserError: settings changed that have to stay, by their names.
    """
    if holds_checkpoint(folder.checkpoints):
        begun, fixed = folder, FIXED
    else:
        begun, fixed = RunFolder(epath.Path(cfg.resume_from_checkpoint)), TRAINED
    if not begun.exists() or (begun != folder and not cfg.resume_from_checkpoint):
        return ""
    changes = changed_settings(begun.read_config(), cfg)
    refused = sorted(key for key in changes if key in fixed)
    if refused:
        told = "; ".join(f"config.{key}: {changes[key][1]!r}, expected {changes[key][0]!r}" for key in refused)
        way = ", or another --workdir" if begun == folder else ""
        if way and not set(refused) & set(TRAINED):
            way += f", where --config.resume_from_checkpoint={folder} begins with what is trained here"
        raise UserError(f"{told}, as the run in {begun} trains with{way}")
    if begun != folder or not changes:
        return ""
    told = ", ".join(f"{key} from {old!r} to {new!r}" for key, (old, new) in sorted(changes.items()))
    return f"{folder} goes on with changed settings: {told}"


@dataclasses.dataclass(frozen=True)
class RowsChange:
    """How the clips of a run differ from those that its checkpoint was trained on.

    Attributes:
        text: in words.
        moved: whether a place in the old order means other clips in the new one.
    """

    text: str
    moved: bool


def compare_rows(before: Sequence[str], now: Sequence[str], numbers: Sequence[int]) -> RowsChange | None:
    """Compares clips in the order of their rows; None if they are the same.

    Args:
        before: each clip's name in the cache, which its video, its prompt and the networks that prepare it decide.
        now: likewise.
        numbers: the rows of `now`.
    """
    if list(before) == list(now):
        return None
    gone, new = Counter(before) - Counter(now), Counter(now) - Counter(before)
    if len(before) == len(now) and all(a == b or (a in gone and b in new) for a, b in zip(before, now, strict=True)):
        edited = [number for a, b, number in zip(before, now, numbers, strict=True) if a != b]
        if len(edited) == len(now):
            return RowsChange("all rows have another video or prompt, or are prepared by other networks", moved=False)
        return RowsChange(_count(edited, "edited"), moved=False)
    added, still = _divide(now, new)
    removed, were = _divide(before, gone)
    parts = []
    if added:
        parts.append(_count([numbers[i] for i in added], "added"))
    if removed:
        parts.append(f"{len(removed)} removed")
    if were != still:
        parts.append("others reordered" if parts else "rows reordered")
    return RowsChange(", ".join(parts), moved=True)


def _divide(names: Sequence[str], surplus: Counter[str]) -> tuple[list[int], list[str]]:
    """The places of surplus names, the last of each, and the other names in their order."""
    left = surplus.copy()
    places = []
    for i in reversed(range(len(names))):
        if left[names[i]] > 0:
            left[names[i]] -= 1
            places.append(i)
    taken = set(places)
    return places[::-1], [name for i, name in enumerate(names) if i not in taken]


def _count(rows: Sequence[int], what: str) -> str:
    """How many rows, and the first of them by number."""
    shown = ", ".join(map(str, rows[:SHOWN])) + (" ..." if len(rows) > SHOWN else "")
    return f"{len(rows)} row{'s' if len(rows) > 1 else ''} {what} ({shown})"
