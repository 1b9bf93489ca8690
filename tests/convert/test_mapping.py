"""Key maps: full-size manifests match by shape, both ways; wrong sources are refused whole."""

import json

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from convert import dit, umt5, vae
from convert.export import entries
from convert.mapping import lazy_arrays, plan, unfill, whole
from rfl_jax.errors import UserError
from rfl_jax.models.weights import dotted, flat_shapes, get_arrays
from tests.golden import ROOT, needs_golden

MANIFESTS = {
    "wan22_i2v_A14B_dit": dit.COMPONENT,
    "wan22_t2v_A14B_dit": dit.COMPONENT,
    "wan22_ti2v_5B_dit": dit.COMPONENT,
    "wan21_vae": vae.COMPONENT,
    "wan22_vae": vae.COMPONENT,
    "umt5_xxl_encoder": umt5.COMPONENT,
}


@needs_golden
@pytest.mark.parametrize("name", MANIFESTS)
@pytest.mark.parametrize("variant", ["original", "converted"])
def test_full_size_manifests_match(name, variant):
    component = MANIFESTS[name]
    file = next(
        f for f in ROOT.glob(f"manifests/{name}_*.json") if f.stem.endswith("original") == (variant == "original")
    )
    shapes = {k: tuple(v) for k, v in json.loads(file.read_text())["shapes"].items()}
    rules = component.namings[component.naming(shapes)]
    cfg = component.infer_config(shapes, {})
    target = flat_shapes(nnx.eval_shape(lambda: component.build(cfg)))
    assignments = plan(rules, shapes, target, what=name)
    aliases = {"encoder.embed_tokens.weight"}
    assert {a.key for a in assignments} == shapes.keys() - aliases

    # And back: the same keys and shapes, in either naming, of arrays that are never read.
    arrays = lazy_arrays(assignments, target, lambda key, index: pytest.fail("read"), lambda _: np.dtype(np.float16))
    assert {e.key: e.shape for e in entries(arrays, rules)} == {k: v for k, v in shapes.items() if k not in aliases}
    for naming, other in component.namings.items():
        if naming.split()[-1] == component.naming(shapes).split()[-1] or len(component.namings) == 2:
            exported = {e.key: e.shape for e in entries(arrays, other)}
            assert component.infer_config(exported, {}) == cfg
            plan(other, exported, target, what=naming)

    for key in list(shapes):
        short = {k: v for k, v in shapes.items() if k != key}
        if key not in aliases and len(short) < 300:
            with pytest.raises(UserError, match=r"missing|unexpected|expected"):
                plan(rules, short, target, what=name)


def random_dit(**sizes):
    cfg = dit.DiTConfig(
        in_dim=8, out_dim=4, dim=16, ffn_dim=24, num_heads=2, num_layers=2, freq_dim=8, text_dim=6, text_len=4, **sizes
    )
    return nnx.state(dit.build(cfg)), flat_shapes(dit.build(cfg))


def test_unfill_inverts_fill():
    state, target = random_dit()
    arrays = {dotted(k): np.asarray(v[...]) for k, v in nnx.to_flat_state(state)}
    for rules in dit.NAMINGS.values():
        source = unfill(rules, arrays)
        assignments = plan(rules, {k: v.shape for k, v in source.items()}, target, what="")

        def read(key, index, source=source):
            return source[key][index]

        back = lazy_arrays(assignments, target, read, lambda _: np.dtype(np.float32))
        assert back.keys() == arrays.keys()
        for name, array in back.items():
            assert np.array_equal(whole(array), arrays[name])
            # Any part of it, by as few source rows as there are.
            index = tuple(slice(size // 3, size) for size in array.shape)
            assert np.array_equal(array[index], arrays[name][index])
            assert sum(array[piece].size for piece in array.pieces()) == array.size


def test_all_problems_are_named_at_once():
    state, target = random_dit()
    arrays = {dotted(k): np.asarray(v[...]) for k, v in nnx.to_flat_state(state)}
    shapes = {k: v.shape for k, v in unfill(dit.NAMINGS["original"], arrays).items()}
    del shapes["blocks.1.ffn.0.bias"]
    shapes["extra.weight"] = (3,)
    shapes["head.head.bias"] = (99,)
    with pytest.raises(UserError) as error:
        plan(dit.NAMINGS["original"], shapes, target, what="DiT")
    message = str(error.value)
    assert "extra.weight" in message
    assert "head.head.bias" in message
    assert "blocks.ffn.up.bias of layer 1" in message


def test_shards_with_an_index_equal_one_file(tmp_path):
    state, _ = random_dit()
    arrays = {dotted(k): np.asarray(v[...]) for k, v in nnx.to_flat_state(state)}
    source = unfill(dit.NAMINGS["original"], arrays)
    keys = sorted(source)
    parts = {"a.safetensors": keys[: len(keys) // 2], "b.safetensors": keys[len(keys) // 2 :]}
    for name, part in parts.items():
        save_file({k: source[k] for k in part}, tmp_path / name)
    index = {"weight_map": {k: name for name, part in parts.items() for k in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "one").mkdir()
    save_file(source, tmp_path / "one" / "model.safetensors")
    whole = get_arrays(dit.load(tmp_path / "one", num_heads=2, text_len=4))
    for sources in (tmp_path, tmp_path / "model.safetensors.index.json", [tmp_path / name for name in parts]):
        got = get_arrays(dit.load(sources, num_heads=2, text_len=4))
        assert all(np.array_equal(got[k], whole[k]) for k in whole)
    with pytest.raises(UserError, match="is also in"):
        dit.load([tmp_path / "a.safetensors", tmp_path / "one" / "model.safetensors"])
