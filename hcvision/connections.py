"""Connections: what stands where a transformer had the residual add ``x = x + branch(x)``.

A connection carries S streams of width E side by side on the last axis of x, and gives the
branch V mixtures of them, the views::

    H = x.unflatten(-1, (S, E))
    alpha, beta = connection.weights(x)                       # (..., S, V+S), (..., S)
    views, carried = (alpha^T @ H).split((V, S), dim=-2)      # width_connection(x)
    x = beta * branch(views) + carried                        # depth_connection(branch(views), carried)

=========================  =============  =========  =======  =======  =====================================
class                      name           streams S  views V  width E  source
=========================  =============  =========  =======  =======  =====================================
``Residual``               ``residual``   1          1        dim      He et al. 2015, arXiv 1512.03385
``HyperConnection``        ``shc2 dhc4``  n          1        dim      Hyper-Connections, arXiv 2409.19606
``FracConnection``         ``sfc2 dfc4``  m          m        dim / m  Frac-Connections, arXiv 2503.14125
``ManifoldConnection``     ``mhc4``       n          1        dim      mHC, arXiv 2512.24880
``IdentityConnection``     ``ihc4``       n          1        dim      mHC that never mixes its streams
``GeneralizedConnection``  ``ghc2x3``     n          m        dim / m  Virtual Width Networks, arXiv 2511.11238
=========================  =============  =========  =======  =======  =====================================

The first three, the seam and the update rule are here; the successors, which differ in how their
weights come about, are in ``hcvision.successors``.

Letters in shapes: B batch, N tokens, S streams, V views, E stream width, K mixtures.
"""

import contextlib
import functools
import inspect
import re
import types
from collections.abc import Callable, Iterator
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary

from hcvision import kernels

KINDS = ("shc", "dhc", "sfc", "dfc", "mhc", "ihc", "ghc")
NAMES = (*(f"{kind}{rate}" for kind in KINDS[:4] for rate in (2, 4, 8)), "mhc4", "ihc4", "ghc2x3")  # timm names end so
ARRANGEMENTS = ("sequential", "parallel")
BACKENDS = ("auto", "torch", "triton")
MOST_COEFFICIENTS = 80  # of a token, for the kernels that auto takes: dhc8, dfc5

Rule = Tuple[Tensor, Tensor, Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor]]
Options = Tuple[bool, bool, bool, str]


def parse_connection(name: str) -> tuple[str, Any]:
    """Split a connection's name into kind and rate: ``"dhc4"`` gives ``("dhc", 4)``, ``"ghc2x3"`` ``("ghc", (2, 3))``.

    ``"residual"`` gives ``("residual", 1)``. Every other spelling raises ValueError.
    """
    if name == "residual":
        return "residual", 1
    match = re.fullmatch(rf"({'|'.join(KINDS)})([1-9]\d*)(?:x([1-9]\d*))?", name) if isinstance(name, str) else None
    if match is None or (match[1] == "ghc") != (match[3] is not None):
        raise ValueError(
            f"connection must be 'residual' or one of {', '.join(KINDS[:-1])} followed by a rate of at least 1, such "
            f"as 'dhc2', or ghc followed by fractions x segments, such as 'ghc2x3', got {name!r}"
        )
    return match[1], (int(match[2]), int(match[3])) if match[3] else int(match[2])


def build_connection(name: str, dim: int, layer_index: int = 0, **options) -> "Connection":
    """Build a connection from its name.

    Args:
        name: ``residual``; static/dynamic + hyper/frac + rate: ``shc2``, ``dhc4``, ``sfc2``, ``dfc4``; or a
            successor: ``mhc4``, ``ihc4``, ``ghc2x3``.
        dim: width of the model (timm's embed_dim).
        layer_index: index of the sub-layer, counted from 0 over attention and MLP alike.
        **options: keyword arguments of the class: ``tanh``, ``norm``, ``backend``, ``device``, ``dtype``, and
            for hyper-connections ``arrangement``. ``residual`` has no parameter and ignores them.

    Raises:
        ValueError: an unknown name, a dim that the frac rate does not divide, an option out of range.
        TypeError: an option that the connection does not have.
    """
    kind, rate = parse_connection(name)
    if kind == "residual":
        return Residual(dim)
    return BUILDERS[kind](dim, rate, layer_index, **options)


def expand_streams(x: Tensor, rate: int) -> Tensor:
    """Enter the streams: n copies of x side by side (HC alg. 2). (..., E) -> (..., n*E)."""
    return torch.cat([x] * rate, dim=-1) if rate > 1 else x


def reduce_streams(x: Tensor, rate: int) -> Tensor:
    """Leave the streams: their mean. (..., n*E) -> (..., E).

    The paper takes the sum (HC alg. 2). The final norm that follows makes the two equal up to its
    eps, and only the mean makes a converted pretrained model exactly itself.
    """
    return average_streams(x, rate) if rate > 1 else x


