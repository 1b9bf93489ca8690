"""All settings of a run, frozen: the original's at the top, what is added in sections; and what follows from them."""

import dataclasses
from typing import Annotated, Literal

from rfl_jax import remat
from rfl_jax.config.sections import (
    DataSection,
    EmaSection,
    EvalSection,
    GuardSection,
    KLSection,
    MeshSection,
    MotionSection,
    NFTSection,
    NoiseSection,
    ProfileSection,
    RealSection,
    RewardSection,
    SamplingSection,
    WindowSection,
)
from rfl_jax.models.lora import TARGETS
from rfl_jax.models.wan.config import DIT_PRESETS
from rfl_jax.rewards.term import TermSettings
from rfl_jax.rewards.terms import FACE
from rfl_jax.settings import (
    Above,
    AtLeast,
    Listed,
    Names,
    OneOf,
    Pairs,
    Within,
    names,
)

TRAINABLE = ("dit", "dit2", "vae", "text_encoder")
BOUNDARIES = Within(0, 1, "0 <= min <= max <= 1")


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
    nft: NFTSection = NFTSection()
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
    def held(self) -> Names:
        """Terms that hold their mean, by name."""
        return tuple(name for name, term in self.other_terms.items() if term.hold)

    @property
    def needs_untrained(self) -> bool:
        """Whether a term compares with the video that the network before training makes of the same noise."""
        return any(term.against == "untrained" for term in self.terms.values())

    @property
    def noises_at_once(self) -> int:
        """Videos of one clip in a batch, of as many noises."""
        return max(1, self.nft.group)

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
