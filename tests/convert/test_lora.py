"""Adapters in every naming that circulates, merged and exported: other libraries compute the same with them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from convert import dit, export, lora, store
from convert.__main__ import main as convert_main
from convert.mapping import unfill, whole
from rfl_jax.errors import UserError
from rfl_jax.export import main as export_main
from rfl_jax.miniature.world import ASSETS, DIT_FILES
from rfl_jax.models.lora import LoraConfig, add_lora
from rfl_jax.models.wan.config import DiTConfig
from rfl_jax.models.weights import dotted, fill, flat_shapes, get_arrays
from rfl_jax.runs import RunFolder
from rfl_jax.training.export import export_adapters
from rfl_jax.training.loop import train
from tests import COMPILER
from tests.golden import relative
from tests.runs import open_run

ROOT = Path(__file__).parents[2]
CFG = DiTConfig(
    in_dim=20, out_dim=8, dim=48, ffn_dim=56, num_heads=2, num_layers=2, freq_dim=32, text_dim=24, text_len=10
)
HINTS = {"num_heads": 2, "text_len": 10}
TARGETS = ["q", "k", "v", "o", "ffn.0", "ffn.2"]
RANK = 3


@pytest.fixture(scope="module")
def base():
    model = dit.build(CFG)
    rng = np.random.default_rng(1)
    return fill(model, {k: v + 0.1 * rng.normal(size=v.shape).astype(np.float32) for k, v in get_arrays(model).items()})


@pytest.fixture(scope="module")
def trained(base):
    """Adapters by our paths, none of them zero."""
    rng = np.random.default_rng(2)
    model = add_lora(nnx.clone(base), rank=RANK, targets=TARGETS, key=jax.random.key(0))
    state = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
    return {dotted(path): 0.3 * rng.normal(size=x.shape).astype(np.float32) for path, x in state}


@pytest.fixture(scope="module")
def source(base, tmp_path_factory):
    """The base in both namings."""
    arrays = {name: np.asarray(x) for name, x in get_arrays(base).items()}
    folder = tmp_path_factory.mktemp("base")
    for naming, rules in dit.NAMINGS.items():
        save_file(unfill(rules, arrays), folder / f"{naming}.safetensors")
    return folder


def adapted(base, trained):
    model = add_lora(nnx.clone(base), rank=RANK, targets=TARGETS, key=jax.random.key(0))
    return fill(model, trained, partial=True)


def inputs():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(1, 2, 4, 4, CFG.in_dim)).astype(np.float32)
    context = rng.normal(size=(1, CFG.text_len, CFG.text_dim)).astype(np.float32)
    return jnp.asarray(x), jnp.array([600.0]), jnp.asarray(context)


def rename(trained, naming, pattern, halves=("A", "B")):
    named = lora.named(trained, dit.NAMINGS[naming], "{module}|{half}")
    out = {}
    for key, x in named.items():
        module, half = key.split("|")
        out[pattern.format(module=module, under=module.replace(".", "_"), half=halves["AB".index(half)])] = x
    return out


def with_alpha(tensors, alpha):
    scaled = dict(tensors)
    for key in tensors:
        if "lora_down" in key:
            scaled[key.split(".lora_down")[0] + ".alpha"] = np.array(alpha, np.float32)
    return scaled


NAMINGS = {
    "peft": ("original", "base_model.model.{module}.lora_{half}.weight", ("A", "B")),
    "peft of diffusers' layers": ("diffusers", "base_model.model.{module}.lora_{half}.weight", ("A", "B")),
    "diffusers": ("diffusers", "transformer.{module}.lora_{half}.weight", ("A", "B")),
    "lightx2v": ("original", "diffusion_model.{module}.lora_{half}.weight", ("down", "up")),
    "kohya": ("original", "lora_unet_{under}.lora_{half}.weight", ("down", "up")),
    "the original trainer": ("original", "{module}.lora_{half}.default.weight", ("A", "B")),
    "bare": ("original", "{module}.lora_{half}.weight", ("A", "B")),
}


@pytest.mark.parametrize("name", NAMINGS)
@pytest.mark.parametrize("into", ["original", "diffusers"])
def test_every_naming_merges_to_the_same(name, into, base, trained, source, tmp_path):
    naming, pattern, halves = NAMINGS[name]
    tensors = rename(trained, naming, pattern, halves)
    alpha = 6.0 if "down" in halves else float(RANK)
    if "down" in halves:
        tensors = with_alpha(tensors, alpha)
    save_file(tensors, tmp_path / "lora.safetensors")
    strength = 0.7
    _, arrays = dit.COMPONENT.convert(
        [source / f"{into}.safetensors"], loras=[(str(tmp_path / "lora.safetensors"), strength)], **HINTS
    )
    want = {key: np.asarray(x) for key, x in get_arrays(base).items()}
    for key in [key for key in trained if key.endswith("lora_a")]:
        product = trained[key] @ trained[key[:-1] + "b"]
        want[key.removesuffix("lora_a") + "kernel"] = want[key.removesuffix("lora_a") + "kernel"] + (
            strength * alpha / RANK * product
        )
    for key, array in arrays.items():
        np.testing.assert_allclose(whole(array), want[key], atol=1e-5, err_msg=key)
        # A device's part of it, too.
        index = tuple(slice(size // 2, size) for size in array.shape)
        np.testing.assert_allclose(array[index], want[key][index], atol=1e-5, err_msg=key)


def test_differences_of_weights_biases_and_modulation_are_added(base, source, tmp_path):
    rng = np.random.default_rng(4)
    tensors = load_file(source / "original.safetensors")
    changes = {
        "blocks.1.self_attn.norm_k.diff": "blocks.1.self_attn.norm_k.weight",
        "blocks.0.cross_attn.q.diff_b": "blocks.0.cross_attn.q.bias",
        "blocks.0.norm3.diff": "blocks.0.norm3.weight",
        "blocks.0.norm3.diff_b": "blocks.0.norm3.bias",
        "blocks.1.diff_m": "blocks.1.modulation",
        "head.diff_m": "head.modulation",
        "patch_embedding.diff": "patch_embedding.weight",
        "text_embedding.0.diff_b": "text_embedding.0.bias",
    }
    found = {
        f"diffusion_model.{key}": rng.normal(size=tensors[k].shape).astype(np.float32) for key, k in changes.items()
    }
    down, up = rng.normal(size=(2, 20, 1, 2, 2)), rng.normal(size=(48, 2, 1, 1, 1))
    found["diffusion_model.time_embedding.0.lora_down.weight"] = rng.normal(size=(2, 32)).astype(np.float32)
    found["diffusion_model.time_embedding.0.lora_up.weight"] = rng.normal(size=(48, 2)).astype(np.float32)
    want = {key: x.copy() for key, x in tensors.items()}
    for key, changed in changes.items():
        want[changed] = want[changed] + found[f"diffusion_model.{key}"]
    want["time_embedding.0.weight"] += (
        found["diffusion_model.time_embedding.0.lora_up.weight"]
        @ found["diffusion_model.time_embedding.0.lora_down.weight"]
    )
    save_file(found, tmp_path / "lora.safetensors")
    save_file(want, tmp_path / "want.safetensors")
    # A second file at another strength: convolutions have factors with axes of one.
    conv = {
        "diffusion_model.patch_embedding.lora_down.weight": down.astype(np.float32),
        "diffusion_model.patch_embedding.lora_up.weight": up.astype(np.float32),
    }
    save_file(conv, tmp_path / "conv.safetensors")
    loras = [(str(tmp_path / "lora.safetensors"), 1.0), (str(tmp_path / "conv.safetensors"), -0.5)]
    want["patch_embedding.weight"] = want["patch_embedding.weight"] - 0.5 * np.einsum(
        "or,rithw->oithw", up[:, :, 0, 0, 0], down
    ).astype(np.float32)
    save_file(want, tmp_path / "want.safetensors")
    _, merged = dit.COMPONENT.convert([source / "original.safetensors"], loras=loras, **HINTS)
    _, expected = dit.COMPONENT.convert([tmp_path / "want.safetensors"], **HINTS)
    for key, array in merged.items():
        np.testing.assert_allclose(whole(array), whole(expected[key]), atol=1e-5, err_msg=key)


def test_every_key_is_applied_or_refused_by_name(base, trained, tmp_path):
    shapes = flat_shapes(base)
    good = rename(trained, *NAMINGS["lightx2v"])
    file = tmp_path / "bad.safetensors"

    def refused(change):
        tensors = dict(good)
        change(tensors)
        save_file(tensors, file)
        with pytest.raises(UserError) as error:
            lora.Lora(file, dit.NAMINGS, shapes)
        return str(error.value)

    key = "diffusion_model.blocks.0.self_attn.q.lora_down.weight"
    assert "unexpected tensor extra" in refused(lambda t: t.update(extra=np.zeros(1, np.float32)))
    message = refused(lambda t: t.update({"diffusion_model.blocks.9.ffn.0.diff_b": np.zeros(56, np.float32)}))
    assert "blocks.9.ffn.0.diff_b belongs to no tensor of this network" in message
    assert "lora_up.weight has no partner" in refused(lambda t: t.pop(key))
    message = refused(lambda t: t.update({key: np.zeros((RANK, 7), np.float32)}))
    assert f"{key} [3, 7]" in message
    assert "do not make [48, 48]" in message
    assert "alpha has no factors" in refused(
        lambda t: t.update({"lora_unet_head_head.alpha": np.zeros((), np.float32)})
    )
    with pytest.raises(UserError, match="adapters are of the dit, not of vae"):
        store.convert("vae", ["x"], loras=[("y", 1.0)])


def test_strengths_are_parsed():
    assert lora.parse_strength("a/b.safetensors") == ("a/b.safetensors", 1.0)
    assert lora.parse_strength("a.safetensors:0.8") == ("a.safetensors", 0.8)
    assert lora.parse_strength("hub:org/name:file.safetensors:-1") == ("hub:org/name:file.safetensors", -1.0)


@pytest.mark.parametrize("kind", export.LORA_FORMATS)
def test_exports_come_back_and_go_out_byte_for_byte(kind, base, trained, tmp_path):
    metadata = {"rank": str(RANK)}
    first = export.adapter_file(trained, kind, metadata)
    (tmp_path / "first.safetensors").write_bytes(first)
    found = lora.Lora(tmp_path / "first.safetensors", dit.NAMINGS, flat_shapes(base))
    back = lora.adapters(found, TARGETS, CFG.num_layers)
    assert back.keys() == trained.keys()
    assert all(np.array_equal(back[key], trained[key]) for key in trained)
    assert export.adapter_file(back, kind, metadata) == first


def theirs(source):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=CFG.num_heads, attention_head_dim=CFG.head_dim, in_channels=CFG.in_dim, out_channels=CFG.out_dim,
        text_dim=CFG.text_dim, freq_dim=CFG.freq_dim, ffn_dim=CFG.ffn_dim, num_layers=CFG.num_layers, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", eps=CFG.eps,
    )  # fmt: skip
    state = load_file(source / "diffusers.safetensors")
    model.load_state_dict({key: torch.from_numpy(x) for key, x in state.items()}, strict=True)
    return model


def velocity(model):
    import torch

    x, t, context = inputs()
    with torch.no_grad():
        out = model(
            torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy()),
            torch.from_numpy(np.array(t)),
            torch.from_numpy(np.array(context)),
            return_dict=False,
        )[0]
    return np.moveaxis(out.numpy(), 1, -1)


@pytest.mark.parametrize("kind", ["diffusers", "comfyui"])
def test_diffusers_loads_the_export(kind, base, trained, source, tmp_path):
    model = theirs(source)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    file.write_bytes(export.adapter_file(trained, kind, {"format": "pt"}))
    if kind == "diffusers":
        model.load_lora_adapter(str(file), prefix="transformer")
    else:
        from diffusers import WanPipeline

        state = WanPipeline.lora_state_dict(str(file))
        model.load_lora_adapter(state, prefix="transformer")
    assert relative(adapted(base, trained)(*inputs()), velocity(model)) < 1e-4
    assert relative(base(*inputs()), velocity(model)) > 1e-2


def test_peft_loads_the_export(base, trained, source, tmp_path):
    peft = pytest.importorskip("peft")
    (tmp_path / "adapter_model.safetensors").write_bytes(export.adapter_file(trained, "peft", {}))
    (tmp_path / "adapter_config.json").write_text(json.dumps(export.adapter_config(trained)))
    model = peft.PeftModel.from_pretrained(theirs(source), str(tmp_path))
    assert relative(adapted(base, trained)(*inputs()), velocity(model)) < 1e-4


def test_merged_exports_are_the_network_with_its_adapters(base, trained, source, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    metadata = {"step": "7"}
    want = adapted(base, trained)(*inputs())
    converted = tmp_path / "converted"
    cfg, arrays = store.convert("dit", [str(source / "original.safetensors")], **HINTS)
    store.save(str(converted), "dit", cfg, arrays)
    for naming, start in (("original", str(converted)), ("diffusers", str(source / "diffusers.safetensors"))):
        _, merged = export.whole_network(trained, [start])
        tensors = export.entries(merged, dit.NAMINGS[naming])
        (file,) = export.write_safetensors(tmp_path / f"{naming}.safetensors", tensors, metadata)
        with safe_open(file, framework="numpy") as opened:
            assert opened.metadata() == metadata
        again = dit.load(file, **HINTS)
        assert relative(again(*inputs()), want) < 1e-5
    model = theirs(source)
    state = load_file(tmp_path / "diffusers.safetensors")
    model.load_state_dict({key: torch.from_numpy(x) for key, x in state.items()}, strict=True)
    assert relative(velocity(model), want) < 1e-4

    # Large ones come as shards with an index.
    monkeypatch.setattr(export, "SHARD_BYTES", 60_000)
    files = export.write_safetensors(tmp_path / "sharded.safetensors", tensors, metadata)
    assert len(files) > 3
    assert files[-1].name == "sharded.safetensors.index.json"
    index = json.loads(files[-1].read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors)
    assert relative(dit.load(files[-1], **HINTS)(*inputs()), want) < 1e-5
    assert all(file.stat().st_size < 80_000 for file in files)


def command(monkeypatch, main, *arguments):
    monkeypatch.setattr(sys, "argv", ["a command", *map(str, arguments)])
    main()


def convert(*arguments):
    environment = os.environ | {"XLA_FLAGS": COMPILER}
    command = [sys.executable, "-m", "convert", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_a_runs_adapters_are_exported_and_trained_on(monkeypatch, settings, tmp_path):
    cfg = settings(save_steps=1)
    folder = RunFolder(epath.Path(tmp_path / "first"))
    run = open_run(cfg, folder.path)
    state = train(run, folder).state

    def export_first(*arguments):
        command(monkeypatch, export_main, "--workdir", tmp_path / "first", *arguments)

    (automatic,) = export_adapters(run, state.params, folder)
    export_first("--format", "original", "--dst", tmp_path / "a.safetensors")
    exported = load_file(tmp_path / "a.safetensors")
    same = load_file(automatic)
    assert exported.keys() == same.keys()
    assert all(np.array_equal(exported[key], same[key]) for key in same)
    with safe_open(tmp_path / "a.safetensors", framework="numpy") as opened:
        metadata = opened.metadata()
    line = json.loads((tmp_path / "first" / "metrics.jsonl").read_text().splitlines()[-1])
    assert metadata["base_model"] == "mini"
    assert (metadata["network"], metadata["step"], metadata["rank"], metadata["alpha"]) == ("dit2", "2", "4", "4")
    assert metadata["weights"] == "raw"
    assert float(metadata["face_score"]) == pytest.approx(line["face_score"], abs=1e-6)
    assert len(metadata["config_sha256"]) == 64
    # Whose faces it was trained against goes with it, from run.json.
    told = {key: metadata[key] for key in metadata if key.startswith("licence_")}
    assert told.keys() == {"licence_detector", "licence_embedder", "licence_judge"}
    assert told["licence_embedder"] == "the miniature's embedder: Apache-2.0 (NOTICE)"
    licences = json.loads((tmp_path / "first" / "run.json").read_text())["licences"]
    assert told == {f"licence_{network}": line for network, line in licences.items()}
    with safe_open(automatic, framework="numpy") as opened:
        assert told.items() <= opened.metadata().items()
    export_first("--step", 1, "--format", "diffusers", "--dst", tmp_path / "b.safetensors")
    earlier = load_file(tmp_path / "b.safetensors")
    assert not np.array_equal(
        earlier["transformer.blocks.0.attn1.to_q.lora_B.weight"], exported["blocks.0.self_attn.q.lora_B.weight"]
    )
    # The converter has the same command, which refuses in the same way.
    arguments = ("export", "--workdir", tmp_path / "first", "--step", 1, "--dst", tmp_path / "again.safetensors")
    done, again = convert(*arguments), convert(*arguments)
    assert done.returncode == 0, done.stderr
    same = load_file(tmp_path / "again.safetensors")
    assert same.keys() == earlier.keys()
    assert all(np.array_equal(same[key], earlier[key]) for key in earlier)
    assert again.returncode == 2
    assert again.stderr == f"export: --dst: {arguments[-1]}: exists already, expected a new file\n"
    export_first("--format", "peft", "--dst", tmp_path / "p" / "c.safetensors")
    assert json.loads((tmp_path / "p" / "adapter_config.json").read_text())["r"] == 4

    # The whole network with them is the network that was trained.
    export_first("--merged", "--format", "original", "--dtype", "float32", "--dst", tmp_path / "merged.safetensors")
    _, arrays = store.convert("dit", [str(tmp_path / "merged.safetensors")], num_heads=4, text_len=32)
    _, before = store.convert("dit", [str(ASSETS / DIT_FILES["dit2"])], dtype="float32")
    a, b = exported["blocks.0.ffn.0.lora_A.weight"], exported["blocks.0.ffn.0.lora_B.weight"]
    change = whole(arrays["blocks.ffn.up.kernel"])[0] - whole(before["blocks.ffn.up.kernel"])[0]
    # The source is float16: so is what the product was added to.
    np.testing.assert_allclose(change, (b @ a).T, atol=2e-3)

    for bad, message in (
        (["--step", 9, "--dst", tmp_path / "x.safetensors"], "has no checkpoint 9, expected one of"),
        (["--network", "dit", "--dst", tmp_path / "x.safetensors"], "--network: dit: the run trained dit2"),
        (
            ["--raw", "--dst", tmp_path / "x.safetensors"],
            r"--raw: .*checkpoints/2 holds no average \(config\.ema\.decay",
        ),
        (["--dst", tmp_path / "a.safetensors"], "exists already"),
        (["--dst", tmp_path / "x.bin"], "ends in .safetensors"),
        (["--merged", "--format", "comfyui", "--dst", tmp_path / "x.safetensors"], "whole weights have the naming"),
    ):
        with pytest.raises(UserError, match=message):
            export_first(*bad)
    assert not (tmp_path / "x.safetensors").exists()

    # What was exported is where another run begins, as a file or converted.
    command(monkeypatch, convert_main, "lora", "--src", tmp_path / "b.safetensors", "--dst", tmp_path / "folder")
    assert store.describe("lora", [str(tmp_path / "folder")]) == LoraConfig("mini", 4)
    second, other = (
        open_run(settings(init_lora=str(tmp_path / name)), tmp_path / "second") for name in ("b.safetensors", "folder")
    )
    flat, same = ({dotted(p): x[...] for p, x in nnx.to_flat_state(r.state.params["dit2"])} for r in (second, other))
    assert all(np.array_equal(flat[key], same[key]) for key in flat)
    named = lora.named(
        {k: np.asarray(x) for k, x in flat.items()}, dit.NAMINGS["diffusers"], "transformer.{module}.lora_{half}.weight"
    )
    assert all(np.array_equal(named[key], earlier[key]) for key in earlier)
    assert named.keys() == earlier.keys()
    with pytest.raises(UserError, match=r"config\.lora_rank: 2, but .* has rank 4"):
        open_run(settings(init_lora=str(tmp_path / "b.safetensors"), lora_rank=2), tmp_path / "third")
    with pytest.raises(UserError, match=r"adapts blocks\.\S+, which config\.lora_target_modules does not name"):
        open_run(settings(init_lora=str(tmp_path / "b.safetensors"), lora_target_modules="q"), tmp_path / "third")
