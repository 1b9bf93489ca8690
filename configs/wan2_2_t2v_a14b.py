"""Wan2.2 T2V-A14B, for `python -m rfl_jax.sample`: videos of text alone. Reward FL needs a first frame, so it trains
image-to-video networks only; adapters of theirs do not fit this one.
"""

from ml_collections import ConfigDict

from rfl_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.preset = "wan2_2_t2v_a14b"
    config.min_timestep_boundary = 0.875
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config
