"""PyTorch's side of `benchmarks.torch_step`: the same step, with PEFT's adapters on diffusers' DiT and AdamW."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor, nn

from benchmarks import sides
from benchmarks.sides import Inputs, Outcome, Side, in_one
from benchmarks.torch_networks import (
    VAE,
    as_frames,
    channels_second,
    embed,
    find,
    open_detector,
    open_dit,
    open_embedder,
    reward_loss,
    score,
    start,
)  # fmt: skip
from rfl_jax.sampling.schedule import TRAIN_TIMESTEPS, Span


class TorchSide(Side):
    """The same step from the same inputs.

    Args:
        inputs: of our side.
        mode: "eager", or "compile" for `torch.compile`.
    """

    def __init__(self, inputs: Inputs, mode: str) -> None:
        compiled = start(mode)
        self.actions = {sides.STEP: lambda: self._step(self._start)}
        self._inputs, settings = inputs, inputs.settings
        self._y, self._noise, self._start = (channels_second(inputs.arrays[n]) for n in ("y", "noise", "prefix"))
        self._context, self._pool = (torch.tensor(inputs.arrays[n]) for n in ("context", "pool"))
        low, embedder = open_dit("low_noise_model"), open_embedder()
        low.load_lora_adapter(load(inputs.adapters), adapter_name="adapter")
        self._trained = {name: p for name, p in low.named_parameters() if ".lora_" in name}
        for p in self._trained.values():
            p.requires_grad_(True)
        self._dits = {"dit": compiled(open_dit("high_noise_model")), "dit2": compiled(low)}
        self._reference = compiled(open_dit("low_noise_model"))
        self._decode = compiled(VAE().decode)
        self._detector = compiled(open_detector())
        self._embed = compiled(lambda *x: embed(embedder, *x))
        self._optimizer = torch.optim.AdamW(
            self._trained.values(), settings["learning_rate"], weight_decay=settings["weight_decay"], fused=True
        )

    def first(self) -> Outcome:
        """Takes the prefix and the first step: latents after the prefix, mean score, loss, clipped gradients."""
        start = self._still(self._noise, self._inputs.prefix)
        loss, reached = self._step(start)
        gradients = {
            name.replace(".adapter", ""): p.grad.numpy() for name, p in self._trained.items() if p.grad is not None
        }
        shown = {"prefix": np.moveaxis(start.numpy(), 1, -1), "score": reached, "loss": loss}
        return {"gradients": in_one(gradients), **{name: np.asarray(x) for name, x in shown.items()}}

    def open_phases(self) -> None:
        """Makes the phases of the step things that can be timed."""
        x = self._still(self._start, self._spans(False))
        z = self._with_gradient(x)[0].detach()
        with torch.no_grad():
            video = self._decode(z)
        frames = as_frames(video)
        kps, found = find(self._detector, frames)
        self.actions |= {
            sides.PREFIX: lambda: self._still(self._noise, self._inputs.prefix),
            sides.STILL: lambda: self._still(self._start, self._spans(False)),
            sides.GRADIENT: _backward(lambda: self._with_gradient(x), self._trained.values()),
            sides.DECODE: lambda: torch.no_grad()(self._decode)(z),
            sides.DECODE_BACK: _backward(self._decode, [z.requires_grad_()], z),
            sides.DETECT: lambda: find(self._detector, frames),
            sides.EMBED_BACK: _backward(self._embed, [frames.requires_grad_()], frames, kps, found),
        }

    def _spans(self, gradient: bool) -> Sequence[Span]:
        return [span for span in self._inputs.spans if span.gradient == gradient]

    def _velocity(self, network: Any, x: Tensor, i: int) -> Tensor:
        t = torch.full((len(x),), float(self._inputs.sigmas[i] * np.float32(TRAIN_TIMESTEPS)))
        return network(torch.cat([x, self._y], 1), t, self._context, return_dict=False)[0]

    def _moved(self, x: Tensor, i: int, velocity: Tensor) -> Tensor:
        return x + float(self._inputs.sigmas[i + 1] - self._inputs.sigmas[i]) * velocity

    @torch.no_grad()
    def _still(self, x: Tensor, spans: Sequence[Span]) -> Tensor:
        """Latents after the spans, without gradient."""
        for span in spans:
            for i in range(span.start, span.stop):
                x = self._moved(x, i, self._velocity(self._dits[span.expert], x, i))
        return x

    def _with_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents after the steps with gradient, and the mean KL to the DiT without adapters."""
        kl = []
        for span in self._spans(True):
            for i in range(span.start, span.stop):
                v = self._velocity(self._dits[span.expert], x, i)
                with torch.no_grad():
                    target = self._velocity(self._reference, x.detach(), i)
                kl.append(((v - target) ** 2).mean() / (2 * float(self._inputs.sigmas[i]) ** 2))
                x = self._moved(x, i, v)
        return x, torch.stack(kl).mean()

    def _step(self, start: Tensor) -> tuple[float, float]:
        """Loss and mean score of one update."""
        self._optimizer.zero_grad()
        z, kl = self._with_gradient(self._still(start, self._spans(False)))
        frames = as_frames(self._decode(z))
        kps, found = find(self._detector, frames.detach())
        b = len(z)
        embeddings = self._embed(frames, kps, found).unflatten(0, (b, -1))
        scores, valid = score(embeddings, found.unflatten(0, (b, -1)), self._pool)
        weights = self._inputs.settings["reward"]
        loss = weights["weight"] * reward_loss(scores, valid) + weights["kl_weight"] * kl
        loss.backward()
        nn.utils.clip_grad_norm_(self._trained.values(), self._inputs.settings["max_grad_norm"])
        self._optimizer.step()
        scores = scores.detach()[valid]
        return loss.item(), scores.mean().item() if len(scores) else 0.0


def _backward(f: Callable[..., Any], inputs: Iterable[Tensor], *arguments: Tensor) -> Callable[[], Any]:
    """Gradient in `inputs` of a random sum of what a function returns."""
    with torch.no_grad():
        outputs = f(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [torch.randn_like(x) for x in outputs]

    def run() -> Any:
        found = f(*arguments)
        return torch.autograd.grad(found if isinstance(found, tuple) else (found,), list(inputs), weights)

    return run


def open_side(inputs: Inputs, mode: str) -> TorchSide:
    """PyTorch's side of the training step."""
    return TorchSide(inputs, mode)
