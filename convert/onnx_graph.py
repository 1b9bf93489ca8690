"""Walking an ONNX graph along its data edges.

Exporters fold batch norms, number initializers and compute shapes in side chains as they please; the order in which
data flows through the operators is what stays. The face converters follow that flow and take the weights they meet.
"""

from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from rfl_jax.errors import UserError, first_line

PASS_THROUGH = ("Identity", "Dropout")
SIDE_CHAINS = ("Shape",)
# What some exporters leave before a weight; the axes of length one that the second adds matter to nobody here.
OF_WEIGHTS = ("Transpose", "Unsqueeze")


class Node:
    """An operator: its type, data inputs and outputs, attributes."""

    def __init__(self, index: int, proto: onnx.NodeProto) -> None:
        self.index = index
        self.op = proto.op_type
        self.name = proto.name or (proto.output[0] if proto.output else "")
        self.inputs = list(proto.input)
        self.output = proto.output[0]
        self.attributes = {a.name: onnx.helper.get_attribute_value(a) for a in proto.attribute}

    def __str__(self) -> str:
        return f"node {self.index} ({self.op} {self.name!r})"


class Graph:
    """An ONNX model's graph.

    Raises:
        UserError: the file is not ONNX, or (from the walking methods) the first node that differs from what the
            network expects.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        if not file.is_file():
            raise UserError(f"{file}: no such file, expected an ONNX model")
        try:
            model = onnx.load(file)
        except (DecodeError, OSError, ValueError) as error:
            raise UserError(f"{file}: expected an ONNX model ({type(error).__name__})") from None
        except onnx.checker.ValidationError as error:
            raise UserError(f"{file}: expected an ONNX model with its data beside it ({first_line(error)})") from None
        graph = model.graph
        if not graph.node or not graph.output:
            raise UserError(f"{file}: expected an ONNX model with operators and outputs")
        self.constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
        self.inputs = [i for i in graph.input if i.name not in self.constants]
        self.outputs = [o.name for o in graph.output]
        alias: dict[str, str] = {}
        self._consumers: dict[str, list[Node]] = {}
        self._producer: dict[str, Node] = {}
        for index, proto in enumerate(graph.node):
            node = Node(index, proto)
            node.inputs = [alias.get(name, name) for name in node.inputs]
            if node.op == "Constant" and "value" in node.attributes:
                self.constants[node.output] = numpy_helper.to_array(node.attributes["value"])
            elif node.op in PASS_THROUGH:
                alias[node.output] = node.inputs[0]
            elif node.op in OF_WEIGHTS and node.inputs[0] in self.constants:
                weight = self.constants[node.inputs[0]]
                turned = node.op == "Transpose"
                self.constants[node.output] = weight.transpose(node.attributes.get("perm")) if turned else weight
            elif node.op not in SIDE_CHAINS:
                self._producer[node.output] = node
                for name in dict.fromkeys(node.inputs):
                    self._consumers.setdefault(name, []).append(node)

    @property
    def input(self) -> str:
        if len(self.inputs) != 1:
            raise UserError(f"{self.file}: {len(self.inputs)} inputs, expected one image")
        return self.inputs[0].name

    def refuse(self, node: Node | None, expected: str) -> UserError:
        return UserError(f"{self.file}: {node or 'the end of the graph'} differs, expected {expected}")

    def consumers(self, tensor: str) -> list[Node]:
        """Operators that read a tensor, those that only ask its shape left out."""
        return self._consumers.get(tensor, [])

    def producer(self, tensor: str) -> Node | None:
        return self._producer.get(tensor)

    def next(self, tensor: str, *ops: str) -> Node:
        """The only consumer of a tensor, which must be one of `ops`."""
        nodes = self.consumers(tensor)
        if len(nodes) != 1 or nodes[0].op not in ops:
            wrong = next((n for n in nodes if n.op not in ops), nodes[-1] if nodes else None)
            raise self.refuse(wrong, " or ".join(ops))
        return nodes[0]

    def follows(self, tensor: str, op: str) -> Node | None:
        """The only consumer of a tensor if it is an `op`."""
        nodes = self.consumers(tensor)
        return nodes[0] if len(nodes) == 1 and nodes[0].op == op else None

    def constant(self, node: Node, position: int) -> np.ndarray:
        """A weight among a node's inputs."""
        if position >= len(node.inputs) or node.inputs[position] not in self.constants:
            raise self.refuse(node, f"a constant as input {position}")
        name = node.inputs[position]
        if not np.isfinite(self.constants[name]).all():
            raise UserError(f"{self.file}: {name} holds NaN or infinity, expected finite numbers")
        return self.constants[name]

    def affine(self, node: Node) -> tuple[np.ndarray, np.ndarray]:
        """Scale and bias of a BatchNormalization, computed in float64."""
        gamma, beta, mean, variance = (self.constant(node, i).astype(np.float64) for i in range(1, 5))
        # A damaged file's numbers are looked at when the network has all of them.
        with np.errstate(all="ignore"):
            scale = gamma / np.sqrt(variance + node.attributes.get("epsilon", 1e-5))
            return scale, beta - mean * scale

    def convolution(self, node: Node, *, padded: bool = True) -> tuple[np.ndarray, np.ndarray, str]:
        """Kernel [h, w, in, out] and bias of a square convolution, a following batch norm folded in, and the tensor
        that leaves. It is padded by half its kernel, or not at all.
        """
        kernel = self.constant(node, 1).astype(np.float64)
        bias = self.constant(node, 2).astype(np.float64) if len(node.inputs) > 2 else np.zeros(kernel.shape[0])
        size = kernel.shape[-1]
        pads = list(node.attributes.get("pads", [0, 0, 0, 0]))
        dilations = list(node.attributes.get("dilations", [1, 1]))
        border = size // 2 if padded else 0
        if kernel.ndim != 4 or kernel.shape[2] != size or pads != [border] * 4 or dilations != [1, 1]:
            raise self.refuse(node, "a square convolution padded by half its kernel" if padded else "no padding")
        out = node.output
        if norm := self.follows(out, "BatchNormalization"):
            scale, shift = self.affine(norm)
            with np.errstate(all="ignore"):
                kernel, bias, out = kernel * scale[:, None, None, None], bias * scale + shift, norm.output
        with np.errstate(all="ignore"):
            return kernel.transpose(2, 3, 1, 0).astype(np.float32), bias.astype(np.float32), out

    def embedding(self, tensor: str) -> tuple[np.ndarray, np.ndarray]:
        """Kernel [out, in] and bias, float64, of the linear layer that makes the graph's output of a tensor, a batch norm
        after it folded in.
        """
        node = self.next(tensor, "Gemm", "MatMul")
        kernel = self.constant(node, 1).astype(np.float64)
        kernel = kernel if node.attributes.get("transB", 0) else kernel.T
        if kernel.ndim != 2 or node.attributes.get("transA", 0):
            raise self.refuse(node, "a product of features and a matrix")
        if any(node.attributes.get(factor, 1.0) != 1.0 for factor in ("alpha", "beta")):
            raise self.refuse(node, "a product with no factors of its own")
        bias = self.constant(node, 2).astype(np.float64) if len(node.inputs) > 2 else np.zeros(len(kernel))
        out = node.output
        if norm := self.follows(out, "BatchNormalization"):
            scale, shift = self.affine(norm)
            with np.errstate(all="ignore"):
                kernel, bias, out = kernel * scale[:, None], bias * scale + shift, norm.output
        if out not in self.outputs:
            after = self.consumers(out)
            raise self.refuse(after[0] if after else node, "the embedding as the output")
        return kernel, bias


def stride(node: Node) -> int:
    """The stride of a convolution or pooling, the same in both directions."""
    return int(node.attributes.get("strides", [1, 1])[0])
