"""The public embedders, as PyTorch exports them: recognised by their graphs, the same numbers as ONNX Runtime."""

import jax
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from convert import arcface, store
from convert.onnx_graph import Graph
from convert.verify import compare
from rfl_jax.errors import UserError
from rfl_jax.rewards.arcface import IResNetConfig
from rfl_jax.rewards.mobilefacenet import BottleneckSpec, ConvPReLUSpec, MobileFaceNetConfig

pytest.importorskip("torch")
from tests.convert.torch_embedders import export, iresnet, mobilefacenet

PUBLISHED = {
    (2, 2, 2, 2): "r18", (3, 4, 6, 3): "r34", (3, 4, 14, 3): "r50", (3, 13, 30, 3): "r100", (6, 26, 60, 6): "r200"
}  # fmt: skip


def agrees(file, model, batch):
    """Ours and ONNX Runtime's embeddings of random crops."""
    x = np.random.default_rng(3).uniform(-1, 1, (batch, 112, 112, 3)).astype(np.float32)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    want = session.run(None, {"input.1": np.ascontiguousarray(x.transpose(0, 3, 1, 2))})[0]
    np.testing.assert_allclose(jax.jit(model)(x), want, atol=1e-4 * np.abs(want).max())


def table(blocks, scale, unit):
    """The published table of layers."""
    c = unit * scale
    stem = ConvPReLUSpec(c, 3, 2, 1)
    second = [ConvPReLUSpec(c, 3, 1, unit)] if blocks[0] == 1 else [BottleneckSpec(c, 2 * unit, 1, True)] * blocks[0]
    rest = [
        BottleneckSpec(c, 2 * unit, 2, False), *[BottleneckSpec(c, 2 * unit, 1, True)] * blocks[1],
        BottleneckSpec(2 * c, 4 * unit, 2, False), *[BottleneckSpec(2 * c, 4 * unit, 1, True)] * blocks[2],
        BottleneckSpec(2 * c, 8 * unit, 2, False), *[BottleneckSpec(2 * c, 4 * unit, 1, True)] * blocks[3],
    ]  # fmt: skip
    return (stem, *second, *rest, ConvPReLUSpec(8 * unit, 1, 1, 1))


@pytest.mark.parametrize(
    ("blocks", "scale", "folded", "free_batch"),
    [((1, 1, 2, 1), 2, True, False), ((1, 1, 1, 1), 2, False, True), ((2, 1, 1, 2), 4, True, True)],
)
def test_mobilefacenet(tmp_path, blocks, scale, folded, free_batch):
    file = tmp_path / "w600k_mbf.onnx"
    export(mobilefacenet(blocks, scale, unit=4, embedding=12), file, folded=folded, free_batch=free_batch)
    model = arcface.load(file)
    assert model.cfg == MobileFaceNetConfig(table(blocks, scale, 4), 12)
    agrees(file, model, 2 if free_batch else 1)


def test_mobilefacenet_at_the_size_of_the_published_file(tmp_path):
    file = tmp_path / "w600k_mbf.onnx"
    export(mobilefacenet((2, 8, 12, 4), 2), file, folded=False)
    # buffalo_s' own file has 13,616,099 bytes, of which names take more or less by version of the exporter.
    assert file.stat().st_size == pytest.approx(13_616_099, rel=2e-3)
    cfg, arrays = arcface.convert(file)
    assert cfg == MobileFaceNetConfig(table((2, 8, 12, 4), 2, 64), 512)
    assert store.count(arrays) == 3_329_664


@pytest.mark.parametrize("layers", PUBLISHED, ids=PUBLISHED.values())
def test_iresnet_of_any_depth(tmp_path, layers):
    file = tmp_path / "arc.onnx"
    export(iresnet(layers, unit=2, embedding=6), file)
    assert arcface.walk(Graph(file))[0] == IResNetConfig((2, 4, 8, 16), layers, 2, 6)


@pytest.mark.parametrize(("folded", "free_batch"), [(True, False), (False, True)])
def test_iresnet(tmp_path, folded, free_batch):
    file = tmp_path / "arc.onnx"
    export(iresnet((1, 2, 1, 1), unit=4, embedding=12), file, folded=folded, free_batch=free_batch)
    agrees(file, arcface.load(file), 2 if free_batch else 1)


def test_a_converted_mobilefacenet_is_the_one_that_was_converted(tmp_path):
    file, folder = tmp_path / "w600k_mbf.onnx", str(tmp_path / "converted")
    export(mobilefacenet((1, 1, 1, 1), unit=4, embedding=12), file)
    cfg, arrays = arcface.convert(file)
    store.save(folder, "arcface", cfg, arrays)
    assert store.describe("arcface", [folder]) == cfg
    (line,) = compare("arcface", [str(file)], folder)
    assert float(line.split("Runtime ")[1].split()[0]) < 1e-4


def changed_graph(file, change):
    model = onnx.load(file)
    node = change(model.graph)
    onnx.save(model, file)
    return node


def nodes(graph, op):
    return [n for n in graph.node if n.op_type == op]


def relu_inside(graph):
    node = nodes(graph, "PRelu")[3]
    node.op_type = "Relu"
    del node.input[1]
    return f"(Relu '{node.name}') differs, expected PRelu"


def set_attribute(node, name, value):
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def dilated(graph):
    node = nodes(graph, "Conv")[1]
    set_attribute(node, "dilations", [2, 2])
    return f"(Conv '{node.name}') differs, expected a square convolution padded by half its kernel"


def map_not_covered(graph):
    node = nodes(graph, "Conv")[-1]
    weight = next(i for i in graph.initializer if i.name == node.input[1])
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[:, :, :5, :5].copy(), weight.name))
    return f"(Conv '{node.name}') differs, expected a kernel that covers the 7x7 map, found 5"


def squared(graph):
    last = graph.node[-1]
    graph.node.append(helper.make_node("Mul", [last.output[0]] * 2, ["squared"], "square"))
    graph.output[0].name = "squared"
    return "(Mul 'square') differs, expected the embedding as the output"


def sum_of_something_else(graph):
    node = nodes(graph, "Add")[1]
    node.op_type = "Mul"
    return "differs, expected Conv, or Conv and Add at the start of a bottleneck"


def strided_expansion(graph):
    # The first convolution of the first bottleneck.
    node = nodes(graph, "Conv")[2]
    set_attribute(node, "strides", [2, 2])
    return f"(Conv '{node.name}') differs, expected pointwise convolutions at both ends of a bottleneck"


CHANGES = [relu_inside, dilated, map_not_covered, squared, sum_of_something_else, strided_expansion]


@pytest.mark.parametrize("change", CHANGES)
def test_a_graph_that_differs_is_refused_by_its_node(tmp_path, change):
    file = tmp_path / "w600k_mbf.onnx"
    export(mobilefacenet((1, 1, 1, 1), unit=4, embedding=12), file)
    expected = changed_graph(file, change)
    with pytest.raises(UserError) as refusal:
        arcface.convert(file)
    assert str(refusal.value).startswith(f"{file}: node ")
    assert expected in str(refusal.value)


def test_an_iresnet_with_another_stride_is_refused_by_its_node(tmp_path):
    file = tmp_path / "arc.onnx"
    export(iresnet((1, 1, 1, 1), unit=4, embedding=12), file)

    def stem_strides(graph):
        set_attribute(nodes(graph, "Conv")[0], "strides", [2, 2])
        return "(Conv '/0/Conv') differs, expected stride 1"

    expected = changed_graph(file, stem_strides)
    with pytest.raises(UserError) as refusal:
        arcface.convert(file)
    assert expected in str(refusal.value)