class Connection(nn.Module):
    """What all connections have: ``dim``, ``streams`` S, ``views`` V, and ``width`` = S * dim / V.

    ``width`` is the size of the last axis of x, the tensor between blocks.
    """

    copies: int  # of x that are entered, 1 where x is its own streams
    undecayed: tuple[str, ...] = ()  # parameters that must not decay
    has_exit = False  # whether ``leave`` has parameters

    def __init__(self, dim: int, streams: int, views: int):
        super().__init__()
        self.dim = dim
        self.streams = streams
        self.views = views
        self.width = streams * (dim // views)
        self.copies = streams // views

    @torch.jit.ignore
    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """Do what ``x + branch(x)`` did.

        Args:
            x: the streams, (..., S*E).
            branch: the sub-layer with its pre-norm, (..., V*E) -> (..., V*E).

        Returns:
            The next streams, (..., S*E), in the dtype of x.

        Raises:
            ValueError: x is not S*E wide, or the branch returned another shape than it was given.
        """
        branch_input, carried = self.width_connection(x)
        return self.depth_connection(branch(branch_input), carried)

    def enter(self, x: Tensor, rate: int) -> Tensor:
        """Before the first sub-layer: the streams of x, (..., dim) -> (..., width); x itself at a rate of 1."""
        return expand_streams(x, rate)

    def leave(self, x: Tensor, rate: int) -> Tensor:
        """Behind the last one: what ``enter`` does undone, (..., width) -> (..., dim)."""
        return reduce_streams(x, rate)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that must not decay: it would erode A_r, which starts as I."""
        return {name for name, _ in self.named_parameters() if name in self.undecayed}

    def width_connection(self, x: Tensor) -> Tuple[Tensor, Any]:
        raise NotImplementedError

    def depth_connection(self, branch_output: Tensor, carried: Any) -> Tensor:
        raise NotImplementedError

    def carry(self, x: Tensor, carried: Any) -> Any:
        raise NotImplementedError

    def join(self, branch_output: Tensor, carried: Any) -> Tuple[Tensor, Any]:
        raise NotImplementedError


class Residual(Connection):
    """The residual add itself, ``x + branch(x)`` on (..., dim), without a parameter."""

    def __init__(self, dim: int):
        super().__init__(dim, streams=1, views=1)

    def weights(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """alpha = [[1, 1]] and beta = [1] for every token: (..., 1, 2) and (..., 1)."""
        beta = torch.ones_like(split_streams(x, 1, self.dim)[..., 0])
        return torch.stack([beta, beta], dim=-1), beta

    def width_connection(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """The branch input is x, and x is carried."""
        x = split_streams(x, 1, self.dim).squeeze(-2)
        return x, x

    def depth_connection(self, branch_output: Tensor, carried: Tensor) -> Tensor:
        """carried + branch_output, both (..., dim)."""
        return carried + split_output(branch_output, carried.unsqueeze(-2), 1).squeeze(-2)

    def carry(self, x: Tensor, carried: Tensor) -> Tensor:
        """x."""
        return split_streams(x, 1, self.dim).squeeze(-2)

    def join(self, branch_output: Tensor, carried: Tensor) -> Tuple[Tensor, Tensor]:
        """The add of the sub-layer before, and what this one reads."""
        return self.width_connection(self.depth_connection(branch_output, carried))

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class StreamConnection(Connection):
    """What all connections with streams have in common: the two steps, and their weights alpha and beta.

    Subclasses say where the weights come from (``read``). Mixing is elementwise and in float32 at least, whatever
    autocast says: the streams are the model's memory, and a matmul in bfloat16 would round them in every sub-layer.
    """

    has_kernels = True  # whether any step has a kernel
    __jit_unused_properties__ = ["name"]  # noqa: RUF012 - TorchScript
    parts: Any = {"width": ("alpha",), "depth": ("beta",)}  # what parameters of a part have in their names  # noqa: RUF012

    def __init__(self, dim: int, rate: int, streams: int, views: int, layer_index: int, backend: str):
        super().__init__(dim, streams, views)
        self.rate, self.layer_index = rate, layer_index
        self.stream_dim = dim // views
        self.recompute = False  # the streams that are read are computed again in backward; see ``recompute_streams``
        self.records = False  # and those that are written: how they can be goes with them
        self.backend = "auto"
        self.choose_backend(backend)

    @property
    def name(self) -> str:
        """The name that ``build_connection`` makes such a connection from."""
        raise NotImplementedError

    @torch.jit.ignore
    def choose_backend(self, backend: str) -> None:
        """Run by ``auto``, ``torch`` or ``triton``; see ``HyperConnection``.

        Raises:
            ValueError: there is no such backend, or no kernel for this connection.
        """
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        if backend == "triton" and not self.has_kernels:
            raise ValueError(f"backend='triton' has no kernels for {self.name}; backend='auto' takes PyTorch")
        self.backend = backend

    def read(self, streams: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Streams (..., S, E) -> the branch input (..., V*E), and the carried streams in four parts."""
        raise NotImplementedError

    def weights(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """What the connection does with x, in float32 at least.

        Args:
            x: the streams, (..., S*E).

        Returns:
            alpha (..., S, V+S): row i says how much of stream i goes into each of the V views, then
            into each of the S carried streams. beta (..., S): how much of the branch output each
            stream takes; of GHC (..., S, V): of each view.

        Raises:
            ValueError: x is not S*E wide.
        """
        _, alpha, beta, _ = self.width_connection(x)[1]
        return self.whole_alpha(alpha), beta

    @torch.jit.ignore
    def whole_alpha(self, alpha: Tensor) -> Tensor:
        """(..., S, V+S) of the alpha that goes from step to step."""
        return alpha

    def width_connection(self, x: Tensor) -> Tuple[Tensor, Tuple[Tensor, Tensor, Tensor, Tensor]]:
        """First step: the branch input, and what the second step makes the carried streams of.

        Args:
            x: the streams, (..., S*E).

        Returns:
            The branch input, (..., V*E), in the dtype of x, and the carried streams for
            ``depth_connection``, which forms them: the streams (..., S, E), alpha (..., S, V+S) and beta
            (..., S), the coefficients in float32 at least, and the link (..., S, E), which stands for the
            carried streams in the graph of gradients.

        Raises:
            ValueError: x is not S*E wide, or backend ``triton`` cannot take it.
        """
        streams = split_streams(x, self.streams, self.stream_dim)
        if torch.jit.is_scripting():
            pass
        elif self.recompute:
            with keep_recipe(x, streams):
                view, streams, alpha, beta, link = self.read(streams)
            return view, (streams, alpha, beta, link)
        view, streams, alpha, beta, link = self.read(streams)
        return view, (streams, alpha, beta, link)

    def depth_connection(self, branch_output: Tensor, carried: Tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """Second step: the next streams. The carried streams are formed here, and only here.

        Args:
            branch_output: (..., V*E).
            carried: what ``width_connection`` returned beside the branch input.

        Returns:
            The next streams, (..., S*E), in the dtype of x.

        Raises:
            ValueError: branch_output is not shaped like the branch input.
        """
        return self.write(branch_output, carried, self.records)

    def write(self, branch_output: Tensor, carried: Tuple[Tensor, Tensor, Tensor, Tensor], records: bool) -> Tensor:
        """``depth_connection``; ``records`` says whether the next streams can be computed again."""
        streams, alpha, beta, link = carried
        output = split_output(branch_output, streams, self.views)
        if torch.jit.is_scripting():
            pass
        elif records and torch.is_grad_enabled():
            return recomputable(streams, output, alpha, beta, link, self.backend)
        return depth_connection(streams, output, alpha, beta, link, self.backend)

    def join(
        self, branch_output: Tensor, carried: Tuple[Tensor, Tensor, Tensor, Tensor]
    ) -> Tuple[Tensor, Tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The second step of the sub-layer before, and the first step of this one; some have kernels that do both.

        Args:
            branch_output: of the sub-layer before, (..., V*E).
            carried: what its ``width_connection`` returned beside the branch input.

        Returns:
            What ``width_connection`` returns for the next streams.

        Raises:
            ValueError: branch_output is not shaped like the branch input.
        """
        return self.width_connection(self.write(branch_output, carried, self.recompute))

    def carry(self, x: Tensor, carried: Tuple[Tensor, Tensor, Tensor, Tensor]) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        """Between the steps, for blocks that scale x in their add: carry these streams, (..., S*E), instead.

        Raises:
            ValueError: x is not S*E wide.
        """
        _, alpha, beta, _ = carried
        streams = split_streams(x, self.streams, self.stream_dim)
        return streams, alpha, beta, carry_streams(streams, alpha, self.views)


class MixingConnection(StreamConnection):
    """The weights of HC, FC and GHC, which differ in S and V, in the norm and in the initial values.

    Static weights are parameters; dynamic ones add to them what each stream says of itself (HC eq.
    10-14, FC eq. 8-12)::

        alpha = static_alpha + dynamic_alpha_scale * tanh(norm(H) @ dynamic_alpha_fn)
        beta  = static_beta  + dynamic_beta_scale  * tanh(norm(H) @ dynamic_beta_fn)

    ``static_alpha`` (S, V+S) is the papers' [A_m | A_r], ``static_beta`` (S,) is B,
    ``dynamic_alpha_fn`` (E, V+S) is [W_m | W_r], ``dynamic_beta_fn`` (E, 1) is W_beta, and the
    scales (1,) are s_alpha and s_beta.
    """

    __constants__ = ["center_norm"]  # noqa: RUF012 - TorchScript
    center_norm = True  # the dynamic weights see LayerNorm (True) or RMSNorm (False) of a stream
    first_scale = 0.01
    undecayed = ("static_alpha", "static_beta", "dynamic_alpha_scale", "dynamic_beta_scale", "norm_weight")

    def __init__(
        self,
        dim: int,
        rate: int,
        views: int,
        layer_index: int,
        dynamic: bool,
        tanh: bool,
        norm: bool,
        backend: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        is_general: bool = False,
    ):
        super().__init__(dim, rate, rate, views, layer_index, backend)
        self.dynamic, self.tanh, self.norm = dynamic, tanh, norm
        mixtures = views + rate

        def parameter(wanted: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if wanted else None

        beta = (rate, views) if is_general else (rate,)
        self.static_alpha: Any = parameter(True, rate, mixtures)
        self.static_beta: Any = parameter(True, *beta)
        self.dynamic_alpha_fn: Any = parameter(dynamic, self.stream_dim, mixtures)
        self.dynamic_beta_fn: Any = parameter(dynamic, self.stream_dim, views if is_general else 1)
        self.dynamic_alpha_scale: Any = parameter(dynamic, *((rate, mixtures) if is_general else (1,)))
        self.dynamic_beta_scale: Any = parameter(dynamic, *(beta if is_general else (1,)))
        self.norm_weight: Any = parameter(dynamic and norm and not self.center_norm, self.stream_dim)

    def initial_weights(self) -> tuple[Tensor, Tensor]:
        """``static_alpha`` (S, V+S) and ``static_beta`` at init, float32, on the CPU."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every parameter to its initial value."""
        alpha, beta = self.initial_weights()
        self.static_alpha.copy_(alpha)
        self.static_beta.copy_(beta)
        if self.dynamic:
            self.dynamic_alpha_fn.zero_()
            self.dynamic_beta_fn.zero_()
            self.dynamic_alpha_scale.fill_(self.first_scale)
            self.dynamic_beta_scale.fill_(self.first_scale)
        if self.norm_weight is not None:
            self.norm_weight.fill_(1.0)

    def rule(self) -> Rule:
        """The parameters, for the functions below."""
        return (
            self.static_alpha,
            self.static_beta,
            self.dynamic_alpha_fn,
            self.dynamic_beta_fn,
            self.dynamic_alpha_scale,
            self.dynamic_beta_scale,
            self.norm_weight,
        )

    def options(self) -> Options:
        """norm, center, tanh and backend."""
        return self.norm, self.center_norm, self.tanh, self.backend

    def read(self, streams: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Streams (..., S, E) -> the branch input (..., V*E), and the carried streams in four parts."""
        return width_connection(streams, self.rule(), self.options())

    def join(
        self, branch_output: Tensor, carried: Tuple[Tensor, Tensor, Tensor, Tensor]
    ) -> Tuple[Tensor, Tuple[Tensor, Tensor, Tensor, Tensor]]:
        """See ``StreamConnection``."""
        if torch.jit.is_scripting():
            pass
        elif self.recompute:
            return self.width_connection(self.write(branch_output, carried, True))
        streams, alpha, beta, link = carried
        output = split_output(branch_output, streams, self.views)
        view, streams, alpha, beta, link = join_connections(
            streams, output, alpha, beta, link, self.rule(), self.options()
        )
        return view, (streams, alpha, beta, link)

    def extra_repr(self) -> str:
        options = "".join(f", {name}=False" for name in ("tanh", "norm") if not getattr(self, name))
        return f"dim={self.dim}, rate={self.rate}, layer_index={self.layer_index}, dynamic={self.dynamic}{options}"


class HyperConnection(MixingConnection):
    """Hyper-Connection: n streams as wide as the model, one view (HC, arXiv 2409.19606).

    Enter with ``expand_streams`` and leave with ``reduce_streams``. At init sub-layer k reads stream
    k mod n and writes to all streams, so that each stream is the Pre-Norm residual stream exactly.
    The norm before the dynamic projection is LayerNorm without parameters.

    Args:
        dim: width of the model, which is E.
        rate: expansion rate n.
        layer_index: k, counted from 0 over sub-layers: attention of block i is 2i, its MLP 2i + 1.
        dynamic: weights depend on the input (DHC) or not (SHC).
        tanh: squash the dynamic part.
        norm: normalise the streams before the dynamic projection.
        arrangement: ``sequential``, or ``parallel``: sub-layers start out in groups of n that read
            the same input (HC fig. 4, eq. 53-55).
        backend: ``torch``; ``triton``, the kernels of ``hcvision.kernels``, which raise where they cannot run;
            or ``auto``, which takes them for CUDA tensors that they can take.

    Raises:
        ValueError: rate < 1, layer_index < 0, an unknown arrangement or backend.
    """

    def __init__(
        self,
        dim: int,
        rate: int,
        layer_index: int = 0,
        *,
        dynamic: bool = True,
        tanh: bool = True,
        norm: bool = True,
        arrangement: str = "sequential",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_count("rate", rate, 1)
        check_count("layer_index", layer_index, 0)
        if arrangement not in ARRANGEMENTS:
            raise ValueError(f"arrangement must be one of {', '.join(ARRANGEMENTS)}, got {arrangement!r}")
        super().__init__(dim, rate, 1, layer_index, dynamic, tanh, norm, backend, device, dtype)
        self.arrangement = arrangement
        self.reset_parameters()

    @property
    def name(self) -> str:
        """``shc2``, ``dhc4``, ..."""
        return f"{'d' if self.dynamic else 's'}hc{self.rate}"

    def initial_weights(self) -> tuple[Tensor, Tensor]:
        """HC eq. 15, or eq. 53-55 for the parallel arrangement; see ``StreamConnection``."""
        n, place = self.rate, self.layer_index % self.rate
        one, eye = torch.eye(n)[place], torch.eye(n)
        if self.arrangement == "sequential":
            read, carry, write = one, eye, torch.ones(n)
        elif place == 0:
            read, carry, write = torch.ones(n), torch.ones(n, n), one
        else:
            read, carry, write = one, eye, one
        return torch.cat([read[:, None], carry], dim=1), write


class FracConnection(MixingConnection):
    """Frac-Connection: the hidden state cut into m streams, m views (FC, arXiv 2503.14125).

    It needs no entry and no exit, and is bit-identical to the residual add at init. The norm before
    the dynamic projection is RMSNorm with a weight.

    Args:
        dim: width of the model; a stream has E = dim / m.
        rate: frac rate m.
        layer_index: index of the sub-layer; every frac-connection starts alike.
        dynamic: weights depend on the input (DFC) or not (SFC).
        tanh: squash the dynamic part.
        norm: normalise the streams before the dynamic projection.
        backend: ``torch``, ``triton`` or ``auto``; see ``HyperConnection``.

    Raises:
        ValueError: rate < 1, layer_index < 0, a dim that the rate does not divide, an unknown backend.
    """

    center_norm = False

    def __init__(
        self,
        dim: int,
        rate: int,
        layer_index: int = 0,
        *,
        dynamic: bool = True,
        tanh: bool = True,
        norm: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_count("rate", rate, 1)
        check_count("layer_index", layer_index, 0)
        check_fractions(dim, rate)
        super().__init__(dim, rate, rate, layer_index, dynamic, tanh, norm, backend, device, dtype)
        self.reset_parameters()

    @property
    def name(self) -> str:
        """``sfc2``, ``dfc4``, ..."""
        return f"{'d' if self.dynamic else 's'}fc{self.rate}"

    def initial_weights(self) -> tuple[Tensor, Tensor]:
        """[I_m | I_m] and ones (FC eq. 13); see ``StreamConnection``."""
        eye = torch.eye(self.rate)
        return torch.cat([eye, eye], dim=1), torch.ones(self.rate)


BUILDERS: dict[str, Callable[..., Connection]] = {  # by kind, called with dim, rate, layer_index and options
    "shc": functools.partial(HyperConnection, dynamic=False),
    "dhc": functools.partial(HyperConnection, dynamic=True),
    "sfc": functools.partial(FracConnection, dynamic=False),
    "dfc": functools.partial(FracConnection, dynamic=True),
}


def check_count(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_fractions(dim: int, rate: int) -> None:
    if dim % rate:
        fitting = ", ".join(str(m) for m in range(1, min(dim, 16) + 1) if dim % m == 0)
        raise ValueError(
            f"dim must be divisible by the frac rate, got dim={dim} and rate={rate} (rates that fit: {fitting})"
        )


# The rule as functions of tensors. Torch FX takes each as one node; TorchScript, torch.compile and
# torch.export see the plain operations.


@torch.fx.wrap
def average_streams(x: Tensor, rate: int) -> Tensor:
    """(..., n*E) -> (..., E), in float32 at least, in the dtype of x."""
    parts = x.unflatten(-1, (rate, -1)).to(torch.promote_types(x.dtype, torch.float32)).unbind(-2)
    while len(parts) > 1:  # in pairs: 2, 4 or 8 equal streams add up without rounding
        last = parts[len(parts) // 2 * 2 :]
        parts = [parts[i] + parts[i + 1] for i in range(0, len(parts) - 1, 2)] + list(last)
    return (parts[0] / rate).to(x.dtype)


@torch.fx.wrap
def split_streams(x: Tensor, streams: int, stream_dim: int) -> Tensor:
    """(..., S*E) -> (..., S, E). Raises ValueError when the last axis of x is not S*E wide."""
    width = streams * stream_dim
    if not torch.jit.is_tracing() and x.shape[-1] != width:
        hint = f"; expand_streams(x, {streams}) enters the streams" if x.shape[-1] == stream_dim else ""
        raise ValueError(
            f"x must have {streams} streams of {stream_dim} on its last axis, {width} in all, "
            f"got shape {list(x.shape)}{hint}"
        )
    return x.unflatten(-1, (streams, stream_dim))


@torch.fx.wrap
def split_output(branch_output: Tensor, streams: Tensor, views: int) -> Tensor:
    """(..., V*E) -> (..., V, E). Raises ValueError when it is not shaped as the branch input was."""
    if not torch.jit.is_tracing():
        expected = list(streams.shape[:-2]) + [views * streams.shape[-1]]  # noqa: RUF005 - TorchScript
        if list(branch_output.shape) != expected:
            raise ValueError(
                f"the branch must return the shape it was given, {expected}, got {list(branch_output.shape)}"
            )
    return branch_output.unflatten(-1, (views, streams.shape[-1]))


@torch.fx.wrap
def width_connection(streams: Tensor, rule: Rule, options: Options) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The branch input (..., V*E) of streams (..., S, E), and the carried streams in four parts.

    These are the streams (..., S, E), alpha (..., S, V+S), beta (..., S) and the link (..., S, E). The
    parameters and options are those of ``StreamConnection``.
    """
    norm, center, tanh, backend = options
    views, alone = rule[0].shape[1] - rule[0].shape[0], rule[1].dim() == 1
    if torch.jit.is_scripting():
        static, rows, scale = _prepare(rule, center and norm, streams.dtype)
        mixed, alpha, beta, _ = _read(streams, views, alone, static, rows, scale, norm, center, tanh)
        link = streams
    else:
        with no_autocast(streams.device.type):
            if _takes_kernels(streams, views, backend, alone):
                static, rows, scale = _prepare_at_once(rule, center and norm, streams.dtype)
                mixed, alpha, beta, link = kernels.width(streams, static, rows, scale, norm, center, tanh)
            elif is_plain():
                static, rows, scale = _prepare(rule, center and norm, streams.dtype)
                mixed, alpha, beta, _ = _read(streams, views, alone, static, rows, scale, norm, center, tanh)
                link = streams
            else:
                mixed, link, alpha, beta = _Width.apply(streams, norm, center, tanh, *rule)[:4]
    return mixed.flatten(-2).to(streams.dtype), streams, alpha, beta, link


@torch.fx.wrap
def read_streams(
    streams: Tensor, alpha: Tensor, beta: Tensor, views: int
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``width_connection`` by weights that are there already: alpha (..., S, V+S) and beta.

    An alpha (..., S) is that of one view, and carries the streams as they are.
    """
    link = streams
    columns = alpha[..., None] if alpha.dim() < streams.dim() else alpha
    if torch.jit.is_scripting():
        mixed = _mix(streams, columns[..., :views], None, None)
    else:
        with no_autocast(streams.device.type):
            if is_plain():
                mixed = _mix(streams, columns[..., :views], None, None)
            else:
                mixed, link = _Weighed.apply(streams, columns, views)
    return mixed.flatten(-2).to(streams.dtype), streams, alpha, beta, link


@torch.fx.wrap
def carry_streams(streams: Tensor, alpha: Tensor, views: int) -> Tensor:
    """The link of streams (..., S, E) that are to be carried, where they are not those that were read."""
    if torch.jit.is_scripting():
        return streams
    else:
        columns = alpha[..., None] if alpha.dim() < streams.dim() else alpha
        return streams if is_plain() else _Weighed.apply(streams, columns, views)[1]


@torch.fx.wrap
def depth_connection(
    streams: Tensor, output: Tensor, alpha: Tensor, beta: Tensor, link: Tensor, backend: str
) -> Tensor:
    """The next streams (..., S*E) from the branch output (..., V, E) and the four parts of the carried streams."""
    carried: Optional[Tensor] = None
    if alpha.dim() == streams.dim():
        carried = alpha[..., output.shape[-2] :]
    if torch.jit.is_scripting():
        mixed = _write(streams, carried, output, beta)
    else:
        with no_autocast(streams.device.type):
            if link is streams:  # as the plain operations leave it
                mixed = _write(streams, carried, output, beta)
            elif _takes_kernels(streams, output.shape[-2], backend, alpha.dim() > beta.dim()):
                mixed = kernels.depth(link, streams.detach(), _for_kernels(output, streams), alpha.detach(), beta)
            else:
                mixed = _Depth.apply(link, None if carried is None else carried.detach(), output, beta)
    return mixed.flatten(-2).to(streams.dtype)


@torch.fx.wrap
def join_connections(
    streams: Tensor, output: Tensor, alpha: Tensor, beta: Tensor, link: Tensor, rule: Rule, options: Options
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``depth_connection``, and ``width_connection`` of the streams that it gives, with the next rule."""
    norm, center, tanh, backend = options
    if torch.jit.is_scripting():
        pass
    elif link is not streams and _takes_kernels(streams, output.shape[-2], backend, alpha.dim() > beta.dim()):
        static, rows, scale = _prepare_at_once(rule, center and norm, streams.dtype)
        carried = (link, streams.detach(), _for_kernels(output, streams), alpha.detach(), beta)
        streams, views, alpha, beta, link = kernels.join(*carried, static, rows, scale, norm, center, tanh)
        return views.flatten(-2), streams, alpha, beta, link
    x = depth_connection(streams, output, alpha, beta, link, backend)
    return width_connection(x.unflatten(-1, (streams.shape[-2], streams.shape[-1])), rule, options)


def _prepare(rule: Rule, center: bool, dtype: torch.dtype) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
    """Static alpha and beta (S, K), the dynamic projections as rows (K, E), and their scales (K,) or (S, K)."""
    static_alpha, static_beta, alpha_fn, beta_fn, alpha_scale, beta_scale, norm_weight = rule
    dtype = torch.promote_types(dtype, torch.float32)
    columns = static_beta if static_beta.dim() == 2 else static_beta[:, None]
    static = torch.cat([static_alpha, columns], dim=1).to(dtype)
    if alpha_fn is None or beta_fn is None or alpha_scale is None or beta_scale is None:
        return static, None, None
    rows = torch.cat([alpha_fn.mT, beta_fn.mT]).to(dtype)
    if alpha_scale.dim() == 1:
        alpha_scale = alpha_scale.expand(alpha_fn.shape[1])
    scale = torch.cat([alpha_scale, beta_scale], dim=-1).to(dtype)
    if norm_weight is not None:
        rows = rows * norm_weight.to(dtype)
    if center:
        rows = rows - rows.mean(1, keepdim=True)  # (H - mean(H)) @ row = H @ (row - mean(row))
    return static, rows, scale


def _prepare_at_once(rule: Rule, center: bool, dtype: torch.dtype) -> Any:
    """``_prepare`` with one node in the graph of gradients."""
    return _prepare(rule, center, dtype) if is_plain() else _Prepare.apply(center, dtype, *rule)


def _takes_kernels(streams: Tensor, views: int, backend: str, fits: bool) -> bool:
    """Whether this connection runs as kernels, which take mixed streams and for each of them one number of beta."""
    if backend == "torch" or torch.jit.is_tracing() or is_exporting():
        return False
    number = streams.shape[-2] * (views + streams.shape[-2] + 1)  # dfc6 and above take minutes to compile
    if backend == "auto" and (not streams.is_cuda or number > MOST_COEFFICIENTS):
        return False
    why_not = kernels.why_not(streams) if fits else "there are none for this kind"
    if why_not and backend == "triton":
        raise ValueError(f"backend='triton' cannot run the kernels: {why_not}; backend='auto' takes PyTorch there")
    return not why_not


def _for_kernels(output: Tensor, streams: Tensor) -> Tensor:
    """The branch output itself, which may have a type of its own, as under autocast."""
    return output if output.dtype in kernels.DTYPES else output.to(streams.dtype)


def is_plain() -> bool:
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def is_exporting() -> bool:
    flags: Any = torch.compiler  # is_exporting() itself says yes in every torch.compile of PyTorch 2.11
    return flags._is_exporting_flag


def no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _exact_matmul(tensor: Tensor) -> bool:
    """Whether a matmul may mix streams: on a CPU, where it is quick, if it multiplies float32 as it is."""
    backends: Any = torch.backends  # the innermost setting says what those above it do, where it has none of its own
    return tensor.device.type == "cpu" and backends.mkldnn.matmul.fp32_precision in ("none", "ieee")


def _mix(streams: Tensor, alpha: Tensor, output: Optional[Tensor], beta: Optional[Tensor]) -> Tensor:
    """alpha^T @ streams (+ beta * output): (..., S, E), (..., S, K), (..., K or 1, E), (..., S) -> (..., K, E).

    An output without beta is added as it is.
    """
    if torch.jit.is_scripting():
        pass
    elif not is_plain() and alpha.shape[-1] > 1 and _exact_matmul(streams):
        mixed = _laid_out_like(streams, alpha.mT @ streams.to(alpha.dtype))
        if output is None:
            return mixed
        return mixed.add_(output) if beta is None else mixed.addcmul_(beta[..., None], output)
    first = 0
    if output is not None:
        mixed = output if beta is None else beta[..., None] * output
    else:
        mixed = alpha[..., 0, :, None] * streams[..., 0, None, :]
        first = 1
    if torch.jit.is_scripting():
        pass
    else:
        mixed = _laid_out_like(streams, mixed)
    for i in range(first, streams.shape[-2]):
        mixed.addcmul_(alpha[..., i, :, None], streams[..., i, None, :])
    return mixed


def _write(streams: Tensor, alpha: Optional[Tensor], output: Tensor, beta: Tensor) -> Tensor:
    """alpha^T @ streams (None: the streams) + beta * output, or + beta @ output for a beta (..., S, V)."""
    if alpha is None:
        return torch.addcmul(streams.to(beta.dtype), beta[..., None], output)
    if beta.dim() == streams.dim():
        return _mix(streams, alpha, _mix(output, beta.mT, None, None), None)
    return _mix(streams, alpha, output, beta)


def _laid_out_like(streams: Tensor, mixed: Tensor) -> Tensor:
    """Keep the memory layout of x, as ``x + branch(x)`` does: what follows may round by it."""
    if is_plain() or mixed.shape != streams.shape or mixed.stride() == streams.stride():
        return mixed
    return torch.empty_like(streams, dtype=mixed.dtype).copy_(mixed)


def _inverse_deviation(streams: Tensor, center: bool) -> Tuple[Tensor, Tensor]:
    """What LayerNorm (center) or RMSNorm multiplies a stream by, and the mean that LayerNorm takes: (..., S, 1)."""
    variance = torch.linalg.vector_norm(streams, dim=-1, keepdim=True).square() / streams.shape[-1]
    mean = variance
    if center:
        mean = streams.mean(-1, keepdim=True)
        variance = (variance - mean.square()).clamp(min=0.0)
    return (variance + 1e-6).rsqrt(), mean


def _project(x: Tensor, rows: Tensor, norm: bool, center: bool) -> Tuple[Tensor, Tensor, Tensor]:
    """norm(x) @ rows^T, 1 / deviation and mean, as far as there are any; rows are centered if x is to be."""
    projected = F.linear(x, rows)
    if not norm:
        return projected, projected, projected
    rstd, mean = _inverse_deviation(x, center)
    return projected * rstd, rstd, mean


def project(x: Tensor, rows: Tensor) -> Tensor:
    """RMSNorm(x) @ rows^T: (..., C), (K, C) -> (..., K), in the dtype of the rows."""
    if torch.jit.is_scripting():
        return _project(x.to(rows.dtype), rows, True, False)[0]
    else:
        with no_autocast(x.device.type):
            return _project(x.to(rows.dtype), rows, True, False)[0] if is_plain() else _Project.apply(x, rows)[0]


def _coefficients(
    streams: Tensor,
    static: Tensor,
    rows: Optional[Tensor],
    scale: Optional[Tensor],
    norm: bool,
    center: bool,
    tanh: bool,
) -> Tuple[Tensor, List[Tensor]]:
    """static + scale * tanh(norm(H) @ rows^T): (..., S, K), and what the dynamic part is made of.

    That is norm(H) @ rows^T (..., S, K), its tanh, 1 / deviation (..., S, 1) and the mean, as far as there are any.
    """
    if rows is None or scale is None:
        return static.expand(streams.shape[:-2] + static.shape), []
    projected, rstd, mean = _project(streams.to(rows.dtype), rows, norm, center)
    dynamic = projected.tanh() if tanh else projected
    return torch.addcmul(static, scale, dynamic), [projected, dynamic, rstd, mean]


def _read(
    streams: Tensor,
    views: int,
    alone: bool,
    static: Tensor,
    rows: Optional[Tensor],
    scale: Optional[Tensor],
    norm: bool,
    center: bool,
    tanh: bool,
) -> Tuple[Tensor, Tensor, Tensor, List[Tensor]]:
    """Views (..., V, E), alpha (..., S, V+S), beta (..., S), where one column of it stands alone, or (..., S, V).

    And what the coefficients are made of.
    """
    coefficients, made = _coefficients(streams, static, rows, scale, norm, center, tanh)
    last = views + static.shape[0]
    mixed = _mix(streams, coefficients[..., :views], None, None)
    beta = coefficients[..., last] if alone else coefficients[..., last:]
    return mixed, coefficients[..., :last], beta, made


# Eager mode takes the same operations with a backward of our own: autograd's would keep each intermediate
# that it needs, these keep their inputs and the coefficients. What runs between the two steps is the streams
# H themselves, for the carried streams alpha^T @ H that the second step is about to form; the gradient that
# comes back there is the one of the carried streams, so that one pass over H serves both steps.


def _mixed_gradients(
    streams: Tensor, alpha: Tensor, views: int, grad_views: Optional[Tensor], grad_carried: Optional[Tensor]
) -> Tuple[Tensor, List[Tensor]]:
    """Those of the streams and of alpha, in two parts, where views and carried streams are alpha^T @ H."""
    to_views, to_carried = alpha[..., :views], alpha[..., views:]
    grad_carried = torch.zeros_like(streams) if grad_carried is None else grad_carried.to(alpha.dtype)
    if to_carried.shape[-1]:
        grad_streams = _mix(grad_carried, to_carried.mT, None, None).contiguous()
        grads = [streams @ grad_carried.mT]
    else:
        grad_streams, grads = grad_carried.clone(), [to_carried]
    if grad_views is None:
        return grad_streams, [torch.zeros_like(to_views), *grads]
    grad_views = grad_views.to(alpha.dtype)
    grads.insert(0, streams @ grad_views.mT)
    if views == 1:
        grad_streams.addcmul_(to_views, grad_views)
    elif not _exact_matmul(grad_views):
        grad_streams.add_(_mix(grad_views, to_views.mT, None, None))
    else:
        parts = (part.reshape(-1, *part.shape[-2:]) for part in (to_views, grad_views))
        grad_streams.view(-1, *grad_streams.shape[-2:]).baddbmm_(*parts)
    return grad_streams, grads


# Recomputation: what the depth-connection makes follows from what was there before and the branch output,
# which is kept anyway. A recipe says so, and lives as long as the tensor that it describes, or as autograd
# keeps it in the place of the streams. A compiler is told to do the same by way of a checkpoint around the rule.


class Recipe:
    """How streams (..., S, E) follow from those before them. Calling it gives them."""

    def __init__(
        self, before: "Tensor | Recipe", ingredients: Tuple[Tensor, Tensor, Tensor], backend: str, version: int
    ):
        self.before, self.ingredients, self.backend = before, ingredients, backend
        self.version = version  # of the streams that were made; who changes them in place makes others
        self.made: Tensor | None = None  # on the way to later streams, for the one who asks next

    @torch.no_grad()
    def __call__(self) -> Tensor:
        pending: list[Recipe] = []
        at: Tensor | Recipe = self
        while isinstance(at, Recipe) and at.made is None:
            pending.append(at)
            at = at.before
        streams = at.made if isinstance(at, Recipe) else at
        assert streams is not None
        for recipe in reversed(pending):
            output, alpha, beta = recipe.ingredients
            following = depth_connection(streams, output, alpha, beta, streams.detach(), recipe.backend)
            streams = following.unflatten(-1, streams.shape[-2:])
            recipe.made = streams
        self.made = None
        return streams


RECIPES: Any = WeakTensorKeyDictionary()


def recomputable(streams: Tensor, output: Tensor, alpha: Tensor, beta: Tensor, link: Tensor, backend: str) -> Tensor:
    """``depth_connection``, whose outcome need not be kept for backward."""
    if torch.compiler.is_compiling() and not is_exporting():
        rule = functools.partial(depth_connection, backend=backend)
        return checkpoint(rule, streams, output, alpha, beta, link, use_reentrant=False, preserve_rng_state=False)
    x = depth_connection(streams, output, alpha, beta, link, backend)
    record(x, streams, output, alpha, beta, backend)
    return x


def record(x: Tensor, streams: Tensor, output: Tensor, alpha: Tensor, beta: Tensor, backend: str) -> None:
    """Note on x, (..., S*E), how it follows from the streams before it."""
    if isinstance(x, torch.fx.Proxy) or is_plain() or kernels.under_functorch():
        return
    before = RECIPES.get(streams, streams.detach())
    ingredients = (output.detach(), alpha.detach(), beta.detach())
    RECIPES[x] = Recipe(before, ingredients, backend, x._version)


@contextlib.contextmanager
def keep_recipe(x: Tensor, streams: Tensor) -> Iterator[None]:
    """Let autograd keep the recipe of x, if it has one, wherever it would keep the streams (..., S, E), a view of x."""
    if isinstance(x, torch.fx.Proxy) or is_plain() or kernels.under_functorch():
        yield
        return
    recipe = RECIPES.get(x)
    if recipe is None or recipe.version != x._version:
        yield
        return
    RECIPES[streams] = recipe
    place = (streams.data_ptr(), streams.shape)

    def pack(tensor: Tensor) -> Tensor | Recipe:
        return recipe if (tensor.data_ptr(), tensor.shape) == place else tensor.detach()

    def unpack(kept: Tensor | Recipe) -> Tensor:
        return kept() if isinstance(kept, Recipe) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _projected_gradients(
    grad_x: Tensor,
    x: Tensor,
    rows: Tensor,
    projected: Tensor,
    grad: Tensor,
    rstd: Optional[Tensor],
    mean: Optional[Tensor],
) -> Tensor:
    """Add the gradient of x to grad_x, and return that of the rows, where projected is norm(x) @ rows^T."""
    back = rows
    if rstd is not None:
        grad = grad * rstd
        along = (grad * projected).sum(-1, keepdim=True) * rstd
        grad_x.addcmul_(x, along, value=-1 / rows.shape[1])
        if mean is not None:  # one more row takes along * (x - mean) instead of along * x
            grad = torch.cat([grad, along * mean * (1 / rows.shape[1])], dim=-1)
            back = torch.cat([back, back.new_ones(1, back.shape[1])])
    grad_x.view(-1, back.shape[1]).addmm_(grad.reshape(-1, len(back)), back)
    return grad[..., : len(rows)].reshape(-1, len(rows)).mT @ x.reshape(-1, rows.shape[1])


def _prepared_gradients(
    rule: Any, center: bool, grad_static: Optional[Tensor], grad_rows: Optional[Tensor], grad_scale: Optional[Tensor]
) -> List[Optional[Tensor]]:
    """Those of the parameters, from those of what ``_prepare`` makes of them."""
    static_alpha, static_beta, alpha_fn, beta_fn, alpha_scale, _, norm_weight = rule
    grads: List[Optional[Tensor]] = [None] * 7
    views = static_alpha.shape[1]
    if grad_static is not None:
        grads[0] = grad_static[:, :views]
        grads[1] = grad_static[:, views] if static_beta.dim() == 1 else grad_static[:, views:]
    if grad_rows is not None:
        if center:
            grad_rows = grad_rows - grad_rows.mean(1, keepdim=True)
        if norm_weight is not None:
            grads[6] = (grad_rows * torch.cat([alpha_fn.mT, beta_fn.mT])).sum(0)
            grad_rows = grad_rows * norm_weight
        # laid out as the parameters are: DDP warns of what it has to copy, and copies
        grads[2] = grad_rows[:views].mT.clone(memory_format=torch.contiguous_format)
        grads[3] = grad_rows[views:].mT.clone(memory_format=torch.contiguous_format)
    if grad_scale is not None:
        of_alpha, grads[5] = grad_scale[..., :views], grad_scale[..., views:]
        grads[4] = of_alpha.sum(0, keepdim=True) if alpha_scale.dim() == 1 else of_alpha
    return grads


class _Prepare(torch.autograd.Function):
    """``_prepare``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(center, dtype, *rule):
        return _prepare(rule, center, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.center, _, *rule = inputs
        ctx.save_for_backward(*rule)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        return None, None, *_prepared_gradients(ctx.saved_tensors, ctx.center, *grads)


def _kept(made: List[Tensor], norm: bool, center: bool, tanh: bool) -> List[Optional[Tensor]]:
    """Of what ``_coefficients`` made, what its gradient needs."""
    projected, dynamic, rstd, mean = made or (None, None, None, None)
    return [projected, dynamic if tanh else None, rstd if norm else None, mean if norm and center else None]


class _Width(torch.autograd.Function):
    """``_prepare``, ``_read`` and the streams, saving the streams and what the coefficients are made of."""

    generate_vmap_rule = True

    @staticmethod
    def forward(streams, norm, center, tanh, *rule):
        views, alone = rule[0].shape[1] - rule[0].shape[0], rule[1].dim() == 1
        prepared = _prepare(rule, center and norm, streams.dtype)
        mixed, alpha, beta, made = _read(streams, views, alone, *prepared, norm, center, tanh)
        # beta is kept longer than alpha, which must not stay with it
        return mixed, streams.view_as(streams), alpha, beta.contiguous(), *prepared, *_kept(made, norm, center, tanh)

    @staticmethod
    def setup_context(ctx, inputs, output):
        streams, ctx.norm, ctx.center, ctx.tanh, *rule = inputs
        ctx.save_for_backward(streams, *rule, *output[4:])
        ctx.mark_non_differentiable(*(part for part in output[4:] if part is not None))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_views, grad_carried, grad_alpha, grad_beta, *_):
        streams, *saved = ctx.saved_tensors
        rule, (static, rows, scale, projected, dynamic, rstd, mean) = saved[:7], saved[7:]
        center = ctx.center and ctx.norm
        views, last = rule[0].shape[1] - rule[0].shape[0], rule[0].shape[1]
        with no_autocast(streams.device.type):
            if torch.is_grad_enabled():  # for a second derivative: what was kept would be a constant there
                static, rows, scale = _prepare(rule, center, streams.dtype)
                coefficients, made = _coefficients(streams, static, rows, scale, ctx.norm, ctx.center, ctx.tanh)
                projected, dynamic, rstd, mean = _kept(made, ctx.norm, ctx.center, ctx.tanh)
            else:
                coefficients = static.expand(*streams.shape[:-2], *static.shape)
                if rows is not None:
                    coefficients = torch.addcmul(static, scale, projected if dynamic is None else dynamic)
            streams = streams.to(static.dtype)
            dynamic = projected if dynamic is None else dynamic
            grad_streams, through = _mixed_gradients(streams, coefficients[..., :last], views, grad_views, grad_carried)
            if grad_beta is None:
                grad_beta = torch.zeros_like(coefficients[..., last:])
            elif rule[1].dim() == 1:
                grad_beta = grad_beta[..., None]
            grad = torch.cat([*through, grad_beta], dim=-1)
            if grad_alpha is not None:
                grad = grad + F.pad(grad_alpha, (0, static.shape[1] - last))
            grad_static = grad.reshape(-1, *static.shape).sum(0)
            grad_rows = grad_scale = None
            if rows is not None:
                grad_scale = (grad * dynamic).reshape(-1, *scale.shape).sum(0)
                grad = grad * scale
                if ctx.tanh:
                    grad = torch.ops.aten.tanh_backward(grad, dynamic)
                grad_rows = _projected_gradients(grad_streams, streams, rows, projected, grad, rstd, mean)
            grads = _prepared_gradients(rule, center, grad_static, grad_rows, grad_scale)
        return grad_streams, None, None, None, *grads


class _Project(torch.autograd.Function):
    """RMSNorm(x) @ rows^T, keeping x in its own type."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, rows):
        return _project(x.to(rows.dtype), rows, True, False)[:2]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad, _):
        x, rows, projected, rstd = ctx.saved_tensors
        x = x.to(rows.dtype)
        if torch.is_grad_enabled():  # for a second derivative
            rstd, _ = _inverse_deviation(x, False)
        grad_x = x.new_zeros(x.shape)
        with no_autocast(x.device.type):
            grad_rows = _projected_gradients(grad_x, x, rows, projected, grad, rstd, None)
        return grad_x, grad_rows


class _Weighed(torch.autograd.Function):
    """The views of streams by given weights, and the streams, for alpha^T @ streams that are about to be formed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(streams, alpha, views):
        return _mix(streams, alpha[..., :views], None, None), streams.view_as(streams)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.views = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_views, grad_carried):
        streams, alpha = ctx.saved_tensors
        with no_autocast(streams.device.type):
            grads = _mixed_gradients(streams.to(alpha.dtype), alpha, ctx.views, grad_views, grad_carried)
            return grads[0], torch.cat(grads[1], dim=-1), None


class _Depth(torch.autograd.Function):
    """``_write``, saving the branch output and beta; the gradient of the carried streams is that of the next ones."""

    generate_vmap_rule = True

    @staticmethod
    def forward(streams, alpha, output, beta):
        return _write(streams, alpha, output, beta)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx, grad):
        output, beta = ctx.saved_tensors
        with no_autocast(grad.device.type):
            if beta.dim() == grad.dim():  # every output went to every stream
                grad_output = _mix(grad, beta, None, None)
                grad_beta = grad @ output.to(grad.dtype).mT
            elif output.shape[-2] == 1:  # one output went to every stream (HC)
                grad_output = _mix(grad, beta[..., None], None, None)
                grad_beta = (grad @ output.to(grad.dtype).mT).squeeze(-1)
            else:  # or each its own (FC)
                grad_output = beta[..., None] * grad
                grad_beta = torch.linalg.vecdot(output.to(grad.dtype), grad)
        return grad, None, grad_output, grad_beta


class _AsGiven(inspect.Signature):
    """Takes arguments as they come. PyTorch binds them to ``forward`` in every call, for defaults, which ours lack."""

    def bind(self, *args: Any) -> Any:
        return types.SimpleNamespace(args=args, kwargs={}, apply_defaults=lambda: None)


for _function in (_Prepare, _Width, _Project, _Weighed, _Depth):
    _function.forward.__signature__ = _AsGiven()  # type: ignore[attr-defined,union-attr]
