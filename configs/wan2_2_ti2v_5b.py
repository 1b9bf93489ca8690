"""Wan2.2 TI2V-5B: one network for all steps, the first frame written into the latents, sizes in multiples of 32.

`configs/wan2_2_ti2v_5b.py:original` rewards the face alone as the original does, see `rfl_jax.recipes`.
"""

from ml_collections import ConfigDict

from rfl_jax.config import default_config
from rfl_jax.recipes import with_recipe


def get_config(recipe: str = "guarded") -> ConfigDict:
    config = with_recipe(default_config(), recipe)
    config.preset = "wan2_2_ti2v_5b"
    config.trainable_models = config.lora_base_model = "dit"
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config
