"""The trained adapters as files that other tools can name."""

import jax
import numpy as np
from etils import epath

from convert.export import adapter_file
from rfl_jax.files import write_whole
from rfl_jax.hosts import is_writer
from rfl_jax.models.weights import flat_arrays
from rfl_jax.networks.faces import licences
from rfl_jax.networks.parts import States
from rfl_jax.networks.terms import term_licences
from rfl_jax.runs import RunFolder, licence_header
from rfl_jax.sharding import replicated
from rfl_jax.training.setup import Run


def export_adapters(run: Run, params: States, folder: RunFolder) -> list[epath.Path]:
    """Writes `<network>_lora.safetensors` for each adapted network, by the original's names of layers.

    Args:
        run: that was trained.
        params: what is handed on of it: the average of the weights where there is one (`TrainState.tuned`).
        folder: of the run.
    """
    files = []
    everywhere = jax.jit(lambda x: x, out_shardings=replicated(run.mesh))
    for name in run.networks.adapted:
        arrays = {k: np.asarray(v) for k, v in flat_arrays(everywhere(params[name])).items()}
        rank = str(run.cfg.lora_rank)
        metadata = {"base_model": run.cfg.preset, "network": name, "rank": rank, "alpha": rank}
        metadata["weights"] = "average" if run.cfg.ema.decay else "raw"
        files.append(folder.adapters(name))
        if is_writer():
            metadata |= licence_header(licences(run.cfg, run.inputs.sources.reward) | term_licences(run.cfg))
            write_whole(files[-1], adapter_file(arrays, "original", metadata))
    return files
