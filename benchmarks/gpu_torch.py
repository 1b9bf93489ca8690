"""PyTorch's side of `benchmarks.gpu`: diffusers' networks, eager, in bfloat16, with flash attention and checkpointing.

Adapters are bfloat16 too, which spares it our casts; frozen weights are not of 8 bits; in place of the reward, whose networks
are a thousandth of a step's operations, it has a weighted sum of the pixels.
"""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu_parts import SHAPES, SMALL_SHAPES, Cases, Job, Record, timed
from rfl_jax.sampling.schedule import TRAIN_TIMESTEPS, make_sigmas, plan_spans

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TARGETS = r"blocks\.\d+\.(attn[12]\.to_([qkv]|out\.0)|ffn\.net\.(0\.proj|2))"
RANK, STEPS, SHIFT, FIRST_WITH_GRADIENT = 32, 8, 5.0, 4  # as the configurations have them
# What is left is flash, and what takes little memory for heads that are too wide for it, as the VAE's one is.
torch.backends.cuda.enable_cudnn_sdp(False)


def normal(*shape: int) -> Tensor:
    """Standard normal numbers on the device."""
    return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)


def built(network: Callable[..., Any], **sizes: Any) -> Any:
    """A network that does not train, its random weights made on the device in bfloat16."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            module = network(**sizes)
    finally:
        torch.set_default_dtype(torch.float32)
    return module.requires_grad_(False).eval()


def open_dit(job: Job) -> Any:
    """The job's DiT."""
    from diffusers import WanTransformer3DModel  # late, as attention is measured without diffusers

    c = job.dit
    return built(
        WanTransformer3DModel, num_attention_heads=c.num_heads, attention_head_dim=c.head_dim, in_channels=c.in_dim,
        out_channels=c.out_dim, text_dim=c.text_dim, freq_dim=c.freq_dim, ffn_dim=c.ffn_dim, num_layers=c.num_layers,
        eps=c.eps, cross_attn_norm=True,
    )  # fmt: skip


def open_decoder(job: Job) -> Callable[[Tensor], Tensor]:
    """The decoder of the job's VAE, latents to video, one latent frame at a time, each rematerialised."""
    from diffusers import AutoencoderKLWan
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify

    c = job.vae
    vae = built(
        AutoencoderKLWan, base_dim=c.dim, decoder_base_dim=c.decoder_dim, z_dim=c.z_dim, dim_mult=list(c.dim_mult),
        num_res_blocks=c.num_res_blocks, temperal_downsample=list(c.temporal_downsample),
        is_residual=c.version == "2.2", in_channels=3 * c.patch**2, out_channels=3 * c.patch**2,
    )  # fmt: skip
    convolutions = sum(isinstance(m, WanCausalConv3d) for m in vae.decoder.modules())

    def frame(z: Tensor, first: bool, *caches: Any) -> tuple[Any, ...]:
        kept = list(caches)
        return vae.decoder(z, feat_cache=kept, feat_idx=[0], first_chunk=first), *kept

    def decode(z: Tensor) -> Tensor:
        z = vae.post_quant_conv(z.to(torch.bfloat16))
        caches, frames = [None] * convolutions, []
        for i in range(z.shape[2]):
            out, *caches = checkpoint(frame, z[:, :, i : i + 1], i == 0, *caches, use_reentrant=False)
            frames.append(out)
        return unpatchify(torch.cat(frames, 2), c.patch).clamp(-1, 1)

    return decode


def run(job: Job, call: Callable[[], Any]) -> Record:
    """Times a call."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    found = timed(job, call, lambda _: torch.cuda.synchronize() if CUDA else None)
    return {**found, "peak": torch.cuda.max_memory_allocated() if CUDA else None}


def forward(job: Job, f: Callable[..., Tensor], *inputs: Tensor) -> Record:
    """Times a function."""
    return run(job, lambda: torch.no_grad()(f)(*inputs))


def both(job: Job, f: Callable[..., Tensor], g: Tensor, *inputs: Tensor) -> Record:
    """Times a function and the gradients of its inputs."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    return run(job, lambda: torch.autograd.grad(f(*inputs), inputs, g))


def about(job: Job) -> Cases:
    """The machine."""
    del job
    if not CUDA:
        raise RuntimeError(f"torch {torch.__version__} finds no GPU")
    facts = {"device": torch.cuda.get_device_name(), "versions": f"torch {torch.__version__}"}
    yield "", lambda: facts


def measure_attention(job: Job) -> Cases:
    """Flash attention."""
    f = F.scaled_dot_product_attention
    for tokens, heads in SMALL_SHAPES if job.small else SHAPES:
        g, *qkv = normal(4, 1, heads, tokens, job.dit.head_dim).unbind()
        case = f"{tokens:,} tokens, {heads} heads, forward"
        yield case, functools.partial(forward, job, f, *qkv)
        yield f"{case} and backward", functools.partial(both, job, f, g, *qkv)


