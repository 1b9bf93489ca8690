"""PyTorch's side of `benchmarks.torch_step` outside of training, the text encoder in transformers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from benchmarks import sides
from benchmarks.sides import Outcome, Side, UseInputs
from benchmarks.torch_networks import (
    VAE,
    as_frames,
    channels_second,
    embed,
    find,
    frozen,
    open_detector,
    open_dit,
    open_embedder,
    start,
)  # fmt: skip


def open_text_encoder(sizes: dict[str, Any], weights: bytes) -> UMT5EncoderModel:
    """The text encoder."""
    cfg = UMT5Config(
        vocab_size=sizes["vocab"], d_model=sizes["dim"], d_kv=sizes["dim_attn"] // sizes["num_heads"],
        d_ff=sizes["dim_ffn"], num_layers=sizes["num_layers"], num_heads=sizes["num_heads"],
        relative_attention_num_buckets=sizes["num_buckets"], relative_attention_max_distance=sizes["max_distance"],
        feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
    text = UMT5EncoderModel(cfg)
    state = load(weights)
    state.setdefault("encoder.embed_tokens.weight", state["shared.weight"])
    text.load_state_dict(state, strict=True)
    return frozen(text)


class TorchUses(Side):
    """The same networks on the same clips.

    Args:
        inputs: of our side.
        mode: "eager", or "compile" for `torch.compile`.
    """

    def __init__(self, inputs: UseInputs, mode: str) -> None:
        self._inputs, self._compiled = inputs, start(mode)
        self._arrays = {k: torch.tensor(x) if x.ndim < 5 else channels_second(x) for k, x in inputs.arrays.items()}
        openers = {
            sides.ENCODE: self._encode, sides.TEXT: self._text, sides.POOL: self._pool,
            sides.GUIDED: self._guided, sides.DECODE: self._decode, sides.JUDGE: self._judge,
        }  # fmt: skip
        self.actions = {name: torch.no_grad()(openers[name]()) for name in inputs.actions}

    def first(self) -> Outcome:
        """What every action gives."""
        outputs = {name: action().numpy() for name, action in self.actions.items()}
        return {name: np.moveaxis(x, 1, -1) if x.ndim == 5 else x for name, x in outputs.items()}

    def _encode(self) -> Callable[[], Tensor]:
        encode, video = self._compiled(VAE().encode), torch.zeros_like(self._arrays["video"][:1])
        video[:, :, 0] = self._arrays["video"][:1, :, 0]
        return lambda: encode(video)

    def _text(self) -> Callable[[], Tensor]:
        text = self._compiled(open_text_encoder(dict(self._inputs.text_sizes), self._inputs.text_weights))
        ids, mask = (self._arrays[name][:1].long() for name in ("ids", "mask"))
        return lambda: text(ids, attention_mask=mask).last_hidden_state * mask[..., None]

    def _pool(self) -> Callable[[], Tensor]:
        return self._embedded(as_frames(self._arrays["video"])[: self._arrays["video"].shape[2]], ["antelopev2"])

    def _judge(self) -> Callable[[], Tensor]:
        return self._embedded(as_frames(self._arrays["video"]), ["antelopev2", "judge"])

    def _guided(self) -> Callable[[], Tensor]:
        dit = self._compiled(open_dit("low_noise_model"))
        x = torch.cat([self._arrays["noise"], self._arrays["y"]], 1)
        t = torch.full((len(x),), self._inputs.timestep)
        context = self._arrays["context"]
        negative = self._arrays["negative_context"].expand_as(context)

        def guided() -> Tensor:
            v, away = (dit(x, t, c, return_dict=False)[0] for c in (context, negative))
            return away + self._inputs.guidance * (v - away)

        return guided

    def _decode(self) -> Callable[[], Tensor]:
        decode = self._compiled(VAE().decode)
        return lambda: decode(self._arrays["noise"])

    def _embedded(self, frames: Tensor, folders: list[str]) -> Callable[[], Tensor]:
        detector = self._compiled(open_detector())
        networks = [open_embedder(folder) for folder in folders]
        embedders = [self._compiled(lambda *x, network=network: embed(network, *x)) for network in networks]

        def embedded() -> Tensor:
            kps, found = find(detector, frames)
            return torch.cat([embedder(frames, kps, found) for embedder in embedders], -1)

        return embedded


def open_side(inputs: UseInputs, mode: str) -> TorchUses:
    """PyTorch's side of a use of networks."""
    return TorchUses(inputs, mode)
