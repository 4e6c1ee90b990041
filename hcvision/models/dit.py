"""Diffusion transformers: DiT (arXiv 2212.09748) with the connections of ``hcvision.convert``.

A residual model is written here and converted like any timm model. Names::

    dit_{s,b,l,xl}_patch{2,4,8}_256      32 x 32 x 4 latents of 256 x 256 images, 1000 classes
    dit_{s,b,l,xl}_patch{2,4,8}_256_dhc4 its twin with connections
    dit_{tiny,s,b}_patch{2,4}_pixel      images themselves; ``img_size``, ``in_chans``, ``num_classes`` as wanted

The keys of the state dict are those of the official checkpoints, which load as they are. Letters in
shapes: B batch, C channels, H height, W width, N tokens, D embed_dim, P patch_size.
"""

import argparse
import math
from dataclasses import replace
from typing import Any

import torch
from timm.layers import GELUTanh, Mlp, PatchEmbed
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from hcvision.connections import NAMES as CONNECTIONS
from hcvision.models import borders
from hcvision.models.blocks import ConnectedBlock
from hcvision.models.families import BLOCKS, MODELS, Family
from hcvision.models.names import register_name


class TimestepEmbedder(nn.Module):
    """Sinusoids of t through an MLP: (B,) -> (B, D). Cosines come before sines, periods go up to 10,000."""

    def __init__(self, embed_dim: int, frequencies: int = 256, device: Any = None, dtype: Any = None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.frequencies = frequencies
        self.mlp = nn.Sequential(
            nn.Linear(frequencies, embed_dim, **dd), nn.SiLU(), nn.Linear(embed_dim, embed_dim, **dd)
        )

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequencies // 2
        rates = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(10000) / half))
        weight: Any = self.mlp[0].weight
        angles = t[:, None].to(torch.promote_types(weight.dtype, torch.float32)) * rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(weight.dtype))


