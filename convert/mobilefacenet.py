"""MobileFaceNet from ONNX (buffalo_s' and buffalo_sc's w600k_mbf.onnx and its relatives), matched by walking the graph."""

import numpy as np

from convert.onnx_graph import Graph, Node, stride
from rfl_jax.rewards.mobilefacenet import SPREAD, BottleneckSpec, ConvPReLUSpec, MobileFaceNetConfig

# The exporter may flatten by any of these.
FLATTEN = ("Flatten", "Reshape")


def groups(node: Node) -> int:
    return int(node.attributes.get("group", 1))


def size(graph: Graph, node: Node) -> int:
    """Width of a convolution's kernel."""
    return graph.constant(node, 1).shape[-1]


def covers_map(graph: Graph, node: Node) -> bool:
    """Whether a convolution has no border to fill though its kernel has: the one that sums up a whole map."""
    return size(graph, node) > 1 and not any(node.attributes.get("pads", [0]))


class _Walk:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.arrays: dict[str, np.ndarray] = {}
        self.layers: list[ConvPReLUSpec | BottleneckSpec] = []

    def conv(self, node: Node, name: str) -> str:
        self.arrays[f"{name}.kernel"], self.arrays[f"{name}.bias"], out = self.graph.convolution(node)
        return out

    def conv_prelu(self, node: Node, name: str) -> tuple[ConvPReLUSpec, str]:
        prelu = self.graph.next(self.conv(node, f"{name}.conv"), "PRelu")
        self.arrays[f"{name}.prelu.slope"] = self.graph.constant(prelu, 1).reshape(-1).astype(np.float32)
        kernel = self.arrays[f"{name}.conv.kernel"]
        return ConvPReLUSpec(kernel.shape[3], kernel.shape[0], stride(node), groups(node)), prelu.output

    def layer(self, x: str) -> str:
        """Appends the layer that begins at a tensor, and gives the tensor after it."""
        graph, name = self.graph, f"layers.{len(self.layers)}"
        users = graph.consumers(x)
        add = next((n for n in users if n.op == "Add"), None)
        node = next((n for n in users if n.op == "Conv"), None)
        if node is None or len(users) != (1 if add is None else 2):
            raise graph.refuse(users[0] if users else None, "Conv, or Conv and Add at the start of a bottleneck")
        if add is None and not self.expands(node):
            spec, out = self.conv_prelu(node, name)
            self.layers.append(spec)
            return out
        first, h = self.conv_prelu(node, f"{name}.expand")
        middle = graph.next(h, "Conv")
        second, h = self.conv_prelu(middle, f"{name}.spread")
        last = graph.next(h, "Conv")
        h = self.conv(last, f"{name}.project")
        pointwise = {(first.kernel, first.stride, first.groups), (size(graph, last), stride(last), groups(last))}
        if pointwise != {(1, 1, 1)}:
            raise graph.refuse(node, "pointwise convolutions at both ends of a bottleneck")
        if second.kernel != SPREAD or not first.width == second.width == second.groups:
            raise graph.refuse(middle, f"a depthwise {SPREAD}x{SPREAD} convolution in the middle of a bottleneck")
        if add is not None and (set(add.inputs) != {x, h} or graph.next(h, "Add") is not add):
            raise graph.refuse(add, "the sum of a bottleneck and its input")
        width = self.arrays[f"{name}.project.bias"].size
        self.layers.append(BottleneckSpec(width, first.width, second.stride, residual=add is not None))
        return h if add is None else add.output

    def expands(self, node: Node) -> bool:
        """Whether a convolution begins a bottleneck: a pointwise one before a grouped one that keeps the map's borders."""
        if size(self.graph, node) != 1:
            return False
        prelu = self.graph.follows(self.graph.convolution(node)[2], "PRelu")
        after = self.graph.follows(prelu.output, "Conv") if prelu else None
        return after is not None and groups(after) > 1 and not covers_map(self.graph, after)


def walk(graph: Graph) -> tuple[MobileFaceNetConfig, dict[str, np.ndarray]]:
    """Sizes and weights of a MobileFaceNet graph.

    Raises:
        UserError: naming the first node that differs.
    """
    steps, x = _Walk(graph), graph.input
    while not ((last := graph.follows(x, "Conv")) and covers_map(graph, last)):
        x = steps.layer(x)
    kernel, bias, x = graph.convolution(last, padded=False)
    found = MobileFaceNetConfig(tuple(steps.layers), 0)
    if not steps.layers or not kernel.shape[3] == groups(last) == found.layers[-1].width:
        raise graph.refuse(last, "a depthwise convolution at the end")
    if kernel.shape[0] != found.side or stride(last) != 1:
        raise graph.refuse(last, f"a kernel that covers the {found.side}x{found.side} map, found {kernel.shape[0]}")
    arrays = steps.arrays | {"sum.kernel": kernel[:, :, 0], "sum.bias": bias}
    kernel, bias = graph.embedding(graph.next(x, *FLATTEN).output)
    arrays |= {"fc.kernel": kernel.T.astype(np.float32), "fc.bias": bias.astype(np.float32)}
    return MobileFaceNetConfig(found.layers, bias.size), arrays
