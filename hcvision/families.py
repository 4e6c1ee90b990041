"""What timm's blocks add to x, and where timm's models keep their blocks.

One class per block of timm: ``branch1``, ``branch2``, ... are the terms that its forward adds to x, in
order, and a connection takes the place of each add. One row per model class in ``MODELS``.
``hcvision.convert`` does the rest.
"""

import functools
import inspect
import linecache
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

import torch
from timm.models import (
    beit,
    cait,
    convit,
    convnext,
    davit,
    deepseek_vit,
    deit,
    eva,
    focalnet,
    hiera,
    inception_next,
    metaformer,
    mlp_mixer,
    naflexvit,
    nest,
    pit,
    pvt_v2,
    qwen3_vit,
    sequencer,
    swin_transformer,
    swin_transformer_v2,
    swin_transformer_v2_cr,
    vision_transformer,
    vision_transformer_relpos,
    vision_transformer_sam,
    xcit,
)
from torch import Tensor, nn
from torch.nn import functional as F

from hcvision import plain
from hcvision.connections import has_hooks


class ConnectedBlock:
    """A block of timm whose residual adds are connections.

    Its forward is made of the branches of the subclass; the parameters of a branch after x are
    parameters of the block, in the order in which they appear::

        x = self.connection1.enter(x, self.entry_rate)
        view, carried = self.connection1.width_connection(x)
        view, carried = self.connection2.join(self.branch1(view, rope), carried)
        ...                                                     # branch3, ...
        x = self.connection2.depth_connection(self.branch2(view), carried)
        return self.connection2.leave(x, self.exit_rate)

    Tensors are channels last here, whatever they are outside (``channels_first``). A block that
    scales x itself in an add has ``carry1``, ... too: it gets the streams and the scaled streams are
    carried, where timm's scaled x went into the add.

    The steps of a connection are called by name, so that two of them can be one kernel. Where a connection has hooks,
    those of this block are called as modules instead, ``x = self.connection1(x, branch)``: hooks see the streams
    before and behind a sub-layer, (..., S*E).
    """

    adds: int  # how many branches

    entry_rate: int  # copies of x that this block enters as streams, 1 for none
    exit_rate: int  # copies that it leaves, 1 for none
    channels_first: bool  # x is (B, C, H, W) outside

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __init_subclass__(cls) -> None:
        numbers = [k for k in range(1, 10) if hasattr(cls, f"branch{k}")]
        if numbers and numbers == list(range(1, len(numbers) + 1)) and "grafted" not in vars(cls):
            cls.adds = len(numbers)
            cls.forward = _compose(cls)  # type: ignore[attr-defined]

    @staticmethod
    def dim(block: Any) -> int:
        """The channels of x."""
        return channels(block.norm1)

    @staticmethod
    def is_channels_first(block: Any) -> bool:
        """Whether the tensors between blocks are (B, C, H, W)."""
        return False

    @staticmethod
    def why_not(block: Any) -> str:
        """Why this block has to keep its residual add, or nothing."""
        return ""


