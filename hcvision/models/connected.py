"""What a model with connections does beside its blocks: enter the streams, leave them, show features."""

import inspect
from typing import TYPE_CHECKING, Any

import torch
from timm.models._features import feature_take_indices
from timm.models.cait import Cait
from timm.models.hiera import Hiera
from timm.models.xcit import Xcit
from torch import Tensor
from torch.utils._pytree import tree_map

from hcvision.connections import Connection
from hcvision.models import borders
from hcvision.models.grafting import own_class
from hcvision.models.stages import find_family


class ConnectedModel:
    """What the model itself has to know: which tensors are streams, and which parameters do not decay."""

    connection: str  # the name, or several joined by +

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def forward_intermediates(self, *args, **kwargs):
        out = super().forward_intermediates(*args, **kwargs)  # type: ignore[misc]
        family = find_family(self)  # type: ignore[arg-type]
        call = inspect.signature(own_class(self).forward_intermediates).bind(self, *args, **kwargs)  # type: ignore
        if not family.is_tapped or "." in family.blocks or (family.exit and call.arguments.get("norm")):
            return out  # taps at the ends of stages, or of a part that is converted itself, or behind the exit
        dim, tap = self.embed_dim, borders.find_tap(self)
        traceable: Any = (Tensor, torch.fx.Proxy)

        def leave(taps: Any) -> Any:
            return tree_map(lambda x: borders.leave_streams(x, dim, tap) if isinstance(x, traceable) else x, taps)

        def leave_last(x: Any) -> Any:
            return x if family.exit else leave(x)

        if isinstance(out, tuple):
            return leave_last(out[0]), leave(out[1])
        if isinstance(out, dict):
            return {key: (leave_last if key == "image_features" else leave)(part) for key, part in out.items()}
        return leave(out)

    def prune_intermediate_layers(self, *args, **kwargs):
        kept = super().prune_intermediate_layers(*args, **kwargs)  # type: ignore[misc]
        borders.place_borders(self)
        return kept

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        names = set(getattr(super(), "no_weight_decay", set)())
        for prefix, module in self.named_modules():
            if isinstance(module, Connection):
                names.update(f"{prefix}.{name}" for name in module.no_weight_decay())
        return names


class ClassAttentionModel(ConnectedModel):
    """CaiT, XCiT: behind the blocks the class token attends to x."""

    def forward_cls(self, x: Tensor) -> Tensor:
        return self.base_forward_cls(borders.leave_streams(x, self.embed_dim))


class HieraModel(ConnectedModel):
    """Hiera taps blocks inside its stages too (``coarse=False``)."""

    def forward_intermediates(self, *args, **kwargs):
        features = super().forward_intermediates(*args, **kwargs)
        call = inspect.signature(Hiera.forward_intermediates).bind(self, *args, **kwargs)
        call.apply_defaults()
        if call.arguments["coarse"]:
            return features
        indices, _ = feature_take_indices(len(self.blocks), call.arguments["indices"])
        taps = features if call.arguments["intermediates_only"] else features[1]
        for k, block in enumerate(indices):
            tap = taps[k].movedim(1, -1) if call.arguments["output_fmt"] == "NCHW" else taps[k]
            tap = borders.leave_streams(tap, self.blocks[block].dim_out, borders.find_tap(self))
            taps[k] = tap.movedim(-1, 1) if call.arguments["output_fmt"] == "NCHW" else tap
        return features


MIXINS: dict[type, type[ConnectedModel]] = {Cait: ClassAttentionModel, Hiera: HieraModel, Xcit: ClassAttentionModel}
