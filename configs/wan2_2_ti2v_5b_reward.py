"""Reward training of Wan2.2 TI2V-5B as it is published: not distilled, so 20 guided steps, gradient through one of the last ten.

Guidance of 5 with the authors' negative prompt, and their shift (`wan/configs/wan_ti2v_5B.py`, `shared_config.py`; they sample in 50
steps). The prediction without the prompt has no gradient, which spares its backward pass. For a distilled 5B, or with the adapters of
one merged (`--lora` of `convert dit`), `configs/wan2_2_ti2v_5b.py` takes eight steps without guidance.
"""

# Chinese commas are meant.
# ruff: noqa: RUF001

from ml_collections import ConfigDict

from rfl_jax.config import default_config
from rfl_jax.recipes import with_recipe

NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


def get_config(recipe: str = "guarded") -> ConfigDict:
    config = with_recipe(default_config(), recipe)
    config.preset = "wan2_2_ti2v_5b"
    config.trainable_models = config.lora_base_model = "dit"
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.num_inference_steps = 20
    config.mid_timestep, config.final_timestep = 10, 19
    config.sampling.shift = 5.0
    config.sampling.guidance_scale = 5.0
    config.sampling.guidance_gradient = "conditional"
    config.sampling.negative_prompt = NEGATIVE
    return config
