"""A converted face network against ONNX Runtime on the same random input."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime

from convert import store
from rfl_jax.models.weights import set_arrays
from rfl_jax.rewards.arcface import CROP

DETECTOR_SIZE = 320  # used where the graph leaves its input size free


def errors(kind: str, source: str, cfg: Any, arrays: dict[str, np.ndarray], *, seed: int = 0) -> dict[str, float]:
    """Largest absolute difference of each output, relative to the output's largest value.

    Args:
        kind: "arcface" or "scrfd".
        source: the ONNX file.
        cfg, arrays: what was converted from it.
        seed: of the input.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # graphs that fix their output shapes warn at other input sizes
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    side = entry.shape[-1]
    size = CROP if kind == "arcface" else side if isinstance(side, int) else DETECTOR_SIZE
    x = np.random.default_rng(seed).uniform(-1, 1, (1, size, size, 3)).astype(np.float32)
    outputs = session.run(None, {entry.name: np.ascontiguousarray(x.transpose(0, 3, 1, 2))})
    theirs = [np.asarray(o) for o in outputs]
    model = set_arrays(store.build(kind, cfg), {name: jnp.asarray(a) for name, a in arrays.items()})
    ours = jax.jit(model)(x)
    if kind == "arcface":
        pairs = {"embedding": (ours, theirs[0])}
    else:
        parts = [np.concatenate([o.reshape(-1, o.shape[-1]) for o in theirs[i : i + 3]]) for i in (0, 3, 6)]
        pairs = dict(
            zip(("scores", "boxes", "kps"), zip((ours.scores, ours.boxes, ours.kps), parts, strict=True), strict=True)
        )
    return {
        name: float(np.abs(np.asarray(a).reshape(b.shape) - b).max() / np.abs(b).max())
        for name, (a, b) in pairs.items()
    }
