"""hcvision's commands, with the connections of the package hyper-connections in a ViT as one model more.

    pip install hyper-connections
    python benchmarks/peer.py compare --config benchmarks/peer.yaml --data.root data

``vit_tiny_patch16_224_peer`` is timm's ViT with the package's connections around the same branches: two streams with
``peer: dhc2``, two fractions with ``peer: dfc2`` among its model_args.
"""

from typing import Any

import timm
from connections import peer_blocks
from timm.models import register_model
from torch import nn

import hcvision_command

BASE = "vit_tiny_patch16_224"


@register_model
def vit_tiny_patch16_224_peer(pretrained: bool = False, peer: str = "dhc2", **kwargs: Any) -> nn.Module:
    """timm's ViT with connections of the package; their static parameters do not decay, as ours do not."""
    kwargs["pretrained_cfg"] = timm.get_pretrained_cfg(BASE)
    model: Any = timm.model_entrypoint(BASE)(pretrained=False, **kwargs)
    model.blocks = peer_blocks(model, peer)
    static = {name for name, _ in model.named_parameters() if "static_" in name or name.endswith("_scale")}
    model.no_weight_decay = lambda: {"pos_embed", "cls_token", "dist_token", *static}
    return model


if __name__ == "__main__":
    hcvision_command.main()
