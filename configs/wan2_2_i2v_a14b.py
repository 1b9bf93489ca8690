"""Wan2.2 I2V-A14B, 480x480x81: LoRA of rank 32 on the low-noise expert.

The guards and the window are those that win on the miniature (`rfl_jax.recipes`): 10,620 TFLOP a sample and step under
`save_attention`. With `:original` behind the file's name they are the original's: 13,924 TFLOP. Weights of 28.6 GB (bf16) per expert
are sharded over `mesh.fsdp`. What has no default are the paths.
"""

from ml_collections import ConfigDict

from rfl_jax.config import default_config
from rfl_jax.recipes import with_recipe


def get_config(recipe: str = "guarded") -> ConfigDict:
    config = with_recipe(default_config(), recipe)
    config.preset = "wan2_2_i2v_a14b"
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.use_gradient_checkpointing_offload = True
    return config