def _compose(mixin: type[ConnectedBlock]) -> Callable:
    """The forward of a block, from its branches, with a source that TorchScript and tracebacks can read."""
    extras: dict[str, inspect.Parameter] = {}
    numbers = range(1, mixin.adds + 1)
    hooked = " or ".join(f"has_hooks(self.connection{k})" for k in numbers)
    lines, calls = [], []
    for k in numbers:
        own = list(inspect.signature(getattr(mixin, f"branch{k}")).parameters.values())[2:]
        extras.update((parameter.name, parameter) for parameter in own)
        arguments = ", ".join(["view", *(parameter.name for parameter in own)])
        is_joined = k < mixin.adds and not hasattr(mixin, f"carry{k + 1}")
        if k == 1 or hasattr(mixin, f"carry{k}"):
            lines.append(f"    view, carried = self.connection{k}.width_connection(x)")
        if hasattr(mixin, f"carry{k}"):
            lines.append(f"    carried = self.connection{k}.carry(self.carry{k}(x), carried)")
        if is_joined:
            lines.append(f"    view, carried = self.connection{k + 1}.join(self.branch{k}({arguments}), carried)")
        else:
            lines.append(f"    x = self.connection{k}.depth_connection(self.branch{k}({arguments}), carried)")
        branch = ", ".join([f"self.branch{k}", *(f"{parameter.name}={parameter.name}" for parameter in own)])
        carry = f", self.carry{k}" if hasattr(mixin, f"carry{k}") else ""
        calls.append(f"    x = self.connection{k}(x, partial({branch}){carry})")
    leave = [
        f"    x = self.connection{mixin.adds}.leave(x, self.exit_rate)",
        "    return x.movedim(3, 1) if self.channels_first else x",
    ]
    lines = [
        "    if self.channels_first:",
        "        x = x.movedim(1, 3)",
        "    x = self.connection1.enter(x, self.entry_rate)",
        "    if torch.jit.is_scripting():",
        "        pass",
        f"    elif {hooked}:",
        *(f"    {line}" for line in calls + leave),
        *lines,
        *leave,
    ]
    signature = ", ".join(["self", "x: torch.Tensor", *map(str, extras.values())])
    source = f"def forward({signature}) -> torch.Tensor:\n" + "\n".join(lines) + "\n"
    scope = {"torch": torch, "Optional": Optional, "has_hooks": has_hooks, "partial": functools.partial}
    filename = f"<forward of {mixin.__module__}.{mixin.__qualname__}>"
    linecache.cache[filename] = len(source), None, source.splitlines(keepends=True), filename
    exec(compile(source, filename, "exec"), scope)
    return scope["forward"]  # type: ignore[return-value]


def channels(norm: Any) -> int:
    """What a norm normalises over."""
    shape = getattr(norm, "normalized_shape", None) or next(norm.parameters()).shape
    return shape[-1]


# Branches that several blocks share


class LayerScaleMlp(ConnectedBlock):
    def branch2(self, x: Tensor) -> Tensor:
        return self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class PlainMlp(ConnectedBlock):
    def branch2(self, x: Tensor) -> Tensor:
        return self.drop_path2(self.mlp(self.norm2(x)))


class GammaMlp(ConnectedBlock):
    def branch2(self, x: Tensor) -> Tensor:
        x = self.mlp(self.norm2(x))
        if self.gamma_2 is not None:
            x = self.gamma_2 * x
        return self.drop_path2(x)


class ChannelMlp(ConnectedBlock):
    def branch2(self, x: Tensor) -> Tensor:
        return self.drop_path(self.mlp_channels(self.norm2(x)))


class PostNormMlp(ConnectedBlock):
    def branch2(self, x: Tensor) -> Tensor:
        return self.drop_path2(self.norm2(self.mlp(x)))


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
            self.q_norm(plain.split_last(q, self.num_heads)).transpose(1, 2),
            self.k_norm(plain.split_last(k, self.num_heads)).transpose(1, 2),
            plain.split_last(v, self.num_heads).transpose(1, 2),
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
    def why_not(block: Any) -> str:
        return "" if isinstance(block.norm3, nn.Identity) else "it normalises x itself"


class PvtBlock(ConnectedBlock):
    def branch1(self, x: Tensor, feat_size: list[int]) -> Tensor:
        return self.drop_path1(self.attn(self.norm1(x), feat_size))

    def branch2(self, x: Tensor, feat_size: list[int]) -> Tensor:
        return self.drop_path2(self.mlp(self.norm2(x), feat_size))


