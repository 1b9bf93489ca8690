"""CLIP: an image and a text as vectors of one space (openai/CLIP; the layouts of transformers' CLIPModel and of open_clip's CLIP).

A head of linear layers on the image's vector may come with it: LAION's aesthetic predictor.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from rfl_jax.models.layers import LayerNorm, Linear, lecun_normal

# Of the pixels that CLIP was trained on, by channel, 0 to 1.
PIXEL_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
PIXEL_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)

Fit = Literal["crop", "pad"]


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Sizes of both towers; the defaults are those of all published ones.

    Attributes:
        image_size, patch: sides in pixels of the square that is seen, and of the patches it is cut into.
        vision_dim, vision_ffn, vision_heads, vision_layers: of the tower that sees.
        vocab, text_len: tokens that there are, and that a text has.
        text_dim, text_ffn, text_heads, text_layers: of the tower that reads.
        projection: width of the space that both end in.
        quick_gelu: `x * sigmoid(1.702 x)` in place of GELU, as OpenAI's own weights were trained.
        head: widths of the layers of a head, from the first's input to the last's output; empty without one.
        eps: of the layer norms.
    """

    image_size: int
    patch: int
    vision_dim: int
    vision_ffn: int
    vision_heads: int
    vision_layers: int
    vocab: int
    text_len: int
    text_dim: int
    text_ffn: int
    text_heads: int
    text_layers: int
    projection: int
    quick_gelu: bool
    head: tuple[int, ...] = ()
    eps: float = 1e-5


VIT_L_14 = CLIPConfig(
    image_size=224, patch=14, vision_dim=1024, vision_ffn=4096, vision_heads=16, vision_layers=24,
    vocab=49408, text_len=77, text_dim=768, text_ffn=3072, text_heads=12, text_layers=12,
    projection=768, quick_gelu=True,
)  # fmt: skip
VIT_H_14 = CLIPConfig(
    image_size=224, patch=14, vision_dim=1280, vision_ffn=5120, vision_heads=16, vision_layers=32,
    vocab=49408, text_len=77, text_dim=1024, text_ffn=4096, text_heads=16, text_layers=24,
    projection=1024, quick_gelu=False,
)  # fmt: skip
AESTHETIC_HEAD = (768, 1024, 128, 64, 16, 1)


class SelfAttention(nnx.Module):
    def __init__(self, dim: int, heads: int, *, stack: tuple[int, ...], dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.q, self.k, self.v, self.out = (Linear(dim, dim, stack=stack, dtype=dtype, rngs=rngs) for _ in range(4))

    def __call__(self, x: Float[Array, "b n d"], *, causal: bool) -> Float[Array, "b n d"]:
        q, k, v = (rearrange(f(x), "b n (k d) -> b n k d", k=self.heads) for f in (self.q, self.k, self.v))
        # Softmax in float32; a few hundred tokens, the frames over the devices: no kernel of its own.
        out = jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="xla")
        return self.out(rearrange(out, "b n k d -> b n (k d)"))


