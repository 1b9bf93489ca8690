"""Key maps: full-size manifests match by shape, both ways; wrong sources are refused whole."""

import json

import numpy as np
import pytest
from flax import nnx

from convert import dit, umt5, vae
from convert.mapping import fill, flat_shapes, plan, unfill
from rfl_jax.errors import UserError
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
    arrays = {".".join(map(str, k)): np.asarray(v[...]) for k, v in nnx.to_flat_state(state)}
    for rules in dit.NAMINGS.values():
        source = unfill(rules, arrays)
        back = fill(plan(rules, {k: v.shape for k, v in source.items()}, target, what=""), target, source.__getitem__)
        assert back.keys() == arrays.keys()
        assert all(np.array_equal(back[k], arrays[k]) for k in arrays)


def test_all_problems_are_named_at_once():
    state, target = random_dit()
    arrays = {".".join(map(str, k)): np.asarray(v[...]) for k, v in nnx.to_flat_state(state)}
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
