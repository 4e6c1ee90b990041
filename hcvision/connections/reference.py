"""The update rule of connections in plain PyTorch, once: what every other form of it has to equal.

TorchScript, torch.compile, torch.export and torch.func see these operations as they are, with the gradients that
autograd gives them. Letters in shapes are those of ``hcvision.connections``.
"""

from collections.abc import Callable, Sequence
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hcvision.connections.modes import without_autocast

# the parameters of a connection: static alpha and beta, the projections, their scales, the norm's weight
Rule = Tuple[Tensor, Tensor, Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor]]
Options = Tuple[bool, bool, bool, str]  # norm, center, tanh, backend


def width_connection(streams: Tensor, rule: Rule, options: Options) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``steps.width_connection``; streams stand for themselves here."""
    norm, center, tanh, _ = options
    static, rows, scale = prepare(rule, center and norm, streams.dtype)
    views, alpha, beta = read(streams, rule[1].dim() == 1, static, rows, scale, norm, center, tanh)
    return views.flatten(-2).to(streams.dtype), streams, alpha, beta, streams


def read_streams(
    streams: Tensor, alpha: Tensor, beta: Tensor, views: int
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``steps.read_streams``."""
    columns = alpha[..., None] if alpha.dim() < streams.dim() else alpha
    return mix(streams, columns[..., :views]).flatten(-2).to(streams.dtype), streams, alpha, beta, streams


