"""The trained adapters as files that other tools can name."""

import jax
import numpy as np
from etils import epath

from convert.export import adapter_file
from rfl_jax.files import write_whole
from rfl_jax.hosts import is_writer
from rfl_jax.models.weights import flat_arrays
from rfl_jax.sharding import replicated
from rfl_jax.training.setup import Setup
from rfl_jax.training.state import TrainState


def export_adapters(run: Setup, state: TrainState, workdir: epath.Path) -> list[epath.Path]:
    """Writes `<network>_lora.safetensors` for each adapted network, by the original's names of layers."""
    files = []
    for name in run.networks.adapted:
        whole = replicated(run.mesh)
        gathered = jax.jit(lambda x: x, out_shardings=whole)(state.params[name])
        arrays = {k: np.asarray(v) for k, v in flat_arrays(gathered).items()}
        metadata = {
            "base_model": run.cfg.preset,
            "network": name,
            "rank": str(run.cfg.lora_rank),
            "alpha": str(run.cfg.lora_rank),
        }
        file = workdir / f"{name}_lora.safetensors"
        files.append(file)
        if is_writer():
            write_whole(file, adapter_file(arrays, "original", metadata))
    return files