def measure_layer(job: Job) -> Cases:
    """A DiT of one layer with embeddings and head, and the gradient of its input."""
    dit = open_dit(job)
    x, g = (normal(1, c, *job.latents) for c in (job.dit.in_dim, job.dit.out_dim))
    context, t = normal(1, job.dit.text_len, job.dit.text_dim), torch.full((1,), 500.0, device=DEVICE)
    case = f"{job.tokens:,} tokens, bfloat16 weights, forward"

    def f(x: Tensor) -> Tensor:
        return dit(x, t, context, return_dict=False)[0]

    yield case, functools.partial(forward, job, f, x)
    yield f"{case} and backward", functools.partial(both, job, f, g, x)


def measure_vae(job: Job) -> Cases:
    """The decoder, and the gradient of its latents."""
    decode, g, z = open_decoder(job), normal(1, 3, *job.video), normal(1, job.vae.z_dim, *job.latents)
    yield "forward", functools.partial(forward, job, decode, z)
    yield "forward and backward", functools.partial(both, job, decode, g, z)


class Step:
    """The denoising steps of the expert that trains, the decoder, and an update of the adapters by AdamW."""

    def __init__(self, job: Job) -> None:
        from peft import LoraConfig

        self._job, self._dit, self.decode = job, open_dit(job), open_decoder(job)
        self._dit.enable_gradient_checkpointing()
        adapters = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights=False)
        self._dit.add_adapter(adapters)
        self._trained = [p for p in self._dit.parameters() if p.requires_grad]
        for p in self._trained:
            p.data = p.data.to(torch.bfloat16)
        self._optimizer = torch.optim.AdamW(self._trained, 2.5e-6)
        c, sigmas = job.dit, make_sigmas(STEPS, SHIFT)
        spans = plan_spans(sigmas, boundary=c.boundary, mid=FIRST_WITH_GRADIENT, final=STEPS - 1)
        self._spans = [span for span in spans if span.expert == spans[-1].expert]
        self._sigmas = sigmas.tolist()
        self._noise, self._context = normal(1, c.out_dim, *job.latents), normal(1, c.text_len, c.text_dim)
        self._y = normal(1, c.out_dim if c.first_frame_in_latents else c.in_dim - c.out_dim, *job.latents)
        self.weights, self.loss = normal(1, 3, *job.video), torch.tensor(torch.nan)

    def _velocity(self, x: Tensor, i: int) -> Tensor:
        t = torch.full((1,), self._sigmas[i] * TRAIN_TIMESTEPS, device=DEVICE)
        if self._job.dit.first_frame_in_latents:
            later = torch.arange(self._job.latents[0], device=DEVICE) > 0
            t = (t * later).repeat_interleave(self._job.tokens // len(later))[None]
        else:
            x = torch.cat([x, self._y], 1)
        return self._dit(x.to(torch.bfloat16), t, self._context, return_dict=False)[0].float()

    @torch.no_grad()
    def _reference(self, x: Tensor, i: int) -> Tensor:
        self._dit.disable_adapters()
        v = self._velocity(x, i)
        self._dit.enable_adapters()
        return v

    def _kept(self, x: Tensor) -> Tensor:
        return torch.cat([self._y[:, :, :1], x[:, :, 1:]], 2) if self._job.dit.first_frame_in_latents else x

    def __call__(self) -> None:
        """One update."""
        self._optimizer.zero_grad()
        x, kl = self._kept(self._noise.float()), []
        for span in self._spans:
            for i in range(span.start, span.stop):
                with torch.set_grad_enabled(span.gradient):
                    v = self._velocity(x, i)
                if span.gradient:
                    kl.append(((v - self._reference(x, i)) ** 2).mean() / (2 * self._sigmas[i] ** 2))
                x = self._kept(x + (self._sigmas[i + 1] - self._sigmas[i]) * v)
        loss = (self.decode(x) * self.weights).mean() + torch.stack(kl).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self.loss = loss.detach()


def measure_step(job: Job) -> Cases:
    """The training step, and its part that the DiT's layers have no share in."""
    step, case, z = Step(job), f"{job.tokens:,} tokens", normal(1, job.vae.z_dim, *job.latents)
    yield case, lambda: {**run(job, step), "loss": step.loss.item()}
    yield case, lambda: {"rest_s": statistics.median(both(job, step.decode, step.weights, z)["seconds"])}


MEASURES = {
    "about": about,
    "attention": measure_attention,
    "layer": measure_layer,
    "vae": measure_vae,
    "step": measure_step,
}
