"""Hyper-Connections, Frac-Connections and successors for vision transformers; importing it registers timm names."""

from hcvision.connections import (
    Connection,
    FracConnection,
    GeneralizedConnection,
    HyperConnection,
    IdentityConnection,
    ManifoldConnection,
    Residual,
    build_connection,
    expand_streams,
    reduce_streams,
)
from hcvision.models import convert, create_model, dit_names, recompute_streams, register, set_stream_dtype, vit_names

__version__ = "0.1.0"
__all__ = [
    "Connection",
    "FracConnection",
    "GeneralizedConnection",
    "HyperConnection",
    "IdentityConnection",
    "ManifoldConnection",
    "Residual",
    "build_connection",
    "convert",
    "create_model",
    "dit_names",
    "expand_streams",
    "recompute_streams",
    "reduce_streams",
    "register",
    "set_stream_dtype",
    "vit_names",
]
