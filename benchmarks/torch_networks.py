"""The miniature's networks as they are in PyTorch: diffusers' Wan DiT and VAE, the face networks walked from their ONNX
graphs, and the reward. Tensors have their channels second.
"""

import functools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import Tensor, nn

ASSETS = Path(__file__).parents[1] / "rfl_jax" / "miniature" / "assets"
# insightface's: detection, the aligned face, and the normalisation of the original's score.
STRIDES, ANCHORS, FOUND, OVERLAP, CROP = (8, 16, 32), 2, 0.5, 0.4, 112
TEMPLATE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))
SCORE_MEAN, SCORE_STD, LOSS_WEIGHT = 0.54, 0.16, 0.1


def start(mode: str) -> Callable[[Any], Any]:
    """Takes the process's cores, and gives `torch.compile`, or for "eager" what leaves a function as it is."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    return functools.partial(torch.compile, dynamic=False) if mode == "compile" else lambda f: f


def channels_second(x: np.ndarray) -> Tensor:
    """A tensor of an array whose channels are last."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def as_frames(video: Tensor) -> Tensor:
    """[b, 3, t, h, w] as [b * t, 3, h, w]."""
    return video.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)


def open_dit(name: str) -> WanTransformer3DModel:
    """A DiT, by its folder's name."""
    c = json.loads((ASSETS / name / "config.json").read_text())
    dit = WanTransformer3DModel(
        num_attention_heads=c["num_heads"], attention_head_dim=c["dim"] // c["num_heads"], in_channels=c["in_dim"],
        out_channels=c["out_dim"], text_dim=c["text_dim"], freq_dim=c["freq_dim"], ffn_dim=c["ffn_dim"],
        num_layers=c["num_layers"], eps=c["eps"], cross_attn_norm=True,
    )  # fmt: skip
    weights = load_file(ASSETS / name / "diffusion_pytorch_model.safetensors")
    dit.load_state_dict(convert_wan_transformer_to_diffusers({k: x.float() for k, x in weights.items()}), strict=True)
    return frozen(dit)


class VAE:
    """The autoencoder, on normalised latents."""

    def __init__(self) -> None:
        c = json.loads((ASSETS / "vae" / "config.json").read_text())
        weights = {k: x.float() for k, x in load_file(ASSETS / "vae" / "Wan2.1_VAE.safetensors").items()}
        self._vae = AutoencoderKLWan(
            base_dim=len(weights["encoder.conv1.weight"]), decoder_base_dim=len(weights["decoder.head.0.gamma"]),
            latents_mean=c["latents_mean"], latents_std=c["latents_std"],
        )  # fmt: skip
        self._vae.load_state_dict(convert_wan_vae_to_diffusers(weights), strict=True)
        frozen(self._vae)
        self._mean, self._std = (torch.tensor(c[k]).view(1, -1, 1, 1, 1) for k in ("latents_mean", "latents_std"))

    def encode(self, video: Tensor) -> Tensor:
        video = video.contiguous(memory_format=torch.channels_last_3d)
        encoded: Any = self._vae.encode(video)
        return (encoded.latent_dist.mode() - self._mean) / self._std

    def decode(self, z: Tensor) -> Tensor:
        """Clamped to [-1, 1]."""
        z = (z * self._std + self._mean).contiguous(memory_format=torch.channels_last_3d)
        decoded: Any = self._vae.decode(z)
        return decoded.sample


def frozen(network: Any) -> Any:
    """A network that does not train, its kernels in the order of bytes that is fastest on a CPU."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for x in (*network.parameters(), *network.buffers()):
        if x.ndim in formats:
            x.data = x.data.contiguous(memory_format=formats[x.ndim])
    return network.requires_grad_(False).eval()


OPERATORS: dict[str, Callable[..., Tensor]] = {
    "Conv": lambda a, x, w, b: F.conv2d(x, w, b, a["strides"], a["pads"][:2], groups=a["group"]),
    "BatchNormalization": lambda a, x, w, b, mean, var: F.batch_norm(x, mean, var, w, b, eps=a["epsilon"]),
    "Relu": lambda a, x: F.relu(x),
    "PRelu": lambda a, x, slope: F.prelu(x, slope.flatten()),
    "Sigmoid": lambda a, x: torch.sigmoid(x),
    "Add": lambda a, x, y: x + y,
    "Mul": lambda a, x, y: x * y,
    "MaxPool": lambda a, x: F.max_pool2d(x, a["kernel_shape"], a["strides"], a["pads"][:2]),
    "AveragePool": lambda a, x: F.avg_pool2d(x, a["kernel_shape"], a["strides"], ceil_mode=True),
    "Resize": lambda a, x, _, scales: F.interpolate(x, scale_factor=2.0),
    "Flatten": lambda a, x: x.flatten(1),
    "Gemm": lambda a, x, w, b: F.linear(x, w, b),
    # The detector's file is for one image; these keep several apart.
    "Transpose": lambda a, x: x.permute(0, 2, 3, 1),
    "Reshape": lambda a, x, shape: x.reshape(len(x), -1, a["width"]),
}


class OnnxNetwork(nn.Module):
    """The operators of an ONNX graph, one after another. Weights become buffers, its outputs a list."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        graph = onnx.load(file).graph
        self.entry, self.outputs = graph.input[0].name, [o.name for o in graph.output]
        constants = {w.name: numpy_helper.to_array(w) for w in graph.initializer}
        for name, w in constants.items():
            self.register_buffer(name, torch.from_numpy(np.array(w)))
        self.nodes = []
        for node in graph.node:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type == "Reshape":
                attributes["width"] = int(constants[node.input[1]][-1])
            if node.op_type == "MaxPool":
                attributes.setdefault("pads", [0, 0])
            self.nodes.append((OPERATORS[node.op_type], attributes, list(node.input), node.output[0]))

    def forward(self, x: Tensor) -> list[Tensor]:
        values = {**self._buffers, self.entry: x}
        for operator, attributes, names, out in self.nodes:
            values[out] = operator(attributes, *(values[name] for name in names))
        return [values[name] for name in self.outputs]


