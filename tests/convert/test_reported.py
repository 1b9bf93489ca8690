"""Files rebuilt from public bug reports, by the real command."""

import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import roll
from convert import store
from convert.__main__ import main
from convert.mapping import whole
from rfl_jax.config import parse
from rfl_jax.errors import UserError
from rfl_jax.miniature.world import ASSETS, DIT_FILES

CASES = Path(__file__).parents[3] / "shared" / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="no cases from bug reports on this machine")
DIT = ASSETS / DIT_FILES["dit2"]


def converted(monkeypatch, folder, kind, *arguments):
    monkeypatch.setattr(sys, "argv", ["convert", kind, "--dst", str(folder / kind), *map(str, arguments)])
    main()
    return store.restore(str(folder / kind))


@pytest.mark.parametrize(
    ("name", "scale", "expert"),
    [
        ("diffusers_header_alpha.safetensors", 4.0, ""),
        ("foreign_sidecar", 1.0, ""),
        ("double_underscore.safetensors", None, ""),
        ("both_experts.safetensors", 1.0, "high"),
        ("both_experts.safetensors", 1.0, "low"),
    ],
)
def test_adapters_are_merged_as_their_authors_meant(name, scale, expert, tmp_path, monkeypatch):
    file = CASES / "lora" / name
    arguments = ["--src", DIT, "--dtype", "float32", "--lora", file, *(["--expert", expert] if expert else [])]
    merged = converted(monkeypatch, tmp_path, "dit", *arguments)["blocks.self_attn.q.kernel"][0]
    before = whole(store.convert("dit", [str(DIT)], dtype="float32")[1]["blocks.self_attn.q.kernel"])[0]
    tensors = load_file(file / "lora.safetensors" if file.is_dir() else file)
    wanted = {"high": "transformer.", "low": "transformer_2."}.get(expert, "")
    keys = [key for key in sorted(tensors) if key.startswith(wanted) and "0" in key and "q" in key]
    down = next(tensors[key] for key in keys if key.endswith(("to_q.lora_A.weight", "q.lora_A.weight", "down.weight")))
    up = next(tensors[key] for key in keys if key.endswith(("to_q.lora_B.weight", "q.lora_B.weight", "up.weight")))
    if scale is None:
        scale = next(float(tensors[key]) for key in keys if key.endswith("alpha")) / down.shape[0]
    np.testing.assert_allclose(merged - before, scale * (up @ down).T, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("both_experts.safetensors", "adapters of both experts .* choose with --expert high or --expert low"),
        ("nan.safetensors", r"nan\.safetensors: diffusion_model\.blocks\.0\.self_attn\.q\.lora_[AB]\.weight holds NaN"),
    ],
)
def test_adapters_that_are_doubtful_are_refused_by_name(name, message, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=message):
        converted(monkeypatch, tmp_path, "dit", "--src", DIT, "--lora", CASES / "lora" / name)
    assert not list(tmp_path.iterdir())


def test_an_encoder_with_a_tokenizer_inside_is_converted(tmp_path, monkeypatch):
    arrays = converted(monkeypatch, tmp_path, "umt5", "--src", CASES / "umt5")
    assert all(np.isfinite(x.astype(np.float32)).all() for x in arrays.values())


def test_settings_at_the_top_of_the_originals_yaml_count():
    cfg = parse(roll.get_config(str(CASES / "roll_yaml" / "minimal.yaml")))
    assert (cfg.seed, cfg.train_batch_size, cfg.max_grad_norm, cfg.learning_rate) == (1, 16, 0.3, 2.5e-6)