class LabelEmbedder(nn.Module):
    """A row per class and a last one for no class: (B,) -> (B, D)."""

    def __init__(self, num_classes: int, embed_dim: int, device: Any = None, dtype: Any = None):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, embed_dim, device=device, dtype=dtype)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(B, N, D) by (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition c (adaLN-Zero)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(
            dim, num_heads=num_heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=nn.LayerNorm if qk_norm else None, **dd
        )
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=GELUTanh, **dd)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim, **dd))

    def forward(self, x: Tensor, c: Tensor, time: Tensor | None = None) -> Tensor:
        """(B, N, D) and the condition (B, D) -> (B, N, D). The time (B, D), which c holds, is for connections."""
        x = x + self.branch1(x, c)
        return x + self.branch2(x, c)

    def branch1(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = modulation(self.adaLN_modulation, c, 0, 2)
        return gate[:, None] * self.attn(modulate(self.norm1(x), shift, scale))

    def branch2(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = modulation(self.adaLN_modulation, c, 1, 2)
        return gate[:, None] * self.mlp(modulate(self.norm2(x), shift, scale))


def modulation(layers: nn.Sequential, c: Tensor, part: int, parts: int) -> tuple[Tensor, ...]:
    """One of several equal parts of what SiLU and Linear make of c, cut into shift, scale and gate of D each."""
    linear: Any = layers[1]
    rows = linear.out_features // parts
    at = slice(part * rows, (part + 1) * rows)
    return nn.functional.linear(layers[0](c), linear.weight[at], linear.bias[at]).split(c.shape[-1], dim=-1)


class ConnectedDiTBlock(ConnectedBlock):
    """The gate belongs to the branch. Connections may see the time."""

    sees_time = True
    branch1 = DiTBlock.branch1
    branch2 = DiTBlock.branch2

    @staticmethod
    def dim(block: Any) -> int:
        return block.norm1.normalized_shape[0]


class FinalLayer(nn.Module):
    """(B, N, D) -> (B, N, P*P*C)."""

    def __init__(self, dim: int, out_features: int, device: Any = None, dtype: Any = None):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out_features, **dd)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim, **dd))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = modulation(self.adaLN_modulation, c, 0, 1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """Diffusion transformer: what is the noise (or the velocity) in x at time t, for class y?

    Args:
        img_size: H and W of x: of latents an eighth of the image's, or of the image itself.
        patch_size: P.
        in_chans: C of x.
        num_classes: classes; y = num_classes stands for none.
        embed_dim: D.
        depth: blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP relative to D.
        learn_sigma: the output has 2 C channels, the second half for the variance.
        qk_norm: normalise queries and keys, which half precision wants.

    Raises:
        ValueError: P does not divide H or W, or D is not a multiple of 4 and of num_heads.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_chans: int = 4,
        num_classes: int = 1000,
        embed_dim: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        learn_sigma: bool = True,
        qk_norm: bool = False,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        if any(side % patch_size for side in size):
            raise ValueError(f"img_size must be a multiple of patch_size, got {size} and {patch_size}")
        if embed_dim % 4 or embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of 4 and of num_heads={num_heads}, got {embed_dim}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.img_size, self.patch_size, self.in_chans, self.num_classes = size, patch_size, in_chans, num_classes
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.learn_sigma = learn_sigma
        self.out_chans = in_chans * (2 if learn_sigma else 1)
        self.grad_checkpointing = False

        self.x_embedder = PatchEmbed(size, patch_size, in_chans, embed_dim, **dd)
        self.t_embedder = TimestepEmbedder(embed_dim, **dd)
        self.y_embedder = LabelEmbedder(num_classes, embed_dim, **dd)
        self.pos_embed = nn.Parameter(torch.empty(1, self.x_embedder.num_patches, embed_dim, **dd), requires_grad=False)
        self.blocks = nn.ModuleList([DiTBlock(embed_dim, num_heads, mlp_ratio, qk_norm, **dd) for _ in range(depth)])
        self.final_layer = FinalLayer(embed_dim, patch_size**2 * self.out_chans, **dd)
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": patch_size} for i in range(depth)
        ]
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """The paper's: Xavier, normal embeddings, and every gate and the output closed, so that the output is zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        projection: Any = self.x_embedder.proj
        nn.init.xavier_uniform_(projection.weight.flatten(1))
        nn.init.zeros_(projection.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for linear in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(linear.get_parameter("weight"), std=0.02)
        for module in (*self.blocks, self.final_layer):
            nn.init.zeros_(module.adaLN_modulation[1].weight)
            nn.init.zeros_(module.adaLN_modulation[1].bias)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)
        self.pos_embed.copy_(sincos_pos_embed(self.x_embedder.grid_size, self.embed_dim))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "y_embedder.embedding_table.weight"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^pos_embed|^x_embedder|^t_embedder|^y_embedder", "blocks": [(r"^blocks\.(\d+)", None)]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward(self, x: Tensor, t: Tensor, y: Tensor, tap: int = 0) -> Any:
        """Predict.

        Args:
            x: noisy images or latents, (B, C, H, W).
            t: time, (B,): a step in 0 .. 999, or any number that the objective uses.
            y: classes, (B,) in 0 .. num_classes; the last stands for none.
            tap: return the tokens behind so many blocks too; 0 returns none.

        Returns:
            (B, C, H, W), or (B, 2 C, H, W) with ``learn_sigma``. With a tap a tuple of it and of the tokens, (B, N, D),
            the mean of the streams where there are several, or what stands for x where a history is kept.
        """
        x = self.x_embedder(x) + self.pos_embed  # (B, N, D)
        time = self.t_embedder(t)  # (B, D)
        c = time + self.y_embedder(y)  # (B, D)
        tapped = x
        for i, block in enumerate(self.blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, c, time)
            else:
                x = block(x, c, time)
            if i + 1 == tap:
                tapped = borders.leave_streams(x, self.embed_dim, getattr(self.final_layer.norm_final, "tap", "mean"))
        x = self.final_layer(x, c)  # (B, N, P*P*C)
        grid, side = self.x_embedder.grid_size, self.patch_size
        x = x.unflatten(-1, (side, side, self.out_chans)).unflatten(1, (grid[0], grid[1]))  # (B, h, w, P, P, C)
        x = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return (x, tapped) if tap else x


def sincos_pos_embed(grid: tuple[int, int], dim: int) -> Tensor:
    """(1, h*w, D): sines and cosines of the column, then of the row."""
    rates = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    parts = [(place.flatten()[:, None] * rates) for place in (columns, rows)]
    return torch.cat([f(angles) for angles in parts for f in (torch.sin, torch.cos)], dim=1)[None].float()


BLOCKS[DiTBlock] = ConnectedDiTBlock
MODELS[DiT] = Family(exit="final_layer.norm_final")

SIZES = {
    "tiny": {"embed_dim": 192, "depth": 8, "num_heads": 3},
    "s": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "b": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "l": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "xl": {"embed_dim": 1152, "depth": 28, "num_heads": 16},
}
PATCHES = (2, 4, 8)
default_cfgs: dict[str, Any] = {}


TRUNK = {"pos_embed", "x_embedder.proj.weight", "t_embedder.mlp.0.weight", "final_layer.linear.weight"}


def read_sizes(state: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments of a ``DiT`` by the shapes of its weights, as far as they are there: classes, size and channels."""
    sizes: dict[str, Any] = {}
    if "y_embedder.embedding_table.weight" in state:
        sizes["num_classes"] = len(state["y_embedder.embedding_table.weight"]) - 1
    if {"pos_embed", "x_embedder.proj.weight", "final_layer.linear.weight"} <= state.keys():
        _, channels, patch, _ = state["x_embedder.proj.weight"].shape
        side = math.isqrt(state["pos_embed"].shape[1])
        sizes["in_chans"] = channels
        if side * side == state["pos_embed"].shape[1]:
            sizes["img_size"] = side * patch
        sizes["learn_sigma"] = len(state["final_layer.linear.weight"]) == 2 * channels * patch * patch
    return sizes


def averaged_weights(path: str) -> dict[str, Tensor] | None:
    """The averaged weights (``ema``) in the file of an official training run, None if it is no such file."""
    if path.endswith(".safetensors"):
        return None
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True).get("ema")


def averaged(cfg: Any) -> Any:
    """The same configuration; for the file of a training run, with its averaged weights in it."""
    if not cfg.file or cfg.state_dict or cfg.source in ("local-dir", "hf-hub"):
        return cfg
    state = averaged_weights(cfg.file)
    return cfg if state is None else replace(cfg, state_dict=state)


def register_dit(name: str, in_chans: int, **sizes: Any) -> str:
    def entrypoint(pretrained: bool = False, pretrained_cfg=None, pretrained_cfg_overlay=None, **kwargs) -> nn.Module:
        cfg: Any = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay)
        cfg = averaged(cfg) if pretrained else cfg
        return build_model_with_cfg(
            DiT, name, pretrained, pretrained_cfg=cfg, **{"in_chans": in_chans, **sizes, **kwargs}
        )

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"DiT of {sizes}."
    cfg = {
        "url": "", "num_classes": 1000, "input_size": (in_chans, 32, 32), "pool_size": None, "fixed_input_size": True,
        "mean": (0.5,) * in_chans, "std": (0.5,) * in_chans, "crop_pct": 1.0, "interpolation": "bicubic",
        "first_conv": "x_embedder.proj", "classifier": None, "license": "apache-2.0",
    }  # fmt: skip
    default_cfgs.update(generate_default_cfgs({name: cfg}))
    register_model(entrypoint)
    return name


LATENT = tuple(
    register_dit(f"dit_{size}_patch{patch}_256", 4, patch_size=patch, **SIZES[size])
    for size in ("s", "b", "l", "xl")
    for patch in PATCHES
)
PIXEL = tuple(
    register_dit(f"dit_{size}_patch{patch}_pixel", 3, patch_size=patch, **SIZES[size])
    for size in ("tiny", "s", "b")
    for patch in (2, 4)
)
NAMES = tuple(
    name
    for base in LATENT + PIXEL
    for name in (base, *(register_name(base, connection) for connection in (*CONNECTIONS, "dar4")))
)
