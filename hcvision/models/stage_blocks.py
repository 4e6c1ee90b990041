"""Blocks of models in stages, whose tokens become fewer and wider."""

from typing import Any

from timm.models import davit
from torch import Tensor, nn
from torch.nn import functional as F

from hcvision.connections import layout
from hcvision.models.blocks import ChannelMlp, ConnectedBlock, LayerScaleMlp, PlainMlp, PostNormMlp, channels


# Hierarchies: streams are left and entered again where the width changes
class SwinBlock(PlainMlp):
    def branch1(self, x: Tensor) -> Tensor:
        return self.drop_path1(self._attn(self.norm1(x)))


class SwinV2Block(PostNormMlp):
    def branch1(self, x: Tensor) -> Tensor:
        return self.drop_path1(self.norm1(self._attn(x)))


class SwinV2CrBlock(PostNormMlp):
    def branch1(self, x: Tensor) -> Tensor:
        return self.drop_path1(self.norm1(self._shifted_window_attn(x)))

    @staticmethod
    def find_obstacle(block: Any) -> str | None:
        return None if isinstance(block.norm3, nn.Identity) else "it normalises x itself"


class PvtBlock(ConnectedBlock):
    def branch1(self, x: Tensor, feat_size: list[int]) -> Tensor:
        return self.drop_path1(self.attn(self.norm1(x), feat_size))

    def branch2(self, x: Tensor, feat_size: list[int]) -> Tensor:
        return self.drop_path2(self.mlp(self.norm2(x), feat_size))


class HieraBlock(LayerScaleMlp):
    def branch1(self, x: Tensor) -> Tensor:
        return self.drop_path1(self.ls1(self.attn(self.norm1(x))))

    @staticmethod
    def find_obstacle(block: Any) -> str | None:
        return "it widens x" if block.do_expand else None


class ChannelsFirst(ConnectedBlock):
    @staticmethod
    def is_channels_first(block: Any) -> bool:
        return True


class DavitBlock(ChannelsFirst):
    """Four adds: a convolution as position encoding before the attention, and one before the MLP."""

    def branch1(self, x: Tensor) -> Tensor:
        return self.cpe1.act(self.cpe1.proj(x.movedim(3, 1))).movedim(1, 3)

    def branch3(self, x: Tensor) -> Tensor:
        return self.cpe2.act(self.cpe2.proj(x.movedim(3, 1))).movedim(1, 3)

    def branch4(self, x: Tensor) -> Tensor:
        return self.drop_path2(self.mlp(self.norm2(x)))

    @staticmethod
    def find_obstacle(block: Any) -> str | None:
        return None if block.mlp is not None else "it has no MLP"


class DavitSpatialBlock(DavitBlock):
    def branch2(self, x: Tensor) -> Tensor:
        H, W = x.shape[1], x.shape[2]
        rows, columns = self.window_size
        y = F.pad(self.norm1(x), (0, 0, 0, -W % columns, 0, -H % rows))
        windows = davit.window_partition(y, self.window_size).flatten(1, 2)
        windows = self.attn(windows).unflatten(1, (rows, columns))
        y = davit.window_reverse(windows, self.window_size, y.shape[1], y.shape[2])
        return self.drop_path1(y[:, :H, :W])


class DavitChannelBlock(DavitBlock):
    def branch2(self, x: Tensor) -> Tensor:
        tokens = self.norm1(x.flatten(1, 2))
        return self.drop_path1(self.attn(tokens)).unflatten(1, (x.shape[1], x.shape[2]))


class MetaformerBlock(ConnectedBlock):
    """Its res_scale belongs to the carried streams: each stream is scaled as timm scales x."""

    def branch1(self, x: Tensor) -> Tensor:
        if self.channels_first:
            x = x.movedim(3, 1)
        x = self.layer_scale1(self.drop_path1(self.token_mixer(self.norm1(x))))
        return x.movedim(1, 3) if self.channels_first else x

    def carry1(self, x: Tensor) -> Tensor:
        return self.join(self.res_scale1(self.split(x)))

    def branch2(self, x: Tensor) -> Tensor:
        if self.channels_first:
            x = x.movedim(3, 1)
        x = self.layer_scale2(self.drop_path2(self.mlp(self.norm2(x))))
        return x.movedim(1, 3) if self.channels_first else x

    def carry2(self, x: Tensor) -> Tensor:
        return self.join(self.res_scale2(self.split(x)))

    def split(self, x: Tensor) -> Tensor:
        """(B, H, W, n*C) -> (B, n, C, H, W), or (B, N, n*C) -> (B, N, n, C): what res_scale can scale."""
        x = layout.split_last(x, x.shape[-1] // self.connection1.dim)
        return x.permute(0, 3, 4, 1, 2) if self.channels_first else x

    def join(self, x: Tensor) -> Tensor:
        """Undoes ``split``."""
        return (x.permute(0, 3, 4, 1, 2) if self.channels_first else x).flatten(-2)

    @staticmethod
    def is_channels_first(block: Any) -> bool:
        return block.mlp.fc1.weight.dim() == 4


class ConvNeXtBlock(ChannelsFirst):
    def branch1(self, x: Tensor) -> Tensor:
        x = self.conv_dw(x.movedim(3, 1))
        x = self.mlp(self.norm(x)).movedim(1, 3) if self.use_conv_mlp else self.mlp(self.norm(x.movedim(1, 3)))
        if self.gamma is not None:
            x = x * self.gamma
        return self.drop_path(x)

    @staticmethod
    def dim(block: Any) -> int:
        return block.conv_dw.in_channels

    @staticmethod
    def find_obstacle(block: Any) -> str | None:
        return None if isinstance(block.shortcut, nn.Identity) else "it changes the shape of x"


class MetaNeXtBlock(ChannelsFirst):
    def branch1(self, x: Tensor) -> Tensor:
        x = self.mlp(self.norm(self.token_mixer(x.movedim(3, 1)))).movedim(1, 3)
        if self.gamma is not None:
            x = x * self.gamma
        return self.drop_path(x)

    @staticmethod
    def dim(block: Any) -> int:
        return channels(block.norm)


class FocalNetBlock(ChannelsFirst):
    def branch1(self, x: Tensor) -> Tensor:
        x = self.norm1_post(self.modulation(self.norm1(x.movedim(3, 1))))
        return self.drop_path1(self.ls1(x)).movedim(1, 3)

    def branch2(self, x: Tensor) -> Tensor:
        x = self.norm2_post(self.mlp(self.norm2(x.movedim(3, 1))))
        return self.drop_path2(self.ls2(x)).movedim(1, 3)

    @staticmethod
    def dim(block: Any) -> int:
        return block.dim


class SequencerBlock(ChannelMlp):
    def branch1(self, x: Tensor) -> Tensor:
        return self.drop_path(self.rnn_tokens(self.norm1(x)))


class NestBlock(PlainMlp):
    def branch1(self, x: Tensor) -> Tensor:
        return self.drop_path1(self.attn(self.norm1(x)))
