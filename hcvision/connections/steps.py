"""The steps of connections as functions of tensors, and the choice of how each runs.

Four forms, one update rule: kernels for a GPU (``triton``) and for a CPU (``native``), both in ``kernels/``; the
operations of ``reference.py`` as they are; and ``eager.py``, the same operations with a backward that keeps less.
Torch FX takes each step as one node. Letters in shapes are those of ``hcvision.connections``.

TorchScript compiles all that it sees, behind a trace of FX too, and that cannot be kernels or functions of autograd.
There a step is its function in ``reference.py``; nothing below knows of it.

Between the two steps go four **parts of the carried streams**: the streams that were read (..., S, E); alpha
(..., S, V+S) and beta (..., S), in float32 at least; and a placeholder (..., S, E), which stands in the graph of
gradients for the carried streams alpha_r^T @ H until the second step forms them (``eager.py``). A placeholder
that is the streams themselves says that the operations of ``reference.py`` were used.
"""

from typing import Tuple

import torch
from torch import Tensor

from hcvision.connections import eager, layout, reference, unmixed
from hcvision.connections.kernels import operators
from hcvision.connections.modes import is_exporting, is_transformed, needs_operations, without_autocast
from hcvision.connections.reference import Options, Rule

MOST_COEFFICIENTS = 80  # of a token, for the kernels in Triton that auto takes: dhc8, dfc5


@torch.fx.wrap
def width_connection(streams: Tensor, rule: Rule, options: Options) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The first step: the branch input (..., V*E) of streams (..., S, E), and the parts of the carried streams.

    The parameters and options are those of ``StreamConnection``.
    """
    if torch.jit.is_scripting():
        return reference.width_connection(streams, rule, options)
    else:
        norm, center, tanh, backend = options
        views = rule[0].shape[1] - rule[0].shape[0]
        with without_autocast(streams.device.type):
            form = choose_form(streams, views, backend, has_kernel=rule[1].dim() == 1)
            if form == "operations":
                return reference.width_connection(streams, rule, options)
            if form == "eager":
                return eager.width_connection(streams, rule, options)
            read = operators.width(streams, *rule, norm, center, tanh, form == "native")
        mixed, alpha, beta, placeholder, _ = read
        return mixed.flatten(-2), streams, alpha, beta, placeholder


@torch.fx.wrap
def read_streams(
    streams: Tensor, alpha: Tensor, beta: Tensor, views: int
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``width_connection`` by weights that are there already: alpha (..., S, V+S) and beta.

    An alpha (..., S) is that of one view, and carries the streams as they are.
    """
    if torch.jit.is_scripting():
        return reference.read_streams(streams, alpha, beta, views)
    else:
        form = reference if needs_operations() else eager
        with without_autocast(streams.device.type):
            return form.read_streams(streams, alpha, beta, views)


