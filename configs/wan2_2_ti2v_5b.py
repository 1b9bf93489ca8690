"""Wan2.2 TI2V-5B: one network for all steps, the first frame written into the latents, sizes in multiples of 32."""

from ml_collections import ConfigDict

from rfl_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.preset = "wan2_2_ti2v_5b"
    config.trainable_models = config.lora_base_model = "dit"
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config
