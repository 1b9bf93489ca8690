"""Meshes of this process's virtual devices."""

import jax
import numpy as np
from jax.sharding import AxisType

from rfl_jax.sharding import AXES


def make_mesh(*shape):
    """The first devices as data x fsdp x context."""
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return jax.sharding.Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)