class Block(nnx.Module):
    """One layer; as constructed it holds the weights of all layers, stacked on axis 0."""

    def __init__(
        self, dim: int, ffn: int, heads: int, layers: int, cfg: CLIPConfig, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        stack = (layers,)
        self.quick_gelu = cfg.quick_gelu
        self.norm1 = LayerNorm(dim, eps=cfg.eps, stack=stack, rngs=rngs)
        self.attn = SelfAttention(dim, heads, stack=stack, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(dim, eps=cfg.eps, stack=stack, rngs=rngs)
        self.up = Linear(dim, ffn, stack=stack, dtype=dtype, rngs=rngs)
        self.down = Linear(ffn, dim, stack=stack, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], *, causal: bool) -> Float[Array, "b n d"]:
        x = x + self.attn(self.norm1(x), causal=causal)
        h = self.up(self.norm2(x))
        h = h * jax.nn.sigmoid(1.702 * h) if self.quick_gelu else jax.nn.gelu(h, approximate=False)
        return x + self.down(h)


def _through(blocks: Block, x: Float[Array, "b n d"], *, causal: bool) -> Float[Array, "b n d"]:
    """All layers, one after the other. Backward each is computed again: what is kept is their inputs."""
    graph, layers = nnx.split(blocks)

    @jax.checkpoint
    def layer(x: Array, weights: nnx.State) -> tuple[Array, None]:
        return nnx.merge(graph, weights)(x, causal=causal), None

    return jax.lax.scan(layer, x, layers)[0]


class VisionTower(nnx.Module):
    """Images to vectors, differentiable in the pixels."""

    def __init__(self, cfg: CLIPConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        dim, tokens = cfg.vision_dim, (cfg.image_size // cfg.patch) ** 2 + 1
        self.cfg = cfg
        self.dtype = dtype
        self.patch = Linear(cfg.patch**2 * 3, dim, bias=False, dtype=dtype, rngs=rngs)
        self.summary = nnx.Param(lecun_normal(rngs, (dim,), dim))
        self.positions = nnx.Param(lecun_normal(rngs, (tokens, dim), dim))
        self.norm_in = LayerNorm(dim, eps=cfg.eps, rngs=rngs)
        self.blocks = Block(dim, cfg.vision_ffn, cfg.vision_heads, cfg.vision_layers, cfg, dtype=dtype, rngs=rngs)
        self.norm_out = LayerNorm(dim, eps=cfg.eps, rngs=rngs)
        self.projection = Linear(dim, cfg.projection, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, images: Float[Array, "n s s 3"]) -> Float[Array, "n e"]:
        """Vectors, float32, not normalised, of images as `prepare_images` makes them."""
        side = self.cfg.patch
        x = self.patch(rearrange(images, "n (h p) (w q) c -> n (h w) (p q c)", p=side, q=side))
        summary = self.summary[...].astype(self.dtype)
        summary = jnp.broadcast_to(summary, (x.shape[0], 1, summary.shape[0]))
        x = jnp.concatenate([summary, x], 1) + self.positions[...].astype(self.dtype)[None]
        x = _through(self.blocks, self.norm_in(x), causal=False)
        return self.projection(self.norm_out(x[:, 0])).astype(jnp.float32)


class TextTower(nnx.Module):
    """Texts to vectors."""

    def __init__(self, cfg: CLIPConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        dim = cfg.text_dim
        self.dtype = dtype
        self.embedding = nnx.Param(lecun_normal(rngs, (cfg.vocab, dim), dim))
        self.positions = nnx.Param(lecun_normal(rngs, (cfg.text_len, dim), dim))
        self.blocks = Block(dim, cfg.text_ffn, cfg.text_heads, cfg.text_layers, cfg, dtype=dtype, rngs=rngs)
        self.norm_out = LayerNorm(dim, eps=cfg.eps, rngs=rngs)
        self.projection = Linear(dim, cfg.projection, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, ids: Int[Array | np.ndarray, "n s"]) -> Float[Array, "n e"]:
        """Vectors, float32, not normalised, of token ids, which what follows the end marker does not change."""
        x = self.embedding[...][ids] + self.positions[...][None]
        x = self.norm_out(_through(self.blocks, x.astype(self.dtype), causal=True))
        # The end marker is the last token of the vocabulary.
        end = jnp.argmax(jnp.asarray(ids), 1)
        return self.projection(x[jnp.arange(x.shape[0]), end]).astype(jnp.float32)


class CLIP(nnx.Module):
    """Both towers.

    Args:
        cfg: sizes.
        dtype: of the arithmetic of the towers, but for norms and softmax, which use float32, as the head does.

    Attributes:
        text: None where it was dropped, as training needs no texts.
        logit_scale: [1] logarithm of what cosines were multiplied by in training.
        head: its layers.
    """

    def __init__(self, cfg: CLIPConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.cfg = cfg
        self.vision = VisionTower(cfg, dtype=dtype, rngs=rngs)
        self.text: TextTower | None = TextTower(cfg, dtype=dtype, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.full(1, np.log(100), jnp.float32))
        widths = zip(cfg.head, cfg.head[1:], strict=False)
        self.head = nnx.List([Linear(d_in, d_out, rngs=rngs) for d_in, d_out in widths])

    def rate(self, vectors: Float[Array, "*n e"]) -> Float[Array, "*n d"]:
        """What the head makes of vectors of length 1: its linear layers have nothing between them."""
        for layer in self.head:
            vectors = layer(vectors)
        return vectors


def prepare_images(frames: Float[Array, "n h w 3"], size: int, fit: Fit) -> Float[Array, "n s s 3"]:
    """Images as CLIP is given them, differentiable in the pixels: bicubic as PIL's, which smooths where it makes smaller; cut off at
    black and white; normalised.

    Args:
        frames: in [-1, 1].
        size: side of the square.
        fit: "crop": the shorter side fills it and the middle is kept, as in OpenAI's and transformers' preprocessing; "pad": the
            longer side does and black fills up the rest, as in HPS v2's.
    """
    n, height, width, _ = frames.shape
    shorter, longer = min(height, width), max(height, width)
    measure: Callable[[int], int] = (
        (lambda side: size * side // shorter) if fit == "crop" else (lambda side: round(size * side / longer))
    )
    rows, columns = measure(height), measure(width)
    x = (frames.astype(jnp.float32) + 1) / 2
    # One direction after the other, and cut off after each, as PIL's 8-bit numbers are.
    for shape in ((n, height, columns, 3), (n, rows, columns, 3)):
        if shape != x.shape:
            x = jnp.clip(jax.image.resize(x, shape, "cubic", antialias=True), 0, 1)
    if fit == "crop":
        top, left = (rows - size) // 2, (columns - size) // 2
        x = x[:, top : top + size, left : left + size]
    else:
        spare = [(size - rows, (size - rows) // 2), (size - columns, (size - columns) // 2)]
        x = jnp.pad(x, ((0, 0), *((first, total - first) for total, first in spare), (0, 0)))
    return (x - PIXEL_MEAN[None, None, None]) / PIXEL_STD[None, None, None]
