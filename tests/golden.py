"""Access to the golden reference values, where they are at hand."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

ROOT = Path(os.environ.get("RFL_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))
needs_golden = pytest.mark.skipif(not ROOT.is_dir(), reason="no golden reference values on this machine")


def case(name: str) -> tuple[Path, dict, dict[str, np.ndarray]]:
    """Folder, configuration and tensors of a case."""
    folder = ROOT / name
    io = load_file(folder / "io.safetensors") if (folder / "io.safetensors").exists() else {}
    return folder, json.loads((folder / "config.json").read_text()), io


def relative(got, want) -> float:
    """Relative L2 error."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    return float(np.linalg.norm(got - want) / (np.linalg.norm(want) + 1e-30))


def channels_last(x: np.ndarray) -> np.ndarray:
    """[..., c, t, h, w] -> [..., t, h, w, c]."""
    return np.moveaxis(x, -4, -1)
