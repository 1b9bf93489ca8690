"""ArcFace's embedders from ONNX, matched by walking the graph: IResNet of any depth (antelopev2's and AuraFace's
glintr100.onnx, buffalo_l's w600k_r50.onnx) here, MobileFaceNet in its own module.
"""

from typing import Any

import numpy as np

from convert import mobilefacenet
from convert.component import OnnxComponent
from convert.onnx_graph import Graph, stride
from rfl_jax.rewards.arcface import CROP, IResNetConfig
from rfl_jax.rewards.embedder import make_embedder

STAGES = 4


def walk(graph: Graph) -> tuple[Any, dict[str, np.ndarray]]:
    """Sizes and weights of an embedder's graph: an IResNet's where its first layer leads to a batch norm of its own.

    Raises:
        UserError: naming the first node that differs.
    """
    stem = graph.next(graph.input, "Conv")
    prelu = graph.next(graph.convolution(stem)[2], "PRelu")
    normed = any(node.op == "BatchNormalization" for node in graph.consumers(prelu.output))
    return walk_iresnet(graph) if normed else mobilefacenet.walk(graph)


def walk_iresnet(graph: Graph) -> tuple[IResNetConfig, dict[str, np.ndarray]]:
    """Sizes and weights of an IResNet graph.

    Raises:
        UserError: naming the first node that differs.
    """
    arrays: dict[str, np.ndarray] = {}

    def conv(node, name: str, step: int = 1) -> str:  # noqa: ANN001
        if stride(node) != step:
            raise graph.refuse(node, f"stride {step}")
        arrays[f"{name}.kernel"], arrays[f"{name}.bias"], out = graph.convolution(node)
        return out

    def affine(node, name: str) -> str:  # noqa: ANN001
        scale, bias = graph.affine(node)
        arrays[f"{name}.scale"], arrays[f"{name}.bias"] = scale.astype(np.float32), bias.astype(np.float32)
        return node.output

    def prelu(tensor: str, name: str) -> str:
        node = graph.next(tensor, "PRelu")
        arrays[f"{name}.slope"] = graph.constant(node, 1).reshape(-1).astype(np.float32)
        return node.output

    x = prelu(conv(graph.next(graph.input, "Conv"), "conv1"), "prelu")
    stem = arrays["conv1.bias"].size
    widths: list[int] = []
    layers: list[int] = []
    index = 0
    while len(consumers := graph.consumers(x)) == 2:
        name = f"blocks.{index}"
        norm = next((n for n in consumers if n.op == "BatchNormalization"), None)
        other = next((n for n in consumers if n is not norm), None)
        if norm is None or other is None:
            raise graph.refuse(consumers[0], "BatchNormalization at the start of a block")
        h = conv(graph.next(affine(norm, f"{name}.norm"), "Conv"), f"{name}.conv1")
        last = graph.next(prelu(h, f"{name}.prelu"), "Conv")
        if other.op == "Conv" and (stride(last) != 2 or stride(other) != 2):
            raise graph.refuse(last, "stride 2 in the first block of a stage")
        h = conv(last, f"{name}.conv2", stride(other))
        add = graph.next(h, "Add")
        if other.op == "Conv":
            shortcut = conv(other, f"{name}.shortcut", 2)
            widths.append(arrays[f"{name}.conv2.bias"].size)
            layers.append(0)
        else:
            shortcut = x
        if {h, shortcut} != set(add.inputs) or not layers:
            raise graph.refuse(add, "the sum of a block and its shortcut")
        layers[-1] += 1
        x = add.output
        index += 1
    if len(layers) != STAGES:
        raise graph.refuse(consumers[0] if consumers else None, f"{STAGES} stages, found {len(layers)}")

    x = affine(graph.next(x, "BatchNormalization"), "norm")
    x = graph.next(x, "Flatten", "Reshape").output
    kernel, bias = graph.embedding(x)
    side = CROP // 2**STAGES
    if kernel.shape[1] != widths[-1] * side * side:
        features = f"{widths[-1] * side * side} features of a {CROP}x{CROP} crop"
        raise graph.refuse(graph.producer(x), f"{features}, found {kernel.shape[1]}")
    # The graph flattens channels first, the module channels last.
    kernel = kernel.reshape(-1, widths[-1], side, side).transpose(2, 3, 1, 0).reshape(-1, bias.size)
    arrays["fc.kernel"], arrays["fc.bias"] = kernel.astype(np.float32), bias.astype(np.float32)
    return IResNetConfig(tuple(widths), tuple(layers), stem, bias.size), arrays


COMPONENT = OnnxComponent(make_embedder, walk)
convert, load = COMPONENT.convert, COMPONENT.load
