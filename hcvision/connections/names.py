"""Names of connections: ``dhc4`` and what it builds."""

import functools
import re
from collections.abc import Callable
from typing import Any

from hcvision.connections.base import Connection, Residual
from hcvision.connections.channelwise import ChannelwiseConnection
from hcvision.connections.frac import FracConnection
from hcvision.connections.gated import GatedConnection
from hcvision.connections.generalized import GeneralizedConnection
from hcvision.connections.hyper import HyperConnection
from hcvision.connections.identity import IdentityConnection
from hcvision.connections.kronecker import KroneckerConnection
from hcvision.connections.laurel import LaurelConnection
from hcvision.connections.manifold import ManifoldConnection
from hcvision.connections.orthogonal import OrthogonalConnection
from hcvision.connections.permutations import PermutationConnection

BUILDERS: dict[str, Callable[..., Connection]] = {  # by kind, called with dim, rate, layer_index and options
    "shc": functools.partial(HyperConnection, dynamic=False),
    "dhc": functools.partial(HyperConnection, dynamic=True),
    "sfc": functools.partial(FracConnection, dynamic=False),
    "dfc": functools.partial(FracConnection, dynamic=True),
    "mhc": ManifoldConnection,
    "ihc": IdentityConnection,
    "ghc": GeneralizedConnection,
    "sihc": ChannelwiseConnection,
    "gr": GatedConnection,
    "oru": OrthogonalConnection,
    "laurel": LaurelConnection,
    "mhclite": PermutationConnection,
    "krom": KroneckerConnection,
}
KINDS = tuple(BUILDERS)
ALONE = ("oru", "laurel")  # kinds that have no rate
SUCCESSORS = ("mhc4", "ihc4", "ghc2x3", "sihc4", "gr4", "oru", "laurel", "mhclite4", "krom4")
TIMED = ("shc", "dhc", "sfc", "dfc", "mhc", "ihc", "mhclite", "krom")  # can see the time of a diffusion model
NAMES = (*(f"{kind}{rate}" for kind in KINDS[:4] for rate in (2, 4, 8)), *SUCCESSORS)  # timm names end so


def parse_connection(name: str) -> tuple[str, Any]:
    """Split a connection's name into kind and rate: ``"dhc4"`` gives ``("dhc", 4)``, ``"ghc2x3"`` ``("ghc", (2, 3))``.

    ``"residual"`` gives ``("residual", 1)``, and so do kinds that have no rate. Every other spelling raises ValueError.
    """
    if name in ("residual", *ALONE):
        return name, 1
    match = re.fullmatch(rf"({'|'.join(KINDS)})([1-9]\d*)(?:x([1-9]\d*))?", name) if isinstance(name, str) else None
    if match is None or match[1] in ALONE or (match[1] == "ghc") != (match[3] is not None):
        rated = ", ".join(kind for kind in KINDS if kind not in ("ghc", *ALONE))
        alone = ", ".join(f"'{kind}'" for kind in ("residual", *ALONE))
        raise ValueError(
            f"connection must be {alone} or one of {rated} followed by a rate of at least 1, such as 'dhc2', or ghc "
            f"followed by fractions x segments, such as 'ghc2x3', got {name!r}"
        )
    return match[1], (int(match[2]), int(match[3])) if match[3] else int(match[2])


def build_connection(name: str, dim: int, layer_index: int = 0, **options) -> "Connection":
    """Build a connection from its name.

    Args:
        name: ``residual``; static/dynamic + hyper/frac + rate: ``shc2``, ``dhc4``, ``sfc2``, ``dfc4``; or a
            successor: ``mhc4``, ``ihc4``, ``ghc2x3``, ``sihc4``, ``gr4``, ``oru``, ``laurel``,
            ``mhclite4``, ``krom4``.
        dim: width of the model (timm's embed_dim).
        layer_index: index of the sub-layer, counted from 0 over attention and MLP alike.
        **options: keyword arguments of the class: ``tanh``, ``norm``, ``backend``, ``device``, ``dtype``, and
            for hyper-connections ``arrangement``, for mHC and its kin ``entry``. ``residual`` has no parameter and
            ignores them.

    Raises:
        ValueError: an unknown name, a dim that the frac rate does not divide, an option out of range.
        TypeError: an option that the connection does not have.
    """
    kind, rate = parse_connection(name)
    if kind == "residual":
        return Residual(dim)
    return BUILDERS[kind](dim, rate, layer_index, **options)