def open_detector() -> OnnxNetwork:
    """The reward's SCRFD."""
    return frozen(OnnxNetwork(ASSETS / "antelopev2" / "scrfd_10g_bnkps.onnx"))


def open_embedder(name: str = "antelopev2") -> OnnxNetwork:
    """The reward's ArcFace, or that of the folder "judge"."""
    return frozen(OnnxNetwork(ASSETS / name / "glintr100.onnx"))


def anchor_points(size: int) -> tuple[Tensor, Tensor]:
    """Position [n, 2] and stride [n, 1] of every anchor, in the order of the detector's outputs."""
    points, strides = [], []
    for stride in STRIDES:
        axis = torch.arange(0.0, size, stride)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 2)
        points.append(grid.repeat_interleave(ANCHORS, 0))
        strides.append(torch.full((len(points[-1]), 1), float(stride)))
    return torch.cat(points), torch.cat(strides)


@torch.no_grad()
def find(detector: Callable[[Tensor], list[Tensor]], frames: Tensor) -> tuple[Tensor, Tensor]:
    """Points [n, 5, 2] of each frame's largest face, and whether there is one, as insightface finds it."""
    outputs = detector((((frames + 1) * 127.5).clamp(0, 255).round() - 127.5) / 128)
    scores, edges, offsets = (torch.cat([o for o in outputs if o.shape[-1] == width], 1) for width in (1, 4, 10))
    points, strides = anchor_points(frames.shape[-1])
    edges = edges * strides
    x1, y1, x2, y2 = torch.cat([points - edges[..., :2], points + edges[..., 2:]], -1).unbind(-1)
    areas = (x2 - x1 + 1) * (y2 - y1 + 1)
    left = torch.where(scores[..., 0] >= FOUND, scores[..., 0], -1.0)
    kept = torch.zeros_like(left, dtype=torch.bool)
    # Suppression of all frames together: each turn keeps the best box left of every frame.
    while (left >= 0).any():
        value, best = left.max(1, keepdim=True)
        kept.scatter_(1, best, kept.gather(1, best) | (value >= 0))
        bx1, by1, bx2, by2, area = (v.gather(1, best) for v in (x1, y1, x2, y2, areas))
        width = (torch.minimum(x2, bx2) - torch.maximum(x1, bx1) + 1).clamp(min=0)
        height = (torch.minimum(y2, by2) - torch.maximum(y1, by1) + 1).clamp(min=0)
        shared = width * height
        left = torch.where(shared / (areas + area - shared) <= OVERLAP, left, -1.0).scatter(1, best, -1.0)
    chosen = torch.where(kept, (x2 - x1) * (y2 - y1), -math.inf).argmax(1)
    kps = (points[:, None] + offsets.unflatten(-1, (5, 2)) * strides[:, None])[torch.arange(len(chosen)), chosen]
    found = kept.any(1)
    return torch.where(found[:, None, None], kps, 0.0), found


def embed(embedder: nn.Module, frames: Tensor, kps: Tensor, found: Tensor) -> Tensor:
    """Embeddings [n, e] of the faces at these points, zeros where there is none."""
    template = torch.tensor(TEMPLATE)
    source, target = kps.mean(1), template.mean(0)
    p, q = kps - source[:, None], template - target
    norm = (p * p).sum((1, 2))
    cos, sin = (p * q).sum((1, 2)), (p[..., 0] * q[:, 1] - p[..., 1] * q[:, 0]).sum(1)
    # The inverse of the similarity that takes the points to the template: the crop's pixels are looked up in the frame.
    square = (cos**2 + sin**2) / torch.where(norm > 0, norm, 1.0)
    inverse = torch.stack([cos, sin, -sin, cos], -1) / torch.where(square > 0, square, 1.0)[:, None]
    axis = torch.arange(float(CROP))
    crop = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    places = torch.einsum("hwc,ndc->nhwd", crop - target, inverse.view(-1, 2, 2)) + source[:, None, None]
    h, w = frames.shape[2:]
    grid = places * 2 / torch.tensor([w - 1.0, h - 1.0]) - 1
    crops = F.grid_sample(frames + 1, grid, align_corners=True) - 1  # black outside the frame
    crops = torch.where(found[:, None, None, None], crops, 0.0).contiguous(memory_format=torch.channels_last)
    return torch.where(found[:, None], embedder(crops)[0], 0.0)


def score(embeddings: Tensor, found: Tensor, pool: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cosine [b] of a video's faces with those of the real clip but its first, and whether both have any.

    Args:
        embeddings: [b, t, e].
        found: [b, t].
        pool: [b, g, e].
    """
    usable = (pool != 0).any(-1)
    usable[:, 0] = False
    cosines = torch.einsum("bte,bge->btg", F.normalize(embeddings, dim=-1), F.normalize(pool, dim=-1))
    means = (cosines * usable[:, None]).sum(-1) / usable.sum(-1, keepdim=True).clamp(min=1)
    return (means * found).sum(1) / found.sum(1).clamp(min=1), found.any(1) & usable.any(1)


def reward_loss(scores: Tensor, valid: Tensor) -> Tensor:
    """The original's loss, of videos without a face 0."""
    return torch.where(valid, -(scores - SCORE_MEAN) / SCORE_STD * LOSS_WEIGHT, 0.0).mean()
