"""The trained adapters as files that other tools can name."""

import numpy as np
from etils import epath
from safetensors.numpy import save

from convert import lora
from rfl_jax.models.weights import flat_arrays
from rfl_jax.training.setup import Setup
from rfl_jax.training.state import TrainState


def export_adapters(run: Setup, state: TrainState, workdir: epath.Path) -> list[epath.Path]:
    """Writes `<network>_lora.safetensors` for each adapted network, in peft's naming of the original layers."""
    files = []
    for name in run.networks.adapted:
        arrays = {k: np.asarray(v) for k, v in flat_arrays(state.params[name]).items()}
        metadata = {
            "base_model": run.cfg.preset,
            "network": name,
            "rank": str(run.cfg.lora_rank),
            "alpha": str(run.cfg.lora_rank),
        }
        file = workdir / f"{name}_lora.safetensors"
        aside = file.with_name(f".{file.name}.tmp")
        aside.write_bytes(save(lora.names(arrays), metadata))
        aside.replace(file)
        files.append(file)
    return files