@torch.fx.wrap
def read_channels(streams: Tensor, read: Tensor, write: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``width_connection`` where every channel has weights of its own, (S, E) each, and no stream is mixed.

    In the place of alpha and beta go the weights themselves, in float32 at least.
    """
    dtype = torch.promote_types(streams.dtype, torch.float32)
    read, write = read.to(dtype), write.to(dtype)
    if torch.jit.is_scripting():
        view, placeholder = reference.read_channels(streams, read)
    else:
        form = reference if needs_operations() else unmixed
        with without_autocast(streams.device.type):
            view, placeholder = form.read_channels(streams, read)
    return view, streams, read, write, placeholder


@torch.fx.wrap
def write_channels(streams: Tensor, output: Tensor, write: Tensor, placeholder: Tensor) -> Tensor:
    """The second step behind it: streams + write * output, (..., S, E) and (..., 1, E) -> (..., S*E)."""
    if torch.jit.is_scripting():
        return reference.write_channels(streams, output, write)
    else:
        with without_autocast(streams.device.type):
            if needs_operations() or placeholder is streams:
                return reference.write_channels(streams, output, write)
            return unmixed.write_channels(placeholder, output, write)


@torch.fx.wrap
def read_gated(
    streams: Tensor, gate_down: Tensor, gate_up: Tensor, gain: Tensor, write_fn: Tensor
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``width_connection`` where gates read every channel, and no stream is mixed: see ``GatedConnection``.

    In the place of alpha go the r numbers of a token that the gates are made of.
    """
    dtype = torch.promote_types(streams.dtype, torch.float32)
    rows, up, gain = torch.cat([gate_down, write_fn]).to(dtype), gate_up.to(dtype), gain.to(dtype)
    placeholder = streams
    if torch.jit.is_scripting():
        view, hidden, write = reference.read_gated(streams, rows, up, gain)
    else:
        with without_autocast(streams.device.type):
            if needs_operations():
                view, hidden, write = reference.read_gated(streams, rows, up, gain)
            else:
                view, hidden, write, placeholder = unmixed.read_gated(streams, rows, up, gain)
    return view.to(streams.dtype), streams, hidden, write, placeholder


@torch.fx.wrap
def read_whole(streams: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``width_connection`` where the branch reads the one stream (..., 1, E) as it is; alpha and beta are ones."""
    one = torch.ones([1], dtype=torch.promote_types(streams.dtype, torch.float32), device=streams.device)
    ones = one.expand(streams.shape[:-1])
    return streams.flatten(-2), streams, ones, ones, streams


@torch.fx.wrap
def update_orthogonal(streams: Tensor, output: Tensor) -> Tensor:
    """x + f - <x, f> / (|x|^2 + 1e-6) x, of one stream and the branch output, (..., 1, E) each -> (..., E)."""
    if torch.jit.is_scripting():
        following = reference.update_orthogonal(streams, output)[0]
    else:
        form = reference if needs_operations() else unmixed
        with without_autocast(streams.device.type):
            following = form.update_orthogonal(streams, output)[0]
    return following.flatten(-2).to(streams.dtype)


@torch.fx.wrap
def read_low_rank(
    streams: Tensor, logit_alpha: Tensor, logit_beta: Tensor, low_rank_a: Tensor, low_rank_b: Tensor
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``read_whole`` of LAuReL; in the place of alpha and beta go A and B^T, (2, r, E), and the paper's alpha and beta.

    See ``LaurelConnection``.
    """
    dtype = torch.promote_types(streams.dtype, torch.float32)
    scales = 2 * torch.cat([logit_alpha, logit_beta]).to(dtype).sigmoid()
    low_rank = torch.stack([low_rank_a, low_rank_b.transpose(0, 1)]).to(dtype)
    return streams.flatten(-2), streams, low_rank, scales, streams


@torch.fx.wrap
def update_low_rank(streams: Tensor, output: Tensor, low_rank: Tensor, scales: Tensor) -> Tensor:
    """alpha f + beta (x + B A x), of one stream and the branch output, (..., 1, E) each -> (..., E).

    The low-rank part is a matmul, in float32 at least, which TF32 may round.
    """
    if torch.jit.is_scripting():
        following = reference.update_low_rank(streams, output, low_rank, scales)[0]
    else:
        form = reference if needs_operations() else unmixed
        with without_autocast(streams.device.type):
            following = form.update_low_rank(streams, output, low_rank, scales)[0]
    return following.flatten(-2).to(streams.dtype)


@torch.fx.wrap
def carry_streams(streams: Tensor, alpha: Tensor, beta: Tensor, views: int) -> Tensor:
    """The placeholder of streams (..., S, E) that are to be carried, where they are not those that were read."""
    if torch.jit.is_scripting():
        return streams
    else:
        return streams if needs_operations() else eager.read_streams(streams, alpha, beta, views)[-1]


@torch.fx.wrap
def depth_connection(
    streams: Tensor, output: Tensor, alpha: Tensor, beta: Tensor, placeholder: Tensor, backend: str
) -> Tensor:
    """The second step: the next streams (..., S*E) from the branch output (..., V, E) and the carried streams."""
    if torch.jit.is_scripting():
        return reference.depth_connection(streams, output, alpha, beta)
    else:
        views, form = output.shape[-2], "operations"
        if placeholder is not streams:
            form = choose_form(streams, views, backend, has_kernel=alpha.dim() > beta.dim())
        with without_autocast(streams.device.type):
            if form == "operations":
                return reference.depth_connection(streams, output, alpha, beta)
            if form == "eager":
                return eager.depth_connection(streams, output, alpha, beta, placeholder)
            output = operators.take_type(output, streams)
            parts = (placeholder, streams.detach(), output, alpha.detach(), beta)
            return operators.depth(*parts, form == "native").flatten(-2)


@torch.fx.wrap
def join_connections(
    streams: Tensor, output: Tensor, alpha: Tensor, beta: Tensor, placeholder: Tensor, rule: Rule, options: Options
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``depth_connection``, and ``width_connection`` of the streams that it gives, with the next rule."""
    if torch.jit.is_scripting():
        x = reference.depth_connection(streams, output, alpha, beta)
        return reference.width_connection(layout.split_last(x, streams.shape[-2]), rule, options)
    else:
        norm, center, tanh, backend = options
        views, form = output.shape[-2], "operations"
        if placeholder is not streams:
            form = choose_form(streams, views, backend, has_kernel=alpha.dim() > beta.dim())
        if form in ("operations", "eager"):
            x = depth_connection(streams, output, alpha, beta, placeholder, backend)
            return width_connection(layout.split_last(x, streams.shape[-2]), rule, options)
        parts = (placeholder, streams.detach(), operators.take_type(output, streams), alpha.detach(), beta)
        joined = operators.join(*parts, *rule, norm, center, tanh, form == "native")
        streams, mixed, alpha, beta, placeholder, _ = joined
        return mixed.flatten(-2), streams, alpha, beta, placeholder


def project(x: Tensor, rows: Tensor) -> Tensor:
    """RMSNorm(x) @ rows^T: (..., C), (K, C) -> (..., K), in the dtype of the rows."""
    form = reference if needs_operations() else eager
    with without_autocast(x.device.type):
        return form.project(x, rows)


def choose_form(streams: Tensor, views: int, backend: str, has_kernel: bool) -> str:
    """How a step runs: ``triton``, ``native``, ``operations`` or ``eager``.

    Kernels take mixed streams, and for each of them one number of beta (``has_kernel``). Where somebody else takes the
    operations apart, as a trace, torch.export or torch.func do, no kernel runs, whatever the backend.

    Raises:
        ValueError: the backend is one of kernels, which cannot run; says why.
    """
    kernel = choose_kernel(streams, views, backend)
    if kernel:
        reason = operators.find_obstacle(streams, views, kernel) if has_kernel else "there are none for this kind"
        if reason is None:
            return kernel
        if backend != "auto":
            raise ValueError(
                f"backend={backend!r} cannot run the kernels: {reason}; backend='auto' takes PyTorch there"
            )
    return "operations" if needs_operations() else "eager"


def choose_kernel(streams: Tensor, views: int, backend: str) -> str | None:
    """The kernels that the backend means for these streams, if any, whether they can take them or not."""
    if backend == "torch" or torch.jit.is_tracing() or is_exporting() or is_transformed():
        return None
    if backend != "auto":
        return backend
    if streams.is_cuda:
        count = streams.shape[-2] * (views + streams.shape[-2] + 1)
        return "triton" if count <= MOST_COEFFICIENTS else None
    if torch.compiler.is_compiling() or not streams.is_contiguous():  # Inductor's code keeps less, and is as quick
        return None
    return "native"
