"""Tables: the block of ours for each block of timm, and where each model of timm keeps its blocks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

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
from torch import nn

from hcvision.models.blocks import ConnectedBlock
from hcvision.models.column_blocks import (
    BeitBlock,
    CaitBlock,
    ConvitBlock,
    DeepseekVitBlock,
    EvaBlock,
    EvaBlockPostNorm,
    MixerBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    RelPosBlock,
    ResMlpBlock,
    ResPostBlock,
    ResPostRelPosBlock,
    SamBlock,
    SpatialGatingBlock,
    VitBlock,
    XcitBlock,
)
from hcvision.models.grafting import own_class
from hcvision.models.stage_blocks import (
    ConvNeXtBlock,
    DavitChannelBlock,
    DavitSpatialBlock,
    FocalNetBlock,
    HieraBlock,
    MetaformerBlock,
    MetaNeXtBlock,
    NestBlock,
    PvtBlock,
    SequencerBlock,
    SwinBlock,
    SwinV2Block,
    SwinV2CrBlock,
)

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


def find_mixin(block: nn.Module) -> type[ConnectedBlock]:
    mixin = BLOCKS.get(own_class(block))
    if mixin is None:
        known = ", ".join(sorted({cls.__name__ for cls in BLOCKS}))
        raise ValueError(f"cannot convert blocks of class {own_class(block).__name__}; the classes that work: {known}")
    return mixin