def depth_connection(streams: Tensor, output: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """See ``steps.depth_connection``."""
    carried: Optional[Tensor] = None
    if alpha.dim() == streams.dim():
        carried = alpha[..., output.shape[-2] :]
    return write(streams, carried, output, beta).flatten(-2).to(streams.dtype)


def prepare(rule: Rule, center: bool, dtype: torch.dtype) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
    """Static alpha and beta (S, K), the dynamic projections as rows (K, E), and their scales (K,) or (S, K)."""
    static_alpha, static_beta, alpha_fn, beta_fn, alpha_scale, beta_scale, norm_weight = rule
    dtype = torch.promote_types(dtype, torch.float32)
    columns = static_beta if static_beta.dim() == 2 else static_beta[:, None]
    static = torch.cat([static_alpha, columns], dim=1).to(dtype)
    if alpha_fn is None or beta_fn is None or alpha_scale is None or beta_scale is None:
        return static, None, None
    rows = torch.cat([alpha_fn.transpose(-1, -2), beta_fn.transpose(-1, -2)]).to(dtype)  # ONNX has no mT
    if alpha_scale.dim() == 1:
        alpha_scale = alpha_scale.expand(alpha_fn.shape[1])
    scale = torch.cat([alpha_scale, beta_scale], dim=-1).to(dtype)
    if norm_weight is not None:
        rows = rows * norm_weight.to(dtype)
    if center:
        rows = rows - rows.mean(1, keepdim=True)  # (H - mean(H)) @ row = H @ (row - mean(row))
    return static, rows, scale


def read(
    streams: Tensor,
    squeeze_beta: bool,
    static: Tensor,
    rows: Optional[Tensor],
    scale: Optional[Tensor],
    norm: bool,
    center: bool,
    tanh: bool,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Views (..., V, E), alpha (..., S, V+S) and beta, (..., S) where it is squeezed, else (..., S, V) as in GHC.

    The weights are as ``prepare`` returns them.
    """
    numbers, _ = coefficients(streams, static, rows, scale, norm, center, tanh)
    to_views, alpha, beta = split_coefficients(numbers, squeeze_beta)
    return mix(streams, to_views), alpha, beta


def split_coefficients(numbers: Tensor, squeeze_beta: bool) -> Tuple[Tensor, Tensor, Tensor]:
    """(..., S, K) in three parts: the columns of alpha for the views, all of alpha, and beta as in ``read``."""
    count, number = numbers.shape[-2], numbers.shape[-1]
    views = number - count - 1 if squeeze_beta else (number - count) // 2
    beta = numbers[..., number - 1] if squeeze_beta else numbers[..., views + count :]
    return numbers[..., :views], numbers[..., : views + count], beta


def read_and_carry(streams: Tensor, rule: Rule, norm: bool, center: bool, tanh: bool) -> List[Tensor]:
    """Views, alpha and beta, as ``read`` gives them, and the carried streams alpha_r^T @ streams (..., S, E)."""
    prepared = prepare(rule, center and norm, streams.dtype)
    views, alpha, beta = read(streams, rule[1].dim() == 1, *prepared, norm, center, tanh)
    return [views, alpha, beta, mix(streams, alpha[..., views.shape[-2] :])]


def gradients(
    function: Callable, inputs: Sequence[Optional[Tensor]], grads: Sequence[Optional[Tensor]]
) -> List[Optional[Tensor]]:
    """Gradients of the inputs that need one, by autograd of the function, from those of its outputs.

    They have a graph of their own where gradients are enabled. It ends in views of the inputs: what is behind these
    may depend on other inputs.
    """
    has_graph = torch.is_grad_enabled()
    needs = [part is not None and part.requires_grad for part in inputs]
    with torch.enable_grad(), without_autocast(next(part.device.type for part in inputs if part is not None)):
        ends: list[Any] = [
            part if part is None else part.view_as(part) if has_graph else part.detach().requires_grad_(need)
            for part, need in zip(inputs, needs, strict=True)
        ]
        wanted = [part for part, need in zip(ends, needs, strict=True) if need]
        pairs = [
            (one, grad.to(one.dtype)) for one, grad in zip(function(*ends), grads, strict=True) if grad is not None
        ]
        outputs, given = zip(*((one, grad) for one, grad in pairs if one.requires_grad), strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, given, create_graph=has_graph, allow_unused=True))
    return [next(found) if need else None for need in needs]


def coefficients(
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
    projected, rstd, mean = projections(streams.to(rows.dtype), rows, norm, center)
    dynamic = projected.tanh() if tanh else projected
    return torch.addcmul(static, scale, dynamic), [projected, dynamic, rstd, mean]


def projections(x: Tensor, rows: Tensor, norm: bool, center: bool) -> Tuple[Tensor, Tensor, Tensor]:
    """norm(x) @ rows^T, 1 / deviation and mean, as far as there are any; rows are centered if x is to be."""
    projected = F.linear(x, rows)
    if not norm:
        return projected, projected, projected
    rstd, mean = inverse_deviation(x, center)
    return projected * rstd, rstd, mean


def project(x: Tensor, rows: Tensor) -> Tensor:
    """RMSNorm(x) @ rows^T: (..., C), (K, C) -> (..., K), in the dtype of the rows."""
    return projections(x.to(rows.dtype), rows, True, False)[0]


def inverse_deviation(streams: Tensor, center: bool) -> Tuple[Tensor, Tensor]:
    """What LayerNorm (center) or RMSNorm multiplies a stream by, and the mean that LayerNorm takes: (..., S, 1)."""
    variance = torch.linalg.vector_norm(streams, dim=-1, keepdim=True).square() / streams.shape[-1]
    mean = variance
    if center:
        mean = streams.mean(-1, keepdim=True)
        variance = (variance - mean.square()).clamp(min=0.0)
    return (variance + 1e-6).rsqrt(), mean


def mix(streams: Tensor, alpha: Tensor, output: Optional[Tensor] = None, beta: Optional[Tensor] = None) -> Tensor:
    """alpha^T @ streams (+ beta * output): (..., S, E), (..., S, K), (..., K or 1, E), (..., S) -> (..., K, E).

    An output without beta is added as it is.
    """
    first = 0
    if output is not None:
        mixed = output if beta is None else beta[..., None] * output
    else:
        mixed = alpha[..., 0, :, None] * streams[..., 0, None, :]
        first = 1
    for i in range(first, streams.shape[-2]):
        mixed = torch.addcmul(mixed, alpha[..., i, :, None], streams[..., i, None, :])
    return mixed


def read_channels(streams: Tensor, read: Tensor) -> Tuple[Tensor, Tensor]:
    """See ``steps.read_channels``; streams stand for themselves here."""
    return read_by_channel(streams, read).to(streams.dtype), streams


def read_by_channel(streams: Tensor, read: Tensor) -> Tensor:
    """The sum over streams of read * streams, (S, E) or (..., S, E) and (..., S, E) -> (..., E)."""
    mixed = read[..., 0, :] * streams[..., 0, :]
    for i in range(1, streams.shape[-2]):
        mixed = torch.addcmul(mixed, read[..., i, :], streams[..., i, :])
    return mixed


def read_gated(streams: Tensor, rows: Tensor, up: Tensor, gain: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """View (..., E), hidden numbers (..., r) and write (..., S); see ``steps.read_gated``."""
    hidden, write = split_numbers(gate_numbers(streams, rows)[0], up.shape[1])
    return read_by_channel(streams, open_gates(hidden, up, gain)), hidden, write


def gate_numbers(streams: Tensor, rows: Tensor) -> Tuple[Tensor, Tensor]:
    """vec(RMSNorm(streams)) @ rows^T / S: (..., S, E), (K, S*E) -> (..., K), and 1 / deviation (..., S, 1)."""
    count, width = streams.shape[-2], streams.shape[-1]
    streams = streams.to(rows.dtype)
    rstd, _ = inverse_deviation(streams, False)
    numbers = F.linear(streams[..., 0, :], rows[:, :width]) * rstd[..., 0, :]
    for i in range(1, count):
        projected = F.linear(streams[..., i, :], rows[:, i * width : (i + 1) * width])
        numbers = torch.addcmul(numbers, projected, rstd[..., i, :])
    return numbers / count, rstd


def split_numbers(numbers: Tensor, rank: int) -> Tuple[Tensor, Tensor]:
    """What the gates are made of (..., r), and the write (..., S), of both before their functions (..., r + S)."""
    return F.silu(numbers[..., :rank]), 2 * numbers[..., rank:].sigmoid()


def open_gates(hidden: Tensor, up: Tensor, gain: Tensor) -> Tensor:
    """gain * 2 sigmoid(hidden @ up^T): (..., r), (S*E, r), (S, E) -> (..., S, E)."""
    gates = 2 * F.linear(hidden, up).sigmoid()
    return gain * gates.reshape(hidden.shape[:-1] + gain.shape)


def update_orthogonal(streams: Tensor, output: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """The next stream (..., 1, E), and <x, f> / |x|^2 and 1 / |x|^2 (..., 1, 1); see ``steps.update_orthogonal``."""
    x = streams.to(torch.promote_types(streams.dtype, torch.float32))
    output = output.to(x.dtype)
    inverse = 1 / (x.square().sum(-1, keepdim=True) + 1e-6)
    along = (x * output).sum(-1, keepdim=True) * inverse
    return torch.addcmul(x + output, along, x, value=-1), along, inverse


def update_low_rank(streams: Tensor, output: Tensor, low_rank: Tensor, scales: Tensor) -> Tuple[Tensor, Tensor]:
    """The next stream (..., 1, E), and A x (..., 1, r); see ``steps.update_low_rank``."""
    x = streams.to(low_rank.dtype)
    inner = F.linear(x, low_rank[0])
    carried = scales[1] * (x + inner @ low_rank[1])
    return torch.addcmul(carried, scales[0], output.to(low_rank.dtype)), inner


def write_channels(streams: Tensor, output: Tensor, write: Tensor) -> Tensor:
    """See ``steps.write_channels``."""
    return torch.addcmul(streams.to(write.dtype), write, output).flatten(-2).to(streams.dtype)


def write(streams: Tensor, alpha: Optional[Tensor], output: Tensor, beta: Tensor) -> Tensor:
    """alpha^T @ streams (None: the streams) + beta * output, or + beta @ output for a beta (..., S, V)."""
    if alpha is None:
        return torch.addcmul(streams.to(beta.dtype), beta[..., None], output)
    if beta.dim() == streams.dim():
        return mix(streams, alpha, mix(output, beta.transpose(-1, -2)))
    return mix(streams, alpha, output, beta)
