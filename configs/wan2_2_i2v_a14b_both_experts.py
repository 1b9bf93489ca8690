"""Wan2.2 I2V-A14B, 480x480x81: adapters of rank 32 on both experts, trained together.

Each update draws four of all eight denoising steps, two of each expert, so that memory for activations is that of
`configs/wan2_2_i2v_a14b.py`. Nothing is frozen before them: both experts are held, 28.6 GB each (bf16), and no step is cached.
"""

from ml_collections import ConfigDict

from rfl_jax.config import default_config
from rfl_jax.recipes import with_recipe


def get_config(recipe: str = "guarded") -> ConfigDict:
    config = with_recipe(default_config(), recipe)
    config.preset = "wan2_2_i2v_a14b"
    config.trainable_models = config.lora_base_model = "dit,dit2"
    config.mid_timestep = 0
    config.window.mode = "random"
    config.window.steps = 4
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.use_gradient_checkpointing_offload = True
    return config
