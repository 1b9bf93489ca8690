"""Sizes of the Wan networks, and the presets that name the published checkpoints.

Figures from Wan-Video/Wan2.2 `wan/configs` and `wan/modules`.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Shape of a Wan2.2 diffusion transformer.

    Attributes:
        in_dim: channels of the input latents, conditioning channels included.
        out_dim: channels of the velocity.
        text_len: rows the text context is padded to.
        first_frame_in_latents: the first frame is written into the latents with timestep 0 on its tokens
            (TI2V-5B), instead of being concatenated as conditioning channels.
        boundary: `t >= boundary * 1000` belongs to the high-noise expert; None where one network serves all.
    """

    in_dim: int
    out_dim: int
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    first_frame_in_latents: bool = False
    boundary: float | None = None

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


DIT_PRESETS: dict[str, DiTConfig] = {
    "wan2_2_i2v_a14b": DiTConfig(
        in_dim=36, out_dim=16, dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, boundary=0.9
    ),
    "wan2_2_t2v_a14b": DiTConfig(
        in_dim=16, out_dim=16, dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, boundary=0.875
    ),
    "wan2_2_ti2v_5b": DiTConfig(
        in_dim=48, out_dim=48, dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, first_frame_in_latents=True
    ),
    "mini": DiTConfig(
        in_dim=36,
        out_dim=16,
        dim=128,
        ffn_dim=384,
        num_heads=4,
        num_layers=6,
        freq_dim=64,
        text_dim=32,
        text_len=32,
        boundary=0.9,
    ),
}


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Shape of a Wan causal video autoencoder.

    Attributes:
        version: "2.1" (plain residual stages) or "2.2" (2x2 pixel patches and averaging / duplicating shortcuts).
        dim: base width of the encoder; `decoder_dim` of the decoder.
        temporal_downsample: which of the spatial downsamplings also halve time.
        latent_mean, latent_std: per-channel statistics that normalise the latents.
    """

    version: str
    dim: int
    decoder_dim: int
    z_dim: int
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)

    @property
    def patch(self) -> int:
        return 2 if self.version == "2.2" else 1

    @property
    def stride(self) -> tuple[int, int, int]:
        """Video frames, rows and columns per latent one."""
        spatial = self.patch * 2 ** (len(self.dim_mult) - 1)
        return 2 ** sum(self.temporal_downsample), spatial, spatial


# wan/modules/vae2_1.py and vae2_2.py
WAN_2_1_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_2_1_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916,
)  # fmt: skip
WAN_2_2_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.157, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.052, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
WAN_2_2_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip

VAE_PRESETS: dict[str, VAEConfig] = {
    "wan2_1": VAEConfig("2.1", dim=96, decoder_dim=96, z_dim=16, latent_mean=WAN_2_1_MEAN, latent_std=WAN_2_1_STD),
    "wan2_2": VAEConfig("2.2", dim=160, decoder_dim=256, z_dim=48, latent_mean=WAN_2_2_MEAN, latent_std=WAN_2_2_STD),
}


def vae_preset(dit: DiTConfig) -> VAEConfig:
    """The published autoencoder whose latents a network denoises: the one with as many channels as its velocity.

    Raises:
        ValueError: no published autoencoder has that many.
    """
    for cfg in VAE_PRESETS.values():
        if cfg.z_dim == dit.out_dim:
            return cfg
    raise ValueError(f"no published autoencoder has latents of {dit.out_dim} channels")


def pixel_multiple(dit: DiTConfig) -> int:
    """What heights and widths of a network's videos are multiples of: the autoencoder's spatial stride times the patch."""
    return vae_preset(dit).stride[1] * dit.patch_size[1]
