"""The public face embedders in PyTorch at any width, exported as their authors export them.

Wired as deepinsight/insightface `recognition/arcface_torch/backbones/{iresnet,mobilefacenet}.py` and `torch2onnx.py`.
"""

import warnings
from pathlib import Path

import torch
from torch import nn

OPSET = 11


class Residual(nn.Module):
    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x):
        return self.body(x) + self.shortcut(x)


class Rows(nn.Module):
    """Flattens as MobileFaceNet does, which asks the tensor for its batch."""

    def forward(self, x):
        return x.view(x.size(0), -1)


def normed(c_in, c_out, kernel, stride=1, groups=1, padding=None):
    """A convolution without bias and a batch norm."""
    padding = kernel // 2 if padding is None else padding
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(c_out)]


def iresnet(layers, unit=64, embedding=512):
    """IResNet whose stem has `unit` channels and whose stages have 1, 2, 4 and 8 times as many."""
    parts, c = [*normed(3, unit, 3), nn.PReLU(unit)], unit
    for stage, count in enumerate(layers):
        width = unit * 2**stage
        for i in range(count):
            step = 1 if i else 2
            body = [nn.BatchNorm2d(c), *normed(c, width, 3), nn.PReLU(width), *normed(width, width, 3, step)]
            shortcut = nn.Identity() if i else nn.Sequential(*normed(c, width, 1, step))
            parts.append(Residual(nn.Sequential(*body), shortcut))
            c = width
    head = [nn.BatchNorm2d(c), nn.Flatten(), nn.Dropout(0.4), nn.Linear(c * 49, embedding), nn.BatchNorm1d(embedding)]
    return randomised(nn.Sequential(*parts, *head))


def mobilefacenet(blocks=(1, 4, 6, 2), scale=2, unit=64, embedding=512):
    """MobileFaceNet: `unit` times `scale` channels at first; `unit` is 64 in what is published."""

    def prelu(c_in, c_out, kernel, stride=1, groups=1):
        return [*normed(c_in, c_out, kernel, stride, groups), nn.PReLU(c_out)]

    def bottleneck(c_in, c_out, inner, stride):
        return nn.Sequential(*prelu(c_in, inner, 1), *prelu(inner, inner, 3, stride, inner), *normed(inner, c_out, 1))

    def repeated(c, inner, count):
        return [Residual(bottleneck(c, c, inner, 1), nn.Identity()) for _ in range(count)]

    c, last = unit * scale, unit * 8
    parts = [
        *prelu(3, c, 3, 2),
        *(prelu(c, c, 3, 1, unit) if blocks[0] == 1 else repeated(c, 2 * unit, blocks[0])),
        bottleneck(c, c, 2 * unit, 2),
        *repeated(c, 2 * unit, blocks[1]),
        bottleneck(c, 2 * c, 4 * unit, 2),
        *repeated(2 * c, 4 * unit, blocks[2]),
        bottleneck(2 * c, 2 * c, 8 * unit, 2),
        *repeated(2 * c, 4 * unit, blocks[3]),
        *prelu(2 * c, last, 1),
        *normed(last, last, 7, groups=last, padding=0),
        Rows(),
        nn.Linear(last, embedding, bias=False),
        nn.BatchNorm1d(embedding),
    ]
    return randomised(nn.Sequential(*parts))


def randomised(network):
    """No weight and no statistic at its initial value."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, x in network.state_dict().items():
            if name.endswith("running_var"):
                x.uniform_(0.5, 1.5)
            elif x.is_floating_point():
                x.add_(0.1 * torch.randn_like(x))
    return network.eval()


def export(network: nn.Module, file: Path, *, folded: bool = True, free_batch: bool = False) -> None:
    """Writes ONNX by the exporter that the published files were made with, whose successor needs another package.

    Args:
        network: one of the above.
        file: to write.
        folded: batch norms into the convolutions before them, and what is done to weights into the weights.
        free_batch: any number of crops, else one.
    """
    training = torch.onnx.TrainingMode.EVAL if folded else torch.onnx.TrainingMode.PRESERVE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            network, (torch.zeros(1, 3, 112, 112),), str(file), input_names=["input.1"], opset_version=OPSET,
            dynamo=False, training=training, do_constant_folding=folded,
            dynamic_axes={"input.1": {0: "batch"}} if free_batch else None,
        )  # fmt: skip
