"""Blocks of models that keep their tokens: ViT and its relatives, mixers."""

from typing import Any

import torch
from timm.models import vision_transformer_sam
from torch import Tensor
from torch.nn import functional as F

from hcvision.connections import layout
from hcvision.models.blocks import ChannelMlp, ConnectedBlock, GammaMlp, LayerScaleMlp, PlainMlp, PostNormMlp, channels


# Columns: one width from the first block to the last
class VitBlock(LayerScaleMlp):
    def branch1(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))


class ResPostBlock(PostNormMlp):
    def branch1(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return self.drop_path1(self.norm1(self.attn(x, attn_mask=attn_mask, is_causal=is_causal)))


class ParallelThingsBlock(ConnectedBlock):
    """The attentions of a block are one add, its MLPs another."""

    @staticmethod
    def dim(block: Any) -> int:
        return channels(block.attns[0].norm)

    def branch1(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        outputs = []
        for part in self.attns:
            y = part.attn(part.norm(x), attn_mask=attn_mask, is_causal=is_causal)
            outputs.append(part.drop_path(part.ls(y)))
        return torch.stack(outputs).sum(dim=0)

    def branch2(self, x: Tensor) -> Tensor:
        return torch.stack([part(x) for part in self.ffns]).sum(dim=0)


class ParallelScalingBlock(ConnectedBlock):
    """Attention and MLP share their projections (ViT-22B, arXiv 2302.05442) and are one add."""

    @staticmethod
    def dim(block: Any) -> int:
        return channels(block.in_norm)

    def branch1(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        hidden, q, k, v = self.in_proj(self.in_norm(x)).split(self.in_split, dim=-1)
        if self.mlp_bias is not None:
            hidden = hidden + self.mlp_bias
        y = F.scaled_dot_product_attention(
            self.q_norm(layout.split_last(q, self.num_heads)).transpose(1, 2),
            self.k_norm(layout.split_last(k, self.num_heads)).transpose(1, 2),
            layout.split_last(v, self.num_heads).transpose(1, 2),
            attn_mask=attn_mask,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            is_causal=is_causal,
        )
        y = y.transpose(1, 2).flatten(-2)
        hidden = self.mlp_drop(self.mlp_act(hidden))
        if self.out_proj is not None:
            y = self.out_proj(torch.cat((y, hidden), dim=-1))
        else:
            y = self.attn_out_proj(y) + self.mlp_out_proj(hidden)
        return self.drop_path(self.ls(y))


class EvaBlock(GammaMlp):
    def branch1(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        x = self.attn(self.norm1(x), rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        if self.gamma_1 is not None:
            x = self.gamma_1 * x
        return self.drop_path1(x)


class EvaBlockPostNorm(PostNormMlp):
    def branch1(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        return self.drop_path1(self.norm1(self.attn(x, rope=rope, attn_mask=attn_mask, is_causal=is_causal)))


class BeitBlock(GammaMlp):
    def branch1(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        x = self.attn(self.norm1(x), shared_rel_pos_bias=shared_rel_pos_bias)
        if self.gamma_1 is not None:
            x = self.gamma_1 * x
        return self.drop_path1(x)


class RelPosBlock(LayerScaleMlp):
    def branch1(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        return self.drop_path1(self.ls1(self.attn(self.norm1(x), shared_rel_pos=shared_rel_pos)))


class ResPostRelPosBlock(PostNormMlp):
    def branch1(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        return self.drop_path1(self.norm1(self.attn(x, shared_rel_pos=shared_rel_pos)))


class DeepseekVitBlock(PlainMlp):
    def branch1(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        return self.drop_path1(self.attn(self.norm1(x), rope=rope))


class ConvitBlock(ConnectedBlock):
    def branch1(self, x: Tensor) -> Tensor:
        return self.drop_path(self.attn(self.norm1(x)))

    def branch2(self, x: Tensor) -> Tensor:
        return self.drop_path(self.mlp(self.norm2(x)))


class CaitBlock(ConnectedBlock):
    def branch1(self, x: Tensor) -> Tensor:
        return self.drop_path(self.gamma_1 * self.attn(self.norm1(x)))

    def branch2(self, x: Tensor) -> Tensor:
        return self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


class XcitBlock(ConnectedBlock):
    def branch1(self, x: Tensor) -> Tensor:
        return self.drop_path1(self.gamma1 * self.attn(self.norm1(x)))

    def branch2(self, x: Tensor, H: int, W: int) -> Tensor:
        return self.drop_path3(self.gamma3 * self.local_mp(self.norm3(x), H, W))

    def branch3(self, x: Tensor) -> Tensor:
        return self.drop_path2(self.gamma2 * self.mlp(self.norm2(x)))


class MixerBlock(ChannelMlp):
    def branch1(self, x: Tensor) -> Tensor:
        return self.drop_path(self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2))


class ResMlpBlock(ConnectedBlock):
    def branch1(self, x: Tensor) -> Tensor:
        return self.drop_path(self.ls1 * self.linear_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2))

    def branch2(self, x: Tensor) -> Tensor:
        return self.drop_path(self.ls2 * self.mlp_channels(self.norm2(x)))


class SpatialGatingBlock(ConnectedBlock):
    @staticmethod
    def dim(block: Any) -> int:
        return channels(block.norm)

    def branch1(self, x: Tensor) -> Tensor:
        return self.drop_path(self.mlp_channels(self.norm(x)))


class SamBlock(LayerScaleMlp):
    def branch1(self, x: Tensor) -> Tensor:
        size = (x.shape[1], x.shape[2])
        x = self.norm1(x)
        padded: tuple[int, int] | None = None
        if self.window_size > 0:
            x, padded = vision_transformer_sam.window_partition(x, self.window_size)
        x = self.drop_path1(self.ls1(self.attn(x)))
        if self.window_size > 0:
            x = vision_transformer_sam.window_unpartition(x, self.window_size, size, padded)
        return x
