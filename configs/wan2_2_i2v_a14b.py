"""Wan2.2 I2V-A14B, 480x480x81: the original's recipe, LoRA of rank 32 on the low-noise expert.

16,980 TFLOP a sample and step; weights of 28.6 GB (bf16) per expert are sharded over `mesh.fsdp`. The defaults of
`rfl_jax.config` are this recipe; what has no default are the paths.
"""

from ml_collections import ConfigDict

from rfl_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.preset = "wan2_2_i2v_a14b"
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.use_gradient_checkpointing_offload = True
    return config
