"""What ties settings to each other: a configuration that breaks a rule is refused by name."""

import dataclasses
from collections.abc import Callable

from rfl_jax.config.config import BOUNDARIES, TRAINABLE, Config
from rfl_jax.rewards.term import Term
from rfl_jax.rewards.terms import FACE, find_term
from rfl_jax.settings import Names


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
    named = cfg.terms.items()
    found = (name for name, x in named if x.against != "real" and find_term(x.type).prepare is Term.prepare)
    return next(found, "")


def _cannot_hold(cfg: Config) -> str:
    """The first term that is to hold a mean which it does not tell; empty if none is."""
    return next((name for name, x in cfg.terms.items() if x.hold and not find_term(x.type).holds), "")


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
        ("nft.group",),
        lambda cfg: cfg.nft.group != 1,
        "0, or at least 2, as a clip's videos are compared",
    ),
    Rule(
        ("nft.group", "window.steps", "window.list", "window.mode"),
        lambda cfg: not cfg.nft.group or max(cfg.window.steps, len(cfg.window.list)) == 1,
        "0, unless window.steps is 1 or window.list one number",
    ),
    Rule(
        ("nft.group", "window.direct", "window.stop_input_gradient"),
        lambda cfg: not (cfg.nft.group and (cfg.window.direct or cfg.window.stop_input_gradient)),
        "0, as no gradient goes through the rewards then, which window.direct and window.stop_input_gradient are about",
    ),
    Rule(
        ("nft.group", "trainable_models", "lora_base_model"),
        lambda cfg: not cfg.nft.group or (cfg.trains_dit and "vae" not in cfg.trained),
        "0, as only DiTs and the text encoder can train so",
    ),
    Rule(
        ("nft.group", "noise.mode", "noise.per_sample"),
        lambda cfg: not cfg.nft.group or (cfg.noise.mode == "fresh" and not 0 < cfg.noise.per_sample < cfg.nft.group),
        "0, unless noise.mode is fresh and noise.per_sample 0 or no less than nft.group",
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
        ("sampling.guidance_gradient", "sampling.guidance_scale"),
        lambda cfg: cfg.sampling.guidance_gradient == "both" or cfg.sampling.guidance_scale != 1,
        "both, as sampling.guidance_scale is 1",
    ),
    Rule(
        ("reward.terms",),
        lambda cfg: not _cannot_hold(cfg),
        lambda cfg: f"hold false in the row {_cannot_hold(cfg)}, whose term tells no drift",
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
