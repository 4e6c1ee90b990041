"""Names of connections: ``dhc4`` and what it builds."""

import functools
import re
from collections.abc import Callable
from typing import Any

from hcvision.connections.attention import AttentionConnection, TimedConnection
from hcvision.connections.base import Connection, Residual
from hcvision.connections.channelwise import ChannelwiseConnection
from hcvision.connections.dense import DenseConnection
from hcvision.connections.frac import FracConnection
from hcvision.connections.gated import GatedConnection
from hcvision.connections.generalized import GeneralizedConnection
from hcvision.connections.history import HistoryConnection
from hcvision.connections.hyper import HyperConnection
from hcvision.connections.identity import IdentityConnection
from hcvision.connections.kronecker import KroneckerConnection
from hcvision.connections.laurel import LaurelConnection
from hcvision.connections.manifold import ManifoldConnection
from hcvision.connections.multiway import MultiwayConnection
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
    "dense": DenseConnection,
    "attnres": AttentionConnection,
    "dar": TimedConnection,
    "mudd": MultiwayConnection,
}
KINDS = tuple(BUILDERS)
NUMBER = r"([1-9]\d*)"
SPELLINGS = {  # what follows a kind, where it is not just its rate
    "ghc": f"{NUMBER}x{NUMBER}",
    "oru": "",
    "laurel": "",
    "dense": "",
    "attnres": f"{NUMBER}?",
    "dar": f"{NUMBER}?",
    "mudd": "",
}
SUCCESSORS = ("mhc4", "ihc4", "ghc2x3", "sihc4", "gr4", "oru", "laurel", "mhclite4", "krom4")
HISTORIES = ("dense", "attnres", "attnres4")
NEED_TIME = ("dar",)  # kinds for diffusion models alone
TIMED = ("shc", "dhc", "sfc", "dfc", "mhc", "ihc", "mhclite", "krom")  # can see the time of a diffusion model
NAMES = (*(f"{kind}{rate}" for kind in KINDS[:4] for rate in (2, 4, 8)), *SUCCESSORS, *HISTORIES)  # timm names end so


def parse_connection(name: str) -> tuple[str, Any]:
    """Split a connection's name into kind and rate: ``"dhc4"`` gives ``("dhc", 4)``, ``"ghc2x3"`` ``("ghc", (2, 3))``.

    ``"residual"`` gives ``("residual", 1)``, and so do kinds that have no rate. Every other spelling raises ValueError.
    """
    if name == "residual":
        return "residual", 1
    for kind in KINDS if isinstance(name, str) else ():
        match = re.fullmatch(kind + SPELLINGS.get(kind, NUMBER), name)
        if match:
            numbers = tuple(int(number) for number in match.groups() if number)
            return kind, numbers if len(numbers) > 1 else (*numbers, 1)[0]
    rated = ", ".join(kind for kind in KINDS if kind not in SPELLINGS)
    alone = ", ".join(f"'{kind}'" for kind in ("residual", *SPELLINGS) if kind != "ghc")
    raise ValueError(
        f"connection must be {alone} or one of {rated} followed by a rate of at least 1, such as 'dhc2', or ghc "
        f"followed by fractions x segments, such as 'ghc2x3', got {name!r}"
    )


def build_connection(name: str, dim: int, layer_index: int = 0, **options) -> "Connection":
    """Build a connection from its name.

    Args:
        name: ``residual``; static/dynamic + hyper/frac + rate: ``shc2``, ``dhc4``, ``sfc2``, ``dfc4``; or a
            successor: ``mhc4``, ``ihc4``, ``ghc2x3``, ``sihc4``, ``gr4``, ``oru``, ``laurel``,
            ``mhclite4``, ``krom4``; or one that reads a history: ``dense``, ``attnres``, ``attnres4``,
            in a ViT ``mudd``, in a diffusion model ``dar4``.
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


def has_history(kind: str) -> bool:
    """Whether connections of a kind read all earlier outputs instead of streams."""
    builder = BUILDERS.get(kind)
    return isinstance(builder, type) and issubclass(builder, HistoryConnection)
