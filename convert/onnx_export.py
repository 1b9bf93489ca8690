"""Writes our face networks as ONNX, the way insightface's exporters leave them.

The miniature's networks are published in this form, and the converters are tested on its variations against ONNX
Runtime: batch norms folded or not, outputs with or without a batch axis, fixed or free input size.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rfl_jax.models.conv import SquareConv
from rfl_jax.rewards.arcface import CROP, Affine, IResNet
from rfl_jax.rewards.scrfd import ANCHORS, KEYPOINTS, SCRFD, STRIDES, BasicBlock, ConvReLU, MaxPool

OPSET = 11
EPSILON = 1e-5


class _Builder:
    def __init__(self, *, folded: bool, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.folded = folded
        self.rng = np.random.default_rng(seed)

    def constant(self, value: np.ndarray) -> str:
        name = f"w{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], f"{op}_{len(self.nodes)}", **attributes))
        return name

    def norm(self, x: str, scale: np.ndarray, bias: np.ndarray) -> str:
        """A batch norm that multiplies by `scale` and adds `bias`, with statistics that are not trivial."""
        n = scale.size
        mean, variance = self.rng.normal(size=n) * 0.1, self.rng.uniform(0.5, 1.5, n)
        gamma, beta = scale * np.sqrt(variance + EPSILON), bias + mean * scale
        parameters = [self.constant(v.astype(np.float32)) for v in (gamma, beta, mean, variance)]
        return self.add("BatchNormalization", x, *parameters, epsilon=EPSILON)

    def conv(self, x: str, conv: SquareConv) -> str:
        kernel, bias = np.asarray(conv.kernel[...]).transpose(3, 2, 0, 1), np.asarray(conv.bias[...])
        size = kernel.shape[-1]
        attributes = {
            "kernel_shape": [size] * 2,
            "strides": [conv.stride] * 2,
            "pads": [size // 2] * 4,
            "group": conv.groups,
        }
        if self.folded:
            return self.add("Conv", x, self.constant(kernel), self.constant(bias), **attributes)
        scale = self.rng.uniform(0.5, 1.5, bias.size).astype(np.float32)
        out = self.add("Conv", x, self.constant(kernel / scale[:, None, None, None]), **attributes)
        return self.norm(out, scale, bias)

    def affine(self, x: str, affine: Affine) -> str:
        return self.norm(x, np.asarray(affine.scale[...]), np.asarray(affine.bias[...]))

    def save(self, file: Path, shape: list[int | str], outputs: dict[str, list[int | str]]) -> None:
        graph = helper.make_graph(
            self.nodes,
            "network",
            [helper.make_tensor_value_info("input.1", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, s) for name, s in outputs.items()],
            self.initializers,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
        onnx.checker.check_model(model)
        file.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(model, file)


def export_iresnet(model: IResNet, file: Path, *, folded: bool = True) -> None:
    """Writes an embedder with input [N, 3, 112, 112]."""
    b = _Builder(folded=folded)

    def prelu(x: str, slope: Any) -> str:
        return b.add("PRelu", x, b.constant(np.asarray(slope)[:, None, None]))

    x = prelu(b.conv("input.1", model.conv1), model.prelu.slope[...])
    for block in model.blocks:
        h = b.conv(b.affine(x, block.norm), block.conv1)
        h = b.conv(prelu(h, block.prelu.slope[...]), block.conv2)
        x = b.add("Add", h, x if block.shortcut is None else b.conv(x, block.shortcut))
    x = b.add("Flatten", b.affine(x, model.norm), axis=1)
    c, side = model.cfg.widths[-1], CROP // 2 ** len(model.cfg.widths)
    kernel = np.asarray(model.fc.kernel[...]).reshape(side, side, c, -1).transpose(3, 2, 0, 1)
    bias = np.zeros(model.cfg.embedding) if model.fc.bias is None else np.asarray(model.fc.bias[...])
    scale = b.rng.uniform(0.5, 1.5, bias.size).astype(np.float32)
    weights = b.constant(kernel.reshape(bias.size, -1) / scale[:, None])
    x = b.add("Gemm", x, weights, b.constant(np.zeros(bias.size, np.float32)), transB=1)
    x = b.norm(x, scale, bias)
    b.save(file, ["N", 3, CROP, CROP], {x: ["N", model.cfg.embedding]})


def export_scrfd(
    model: SCRFD, file: Path, *, folded: bool = True, batch_axis: bool = False, input_size: int | None = None
) -> None:
    """Writes a detector with nine outputs: scores, boxes and keypoints of strides 8, 16 and 32.

    Args:
        folded: batch norms folded into the convolutions.
        batch_axis: outputs [1, n, c] instead of [n, c].
        input_size: fixed side of the square input; None leaves it free.
    """
    b = _Builder(folded=folded)

    def conv_relu(x: str, layer: ConvReLU) -> str:
        x = b.conv(x, layer.conv)
        if (norm := layer.norm) is not None:
            shape = b.add("Shape", x)
            x = b.add("Reshape", x, b.constant(np.array([0, norm.groups, -1])))
            ones, zeros = np.ones(norm.groups, np.float32), np.zeros(norm.groups, np.float32)
            x = b.add("InstanceNormalization", x, b.constant(ones), b.constant(zeros), epsilon=EPSILON)
            x = b.add("Reshape", x, shape)
            x = b.add("Mul", x, b.constant(np.asarray(norm.scale[...])[:, None, None]))
            x = b.add("Add", x, b.constant(np.asarray(norm.bias[...])[:, None, None]))
        return b.add("Relu", x)

    def block(x: str, layer: BasicBlock) -> str:
        h = b.conv(b.add("Relu", b.conv(x, layer.conv1)), layer.conv2)
        if layer.shortcut is not None:
            if layer.stride > 1:
                size = [layer.stride] * 2
                x = b.add("AveragePool", x, kernel_shape=size, strides=size, ceil_mode=1)
            x = b.conv(x, layer.shortcut)
        return b.add("Relu", b.add("Add", h, x))

    def upsample(x: str) -> str:
        empty = b.constant(np.zeros(0, np.float32))
        scales = b.constant(np.array([1, 1, 2, 2], np.float32))
        return b.add(
            "Resize",
            x,
            empty,
            scales,
            mode="nearest",
            nearest_mode="floor",
            coordinate_transformation_mode="asymmetric",
        )

    x, features = "input.1", []
    for i, layer in enumerate(model.backbone, 1):
        if isinstance(layer, ConvReLU):
            x = conv_relu(x, layer)
        elif isinstance(layer, MaxPool):
            s = layer.spec
            x = b.add("MaxPool", x, kernel_shape=[s.kernel] * 2, strides=[s.stride] * 2, pads=[s.padding] * 4)
        else:
            x = block(x, layer)
        if i in model.cfg.taps:
            features.append(x)
    down = [b.conv(f, conv) for f, conv in zip(features, model.lateral, strict=True)]
    for i in (1, 0):
        down[i] = b.add("Add", down[i], upsample(down[i + 1]))
    up = [b.conv(x, conv) for x, conv in zip(down, model.fpn, strict=True)]
    for i in (0, 1):
        up[i + 1] = b.add("Add", up[i + 1], b.conv(up[i], model.downsample[i]))
    up = [up[0], b.conv(up[1], model.pafpn[0]), b.conv(up[2], model.pafpn[1])]

    outputs: list[list[str]] = [[], [], []]
    widths = (1, 4, 2 * KEYPOINTS)
    for x, head in zip(up, model.heads, strict=True):
        for layer in head.tower:
            x = conv_relu(x, layer)
        for kind, (conv, width) in enumerate(zip((head.cls, head.reg, head.kps), widths, strict=True)):
            y = b.conv(x, conv)
            if kind == 1:
                y = b.add("Mul", y, b.constant(np.array(1.0, np.float32)))
            y = b.add("Transpose", y, perm=[0, 2, 3, 1] if batch_axis else [2, 3, 0, 1])
            y = b.add("Reshape", y, b.constant(np.array([1, -1, width] if batch_axis else [-1, width])))
            outputs[kind].append(b.add("Sigmoid", y) if kind == 0 else y)
    shapes: dict[str, list[int | str]] = {}
    for names, width in zip(outputs, widths, strict=True):
        for name, stride in zip(names, STRIDES, strict=True):
            rows: int | str = (input_size // stride) ** 2 * ANCHORS if input_size else f"n{stride}"
            shapes[name] = [1, rows, width] if batch_axis else [rows, width]
    side: int | str = input_size or "side"
    b.save(file, [1, 3, side, side], shapes)
