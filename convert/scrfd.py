"""SCRFD from ONNX (antelopev2's scrfd_10g_bnkps.onnx and its relatives), matched by walking the graph."""

import numpy as np

from convert.component import OnnxComponent
from convert.onnx_graph import Graph, Node, stride
from rfl_jax.rewards.scrfd import (
    ANCHORS,
    KEYPOINTS,
    SCRFD,
    STRIDES,
    BlockSpec,
    ConvSpec,
    PoolSpec,
    SCRFDConfig,
)

RESIZE = ("Resize", "Upsample")
OUTPUTS = {ANCHORS: "cls", ANCHORS * 4: "reg", ANCHORS * KEYPOINTS * 2: "kps"}
# (row, column, anchor) order, with or without a batch axis.
PERMUTATIONS = ([2, 3, 0, 1], [0, 2, 3, 1])


class _Walk:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.arrays: dict[str, np.ndarray] = {}

    def conv(self, node: Node, name: str) -> str:
        self.arrays[f"{name}.kernel"], self.arrays[f"{name}.bias"], out = self.graph.convolution(node)
        return out

    def conv_relu(self, node: Node, name: str) -> tuple[ConvSpec, str]:
        """A convolution, the group norm of some heads, and a ReLU."""
        out = self.conv(node, f"{name}.conv")
        norm_groups = 0
        if self.graph.follows(out, "Reshape"):
            norm_groups, out = self.group_norm(out, f"{name}.norm")
        relu = self.graph.next(out, "Relu")
        kernel = self.arrays[f"{name}.conv.kernel"]
        spec = ConvSpec(kernel.shape[3], kernel.shape[0], stride(node), node.attributes.get("group", 1), norm_groups)
        return spec, relu.output

    def group_norm(self, tensor: str, name: str) -> tuple[int, str]:
        """PyTorch's export of GroupNorm: reshape, instance norm, reshape, scale, bias."""
        graph = self.graph
        norm = graph.next(graph.next(tensor, "Reshape").output, "InstanceNormalization")
        groups = graph.constant(norm, 1).size
        scale = graph.next(graph.next(norm.output, "Reshape").output, "Mul")
        bias = graph.next(scale.output, "Add")
        if abs(norm.attributes.get("epsilon", 1e-5) - 1e-5) > 1e-9:
            raise graph.refuse(norm, "an epsilon of 1e-5")
        self.arrays[f"{name}.scale"] = graph.constant(scale, 1).reshape(-1).astype(np.float32)
        self.arrays[f"{name}.bias"] = graph.constant(bias, 1).reshape(-1).astype(np.float32)
        return groups, bias.output

    def is_lateral(self, node: Node) -> bool:
        """Whether a convolution leaves the backbone: its output meets an upsampled map, or is upsampled."""
        if node.op != "Conv":
            return False
        out = node.output
        if norm := self.graph.follows(out, "BatchNormalization"):
            out = norm.output
        for user in self.graph.consumers(out):
            producers = [self.graph.producer(name) for name in user.inputs]
            if user.op in RESIZE or (user.op == "Add" and any(p is not None and p.op in RESIZE for p in producers)):
                return True
        return False

    def backbone(self) -> tuple[list[ConvSpec | PoolSpec | BlockSpec], list[int], list[str], str]:
        """Layers, taps, the lateral maps, and the last of the backbone's tensors."""
        graph, x = self.graph, self.graph.input
        layers: list[ConvSpec | PoolSpec | BlockSpec] = []
        taps: list[int] = []
        laterals: list[str] = []
        while True:
            users = graph.consumers(x)
            for node in [n for n in users if self.is_lateral(n)]:
                laterals.append(self.conv(node, f"lateral.{len(laterals)}"))
                taps.append(len(layers))
            if len(laterals) == len(STRIDES):
                return layers, taps, laterals, x
            users = [n for n in users if not self.is_lateral(n)]
            name = f"backbone.{len(layers)}"
            if len(users) == 1 and users[0].op == "MaxPool":
                a = users[0].attributes
                layers.append(PoolSpec(a["kernel_shape"][0], stride(users[0]), a.get("pads", [0])[0]))
                x = users[0].output
            elif len(users) == 1 and users[0].op == "Conv":
                spec, x = self.conv_relu(users[0], name)
                layers.append(spec)
            elif len(users) == 2:
                spec, x = self.block(x, users, name)
                layers.append(spec)
            else:
                raise graph.refuse(users[0] if users else None, "Conv, MaxPool or a residual block of the backbone")

    def block(self, x: str, users: list[Node], name: str) -> tuple[BlockSpec, str]:
        graph = self.graph
        main = next((n for n in users if n.op == "Conv" and graph.constant(n, 1).shape[-1] == 3), None)
        other = next(n for n in users if n is not main)
        if main is None:
            raise graph.refuse(users[0], "a 3x3 Conv at the start of a residual block")
        second = graph.next(graph.next(self.conv(main, f"{name}.conv1"), "Relu").output, "Conv")
        h = self.conv(second, f"{name}.conv2")
        add = graph.next(h, "Add")
        shortcut = x
        pooled = 1
        if other.op == "AveragePool":
            pooled = stride(other)
            if list(other.attributes["kernel_shape"]) != [pooled, pooled]:
                raise graph.refuse(other, "an average over as many pixels as the stride")
            other = graph.next(other.output, "Conv")
        if other.op == "Conv":
            if stride(other) != 1 or pooled != stride(main):
                raise graph.refuse(other, "a shortcut that averages before its convolution")
            shortcut = self.conv(other, f"{name}.shortcut")
        if set(add.inputs) != {h, shortcut}:
            raise graph.refuse(add, "the sum of a block and its shortcut")
        spec = BlockSpec(self.arrays[f"{name}.conv2.bias"].size, stride(main), shortcut=shortcut != x)
        return spec, graph.next(add.output, "Relu").output

    def user(self, tensor: str, op: str, *, step: int | None = None) -> Node:
        """The one consumer of a tensor of this type (and stride) among others."""
        nodes = self.graph.consumers(tensor)
        found = [n for n in nodes if n.op == op and (step is None or stride(n) == step)]
        if len(found) != 1:
            raise self.graph.refuse(
                nodes[0] if nodes else None, f"one {op} of the neck after {tensor!r}, found {len(found)}"
            )
        return found[0]

    def upsampled(self, tensor: str) -> str:
        node = next((n for n in self.graph.consumers(tensor) if n.op in RESIZE), None)
        if node is None or node.attributes.get("mode", b"nearest") != b"nearest":
            raise self.graph.refuse(node, "a nearest-neighbour Resize of the neck")
        return node.output

    def neck(self, laterals: list[str]) -> list[str]:
        down = list(laterals)
        for i in (1, 0):
            up = self.upsampled(down[i + 1])
            add = self.graph.next(up, "Add")
            if set(add.inputs) != {up, down[i]}:
                raise self.graph.refuse(add, "the sum of a lateral and an upsampled map")
            down[i] = add.output
        fpn = [self.conv(self.user(x, "Conv"), f"fpn.{i}") for i, x in enumerate(down)]
        maps, current = [fpn[0]], fpn[0]
        for i in (0, 1):
            reduced = self.conv(self.user(current, "Conv", step=2), f"downsample.{i}")
            add = self.graph.next(reduced, "Add")
            if set(add.inputs) != {reduced, fpn[i + 1]}:
                raise self.graph.refuse(add, "the sum of a map and the downsampled one above it")
            current = add.output
            maps.append(self.conv(self.user(current, "Conv", step=1), f"pafpn.{i}"))
        return maps

    def head(self, x: str, name: str) -> tuple[tuple[ConvSpec, ...], int]:
        graph, tower = self.graph, []
        while True:
            convs = [n for n in graph.consumers(x) if n.op == "Conv" and stride(n) == 1]
            if len(convs) != 1:
                break
            spec, x = self.conv_relu(convs[0], f"{name}.tower.{len(tower)}")
            tower.append(spec)
        kinds = {OUTPUTS.get(graph.constant(n, 1).shape[0]): n for n in convs}
        if set(kinds) != set(OUTPUTS.values()):
            raise graph.refuse(
                convs[0] if convs else None, "convolutions for scores, boxes and keypoints (2, 8 and 20 channels)"
            )
        for kind, node in kinds.items():
            self.output(self.conv(node, f"{name}.{kind}"), f"{name}.{kind}", kind == "cls")
        return tuple(tower), self.arrays[f"{name}.cls.kernel"].shape[0]

    def output(self, x: str, name: str, scores: bool) -> None:
        """Follows an output to the end of the graph; a scalar scale on the way is folded into the convolution."""
        graph, sigmoid, ordered = self.graph, False, False
        while x not in graph.outputs:
            node = graph.next(x, "Mul", "Transpose", "Reshape", "Sigmoid")
            if node.op == "Mul":
                scale = next((graph.constants[i] for i in node.inputs if i in graph.constants), np.zeros(0))
                if scale.size != 1 or scores or not np.isfinite(scale).all():
                    raise graph.refuse(node, "a product with one finite number")
                self.arrays[f"{name}.kernel"] = self.arrays[f"{name}.kernel"] * np.float32(scale.item())
                self.arrays[f"{name}.bias"] = self.arrays[f"{name}.bias"] * np.float32(scale.item())
            elif node.op == "Transpose":
                if list(node.attributes.get("perm", [])) not in PERMUTATIONS:
                    raise graph.refuse(node, "rows and columns before channels")
                ordered = True
            sigmoid |= node.op == "Sigmoid"
            x = node.output
        if sigmoid != scores or not ordered:
            raise graph.refuse(graph.producer(x), "a transposed output" + (" after Sigmoid" if scores else ""))


def walk(graph: Graph) -> tuple[SCRFDConfig, dict[str, np.ndarray]]:
    """Layers and weights of an SCRFD graph.

    Raises:
        UserError: naming the first node that differs.
    """
    steps = _Walk(graph)
    layers, taps, laterals, _ = steps.backbone()
    heads = [steps.head(x, f"heads.{i}") for i, x in enumerate(steps.neck(laterals))]
    if len(set(heads)) != 1:
        raise graph.refuse(None, "heads of one shape at all strides")
    tower, kernel = heads[0]
    neck = steps.arrays["fpn.0.bias"].size
    return SCRFDConfig(tuple(layers), (taps[0], taps[1], taps[2]), neck, tower, kernel), steps.arrays


COMPONENT = OnnxComponent(SCRFD, walk)
convert, load = COMPONENT.convert, COMPONENT.load
