"""Face networks from ONNX: every variation of the family agrees with ONNX Runtime; other graphs are refused."""

import dataclasses
import re

import jax
import numpy as np
import onnx
import onnxruntime
import pytest
from flax import nnx

from convert import arcface, scrfd, store
from convert.onnx_export import export_iresnet, export_scrfd
from convert.verify import compare
from rfl_jax.errors import UserError
from rfl_jax.models.weights import fill, get_arrays
from rfl_jax.rewards.arcface import IResNet, IResNetConfig
from rfl_jax.rewards.scrfd import SCRFD, ConvSpec, family, mobilenet, resnet

TOWER = (ConvSpec(12), ConvSpec(8))
DETECTORS = {
    "resnet": resnet((4, 4, 8), (8, 8, 12, 16), (1, 2, 1, 2), 8, TOWER),
    "resnet, first stage changes width": resnet((4, 4, 8), (12, 8, 12, 16), (2, 1, 1, 1), 8, TOWER),
    "mobilenet": mobilenet((4, 8, 12, 16, 20), (1, 2, 1, 1), 8, (ConvSpec(8, groups=8), ConvSpec(12, kernel=1))),
    "group norm in the heads": resnet((4, 4, 8), (8, 8, 12, 16), (1, 1, 1, 1), 8, (ConvSpec(12, norm_groups=4),)),
    "10g": family("10g"),
}


def errors(kind, files, directory):
    """What `--verify` prints of each output."""
    return [float(re.search(r"Runtime (\S+) of", line)[1]) for line in compare(kind, files, directory)]


def randomised(model, seed):
    """No weight at its initial value."""
    rng = np.random.default_rng(seed)
    return fill(model, {k: v + 0.1 * rng.normal(size=v.shape).astype(np.float32) for k, v in get_arrays(model).items()})


def run(file, x):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"input.1": np.ascontiguousarray(x.transpose(0, 3, 1, 2))})


VARIATIONS = [(True, False, None), (False, True, 64), (False, False, None)]
# The full-width detector is checked once.
DETECTOR_CASES = [(n, *v) for n in DETECTORS for v in (VARIATIONS[:1] if n == "10g" else VARIATIONS)]


@pytest.mark.parametrize(("name", "folded", "batch_axis", "size"), DETECTOR_CASES)
def test_detectors(tmp_path, name, folded, batch_axis, size):
    file = tmp_path / "det.onnx"
    export_scrfd(
        randomised(SCRFD(DETECTORS[name], rngs=nnx.Rngs(1)), 2),
        file,
        folded=folded,
        batch_axis=batch_axis,
        input_size=size,
    )
    model = scrfd.load(file)
    assert model.cfg == DETECTORS[name]
    x = np.random.default_rng(3).normal(size=(1, 64, 64, 3)).astype(np.float32)
    out = [o.reshape(-1, o.shape[-1]) for o in run(file, x)]
    raw = jax.jit(model)(x)
    for got, want in zip((raw.scores, raw.boxes, raw.kps), (out[:3], out[3:6], out[6:]), strict=True):
        want = np.concatenate(want)
        np.testing.assert_allclose(np.asarray(got).reshape(want.shape), want, atol=2e-4 * np.abs(want).max())


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("layers", [(2, 2, 2, 2), (1, 3, 2, 1)])
def test_embedders(tmp_path, folded, layers):
    cfg = IResNetConfig(widths=(4, 6, 8, 10), layers=layers, stem=4, embedding=12)
    file = tmp_path / "arc.onnx"
    export_iresnet(randomised(IResNet(cfg, rngs=nnx.Rngs(1)), 2), file, folded=folded)
    model = arcface.load(file)
    assert model.cfg == cfg
    x = np.random.default_rng(3).uniform(-1, 1, (2, 112, 112, 3)).astype(np.float32)
    want = run(file, x)[0]
    np.testing.assert_allclose(jax.jit(model)(x), want, atol=1e-4 * np.abs(want).max())


def test_other_graphs_are_refused_at_the_node_that_differs(tmp_path):
    file = tmp_path / "det.onnx"
    cfg = dataclasses.replace(DETECTORS["resnet"])
    export_scrfd(SCRFD(cfg, rngs=nnx.Rngs(1)), file)
    with pytest.raises(UserError, match=r"node 1 \(Relu.*expected PRelu"):
        arcface.load(file)
    model = onnx.load(file)
    sigmoid = next(n for n in model.graph.node if n.op_type == "Relu")
    sigmoid.op_type = "Elu"
    onnx.save(model, file)
    with pytest.raises(UserError, match=r"node 1 \(Elu.*expected Relu"):
        scrfd.load(file)
    file.write_bytes(b"not onnx at all")
    with pytest.raises(UserError, match=r"det\.onnx: expected an ONNX model"):
        scrfd.load(file)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, bad):
    file = tmp_path / "det.onnx"
    export_scrfd(SCRFD(DETECTORS["resnet"], rngs=nnx.Rngs(1)), file)
    model = onnx.load(file)
    weight = next(i for i in model.graph.initializer if len(i.dims) == 4)
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0, 0, 1, 1] = bad
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, file)
    with pytest.raises(UserError, match=rf"det\.onnx: {weight.name} holds NaN or infinity, expected finite numbers"):
        scrfd.load(file)


def test_verification_compares_with_onnx_runtime(tmp_path):
    file = tmp_path / "det.onnx"
    export_scrfd(randomised(SCRFD(DETECTORS["resnet"], rngs=nnx.Rngs(1)), 2), file, input_size=64)
    cfg, arrays = scrfd.convert(file)
    store.save(str(tmp_path / "right"), "scrfd", cfg, arrays)
    assert max(errors("scrfd", [str(file)], str(tmp_path / "right"))) < 1e-4
    arrays["lateral.0.bias"] = arrays["lateral.0.bias"] + 1
    store.save(str(tmp_path / "wrong"), "scrfd", cfg, arrays)
    assert max(errors("scrfd", [str(file)], str(tmp_path / "wrong"))) > 1e-3
