"""One table of networks: what is planned is what is loaded, whatever trains and in whatever precision it comes."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from convert import dit, umt5, vae
from convert.mapping import unfill
from convert.readers import DTYPES
from rfl_jax.miniature.world import ASSETS, DIT_FILES, T5_FILE, VAE_FILE
from rfl_jax.models.umt5 import UMT5Config, UMT5Encoder
from rfl_jax.models.wan.config import DIT_PRESETS, VAE_PRESETS
from rfl_jax.models.wan.dit import DiT
from rfl_jax.models.wan.vae import VAE
from rfl_jax.models.weights import get_arrays
from rfl_jax.networks.table import NETWORKS
from rfl_jax.planning.abstract import abstract_networks, find_files
from rfl_jax.sharding import RULES
from rfl_jax.sources import experts_of, find_sources
from rfl_jax.training.setup import load_networks
from tests.devices import make_mesh

# The 5B's wiring at small width.
TINY_5B = dataclasses.replace(
    DIT_PRESETS["wan2_2_ti2v_5b"], dim=48, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=32, text_dim=24, text_len=16
)


def random_arrays(module):
    return {name: np.asarray(x) for name, x in get_arrays(module).items()}


def networks_of(preset):
    """Every network of a preset: its rules of names, its arrays, and the sizes that weights do not tell."""
    if preset == "mini":
        files = {**DIT_FILES, "text_encoder": f"umt5/{T5_FILE}", "vae": f"vae/{VAE_FILE}"}
        loads = {"dit": dit, "dit2": dit, "text_encoder": umt5, "vae": vae}
        arrays = {name: random_arrays(loads[name].load(ASSETS / file)) for name, file in files.items()}
        beside = {name: json.loads((ASSETS / file).with_name("config.json").read_text())
                  for name, file in files.items() if (ASSETS / file).with_name("config.json").exists()}  # fmt: skip
        vae_naming = "original 2.1"
    else:
        sizes = dataclasses.replace(VAE_PRESETS["wan2_2"], dim=4, decoder_dim=6)
        text = UMT5Config(40, 24, 24, 32, num_heads=2, num_layers=1)
        arrays = {
            "dit": random_arrays(DiT(TINY_5B, rngs=nnx.Rngs(0))),
            "text_encoder": random_arrays(UMT5Encoder(text, rngs=nnx.Rngs(0))),
            "vae": random_arrays(VAE(sizes, rngs=nnx.Rngs(0))),
        }
        beside = {"dit": {"num_heads": 2, "text_len": 16}}
        vae_naming = "original 2.2"
    rules = {"text_encoder": umt5.NAMINGS["original"], "vae": vae.NAMINGS[vae_naming]}
    return {name: (rules.get(name, dit.NAMINGS["original"]), x, beside.get(name)) for name, x in arrays.items()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """`model_paths` of a preset in a precision."""
    made = {}

    def make(preset, precision):
        if (preset, precision) not in made:
            folder = tmp_path_factory.mktemp(f"{preset}_{precision}")
            for name, (rules, arrays, beside) in networks_of(preset).items():
                (folder / name).mkdir()
                stored = {key: x.astype(DTYPES[precision]) for key, x in arrays.items()}
                save_file(unfill(rules, stored), folder / name / "model.safetensors")
                if beside:
                    (folder / name / "config.json").write_text(json.dumps(beside))
            order = [name for name in ("dit", "dit2", "text_encoder", "vae") if (folder / name).is_dir()]
            made[preset, precision] = json.dumps([str(folder / name) for name in order])
        return made[preset, precision]

    return make


TRAINED = {
    "adapters": {},
    "adapters and int8": {"frozen_weights": "int8"},
    "an expert": {"lora_base_model": ""},
    "an expert, the rest int8": {"lora_base_model": "", "frozen_weights": "int8"},
    "both, one by adapters": {"trainable_models": "dit,dit2", "mid_timestep": 2},
    "decoder and text encoder": {"lora_base_model": "", "trainable_models": "vae,text_encoder"},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("precision", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("preset", ["mini", "tiny_5b"])
def test_planned_weights_are_those_of_the_loaded_run(settings, sources, monkeypatch, preset, trained, precision, dtype):
    monkeypatch.setitem(DIT_PRESETS, "tiny_5b", TINY_5B)
    changes = dict(TRAINED[trained])
    if preset == "tiny_5b":
        if "dit2" in changes.get("trainable_models", ""):
            pytest.skip("one network serves all steps")
        changes = {"trainable_models": "dit", "lora_base_model": "dit"} | changes
    cfg = settings(preset=preset, dtype=dtype, model_paths=sources(preset, precision), **changes)
    mesh = make_mesh(1, 2, 2)
    experts = ["dit", "dit2"][: experts_of(cfg)]
    _, *loaded = load_networks(cfg, find_sources(cfg, experts=len(experts)), experts, mesh)
    _, *planned = abstract_networks(cfg, mesh, experts, find_files(cfg))
    assert jax.tree.structure(planned) == jax.tree.structure(loaded)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(planned), jax.tree.leaves(loaded), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), jax.tree_util.keystr(path)


def test_what_trains_in_full_keeps_a_reference_in_the_sources_precision(settings, sources):
    cfg = settings(dtype="bfloat16", model_paths=sources("mini", "F32"), lora_base_model="")
    _, params, frozen = abstract_networks(cfg, make_mesh(1, 1, 1), ["dit2"], find_files(cfg))
    kernel = frozen.reference["dit2"]["blocks"]["ffn"]["up"]["kernel"]
    assert kernel.dtype == params["dit2"]["blocks"]["ffn"]["up"]["kernel"].dtype == np.float32
    # So does the published checkpoint, where no weights are named.
    published = dataclasses.replace(cfg, preset="wan2_2_i2v_a14b", model_paths="")
    _, _, frozen = abstract_networks(published, make_mesh(1, 1, 1), ["dit2"], find_files(published))
    assert {x.dtype for x in jax.tree.leaves(frozen.reference)} == {np.dtype(np.float32)}


def test_every_row_has_a_sharding_table_that_exists():
    assert {row.sharding for row in NETWORKS.values()} == set(RULES)
