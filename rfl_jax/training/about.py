"""With what a run is trained: the content of its run.json."""

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import jax

from rfl_jax.chips import compiler_options
from rfl_jax.fingerprint import fingerprint
from rfl_jax.networks.faces import detector_file, embedder_file, licences
from rfl_jax.networks.terms import term_keys, term_licences
from rfl_jax.training.setup import Run

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def describe(run: Run) -> dict[str, Any]:
    """Versions, devices, weights by file and fingerprint, licences of the networks that reward and judge, how much is trained on how much, and
    whether the "average" of what trains or its "raw" weights are judged and handed on. Of terms of the reward what their
    prepared arrays are known by.
    """
    sources = run.inputs.sources
    files = {name: sources.files(name) for name in ("dit", "dit2", "text_encoder", "vae")} | {
        "detector": [detector_file(sources.reward)],
        "embedder": [embedder_file(sources.reward)],
    }
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "devices": {
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
            "mesh": dict(run.mesh.shape),
            "compiler_options": compiler_options(run.mesh, run.cfg.compiler_options),
        },
        "weights": {name: {file: fingerprint(file) for file in paths} for name, paths in files.items() if paths},
        "licences": licences(run.cfg, sources.reward) | term_licences(run.cfg),
        "trained_parameters": {
            name: sum(leaf.size for leaf in jax.tree.leaves(params)) for name, params in run.state.params.items()
        },
        "tuned": run.state.weights,
        "clips": {"trained_on": len(run.inputs.clips.training), "held_out": len(run.inputs.clips.held_out)},
        "steps": run.inputs.steps,
        **({"terms": terms} if (terms := term_keys(run.cfg)) else {}),
    }