class HieraBlock(LayerScaleMlp):
    def branch1(self, x: Tensor) -> Tensor:
        return self.drop_path1(self.ls1(self.attn(self.norm1(x))))

    @staticmethod
    def why_not(block: Any) -> str:
        return "it widens x" if block.do_expand else ""


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
    def why_not(block: Any) -> str:
        return "" if block.mlp is not None else "it has no MLP"


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
        x = plain.split_last(x, x.shape[-1] // self.connection1.dim)
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
    def why_not(block: Any) -> str:
        return "" if isinstance(block.shortcut, nn.Identity) else "it changes the shape of x"


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


BLOCKS: dict[type, type[ConnectedBlock]] = {
    vision_transformer.Block: VitBlock,
    vision_transformer.ResPostBlock: ResPostBlock,
    vision_transformer.ParallelThingsBlock: ParallelThingsBlock,
    vision_transformer.ParallelScalingBlock: ParallelScalingBlock,
    eva.EvaBlock: EvaBlock,
    eva.EvaBlockPostNorm: EvaBlockPostNorm,
    beit.Block: BeitBlock,
    vision_transformer_relpos.RelPosBlock: RelPosBlock,
    vision_transformer_relpos.ResPostRelPosBlock: ResPostRelPosBlock,
    deepseek_vit.DeepseekVitBlock: DeepseekVitBlock,
    convit.Block: ConvitBlock,
    cait.LayerScaleBlock: CaitBlock,
    xcit.XCABlock: XcitBlock,
    mlp_mixer.MixerBlock: MixerBlock,
    mlp_mixer.ResBlock: ResMlpBlock,
    mlp_mixer.SpatialGatingBlock: SpatialGatingBlock,
    vision_transformer_sam.Block: SamBlock,
    swin_transformer.SwinTransformerBlock: SwinBlock,
    swin_transformer_v2.SwinTransformerV2Block: SwinV2Block,
    swin_transformer_v2_cr.SwinTransformerV2CrBlock: SwinV2CrBlock,
    pvt_v2.Block: PvtBlock,
    hiera.HieraBlock: HieraBlock,
    davit.SpatialBlock: DavitSpatialBlock,
    davit.ChannelBlock: DavitChannelBlock,
    metaformer.MetaFormerBlock: MetaformerBlock,
    convnext.ConvNeXtBlock: ConvNeXtBlock,
    inception_next.MetaNeXtBlock: MetaNeXtBlock,
    focalnet.FocalNetBlock: FocalNetBlock,
    sequencer.Sequencer2dBlock: SequencerBlock,
    nest.TransformerLayer: NestBlock,
}


@dataclass(frozen=True)
class Family:
    """Where a model class keeps its blocks.

    ``blocks`` is the path of the container, with ``*`` for every child; a container is a column, and its
    streams are left at its end, in the last block. A model of one column that timm taps and cuts anywhere
    has ``exit``, the module that sees x behind the last block: the streams are left there, however many
    come, or ``taps`` where there is no such module. ``breaks`` says before which blocks of the column the
    model touches x itself, so that the streams have to be left and entered anew.
    """

    blocks: str = "blocks"
    exit: str = ""
    taps: bool = False
    breaks: Callable[[Any], Iterable[int]] = lambda model: ()

    @property
    def is_tapped(self) -> bool:
        return self.taps or bool(self.exit)


MODELS: dict[type, Family] = {
    vision_transformer.VisionTransformer: Family(exit="norm"),
    deit.VisionTransformerDistilled: Family(exit="norm"),
    naflexvit.NaFlexVit: Family(exit="norm"),
    eva.Eva: Family(exit="norm"),
    beit.Beit: Family(exit="norm"),
    vision_transformer_relpos.VisionTransformerRelPos: Family(exit="norm"),
    deepseek_vit.DeepseekVitEncoder: Family(exit="norm"),
    deepseek_vit.DeepseekVitClassifier: Family("encoder.blocks", exit="encoder.norm"),
    qwen3_vit.Qwen3VitEncoder: Family(taps=True),
    qwen3_vit.Qwen3VitClassifier: Family("encoder.blocks", taps=True),
    convit.ConVit: Family(exit="norm", breaks=lambda model: [model.local_up_to_layer]),  # the class token joins there
    cait.Cait: Family(exit="norm"),
    xcit.Xcit: Family(exit="norm"),
    mlp_mixer.MlpMixer: Family(exit="norm"),
    vision_transformer_sam.VisionTransformerSAM: Family(exit="neck"),
    pit.PoolingVisionTransformer: Family("transformers.*.blocks"),
    swin_transformer.SwinTransformer: Family("layers.*.blocks"),
    swin_transformer_v2.SwinTransformerV2: Family("layers.*.blocks"),
    swin_transformer_v2_cr.SwinTransformerV2Cr: Family("stages.*.blocks"),
    pvt_v2.PyramidVisionTransformerV2: Family("stages.*.blocks"),
    hiera.Hiera: Family(),
    davit.DaVit: Family("stages.*.blocks"),
    metaformer.MetaFormer: Family("stages.*.blocks"),
    convnext.ConvNeXt: Family("stages.*.blocks"),
    inception_next.MetaNeXt: Family("stages.*.blocks"),
    focalnet.FocalNet: Family("layers.*.blocks"),
    sequencer.Sequencer2d: Family("stages.*.blocks"),
    nest.Nest: Family("levels.*.transformer_encoder"),
}
