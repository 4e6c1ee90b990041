"""The update rule of connections in plain PyTorch, once: what every other form of it has to equal.

TorchScript, torch.compile and torch.export see these operations as they are. Letters in shapes are those of
``hcvision.connections``.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

Rule = Tuple[Tensor, Tensor, Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor], Optional[Tensor]]


def is_plain() -> bool:
    """Whether a step has to consist of the operations here, with the gradients that autograd gives them."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed()


def is_transformed() -> bool:
    """Whether torch.func (vmap, grad, jvp, ...) or forward-mode differentiation is at work.

    They take operations of PyTorch alone: a kernel would miss the batch and the tangents that a tensor carries.
    """
    if torch.compiler.is_compiling():
        return False
    levels: Any = forward_ad
    return torch._C._functorch.maybe_current_level() is not None or levels._current_level >= 0


def wants_operations(grads: Sequence[Optional[Tensor]]) -> bool:
    """Whether the backward of these has to consist of PyTorch's operations.

    It has for a second derivative, under a transform, and for a batch of gradients (``is_grads_batched``).
    """
    batched = torch._C._functorch.is_legacy_batchedtensor
    return torch.is_grad_enabled() or is_transformed() or any(grad is not None and batched(grad) for grad in grads)


def is_exporting() -> bool:
    flags: Any = torch.compiler  # is_exporting() itself says yes in every torch.compile of PyTorch 2.11
    return flags._is_exporting_flag


def no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


@torch.fx.wrap
def split_last(x: Tensor, parts: int) -> Tensor:
    """(..., parts * size) -> (..., parts, size), by sizes that a trace for ONNX takes from x, unlike ``unflatten``."""
    return x.reshape(list(x.shape[:-1]) + [parts, x.shape[-1] // parts])  # noqa: RUF005 - TorchScript


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
    numbers, made = coefficients(streams, static, rows, scale, norm, center, tanh)
    last = views + static.shape[0]
    mixed = mix(streams, numbers[..., :views], None, None)
    beta = numbers[..., last] if alone else numbers[..., last:]
    return mixed, numbers[..., :last], beta, made


def read_and_carry(streams: Tensor, views: int, alone: bool, *rest: Any) -> List[Tensor]:
    """Views, alpha and beta, as ``read`` gives them, and the carried streams alpha_r^T @ streams (..., S, E)."""
    mixed, alpha, beta, _ = read(streams, views, alone, *rest)
    return [mixed, alpha, beta, mix(streams, alpha[..., views:], None, None)]


def gradients(
    function: Callable, inputs: Sequence[Optional[Tensor]], grads: Sequence[Optional[Tensor]]
) -> List[Optional[Tensor]]:
    """Gradients of the inputs that need one, by autograd of the function, from those of its outputs.

    They have a graph of their own where gradients are enabled. It ends in views of the inputs: what is behind these
    may depend on other inputs.
    """
    has_graph = torch.is_grad_enabled()
    needs = [part is not None and part.requires_grad for part in inputs]
    with torch.enable_grad(), no_autocast(next(part.device.type for part in inputs if part is not None)):
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


def inverse_deviation(streams: Tensor, center: bool) -> Tuple[Tensor, Tensor]:
    """What LayerNorm (center) or RMSNorm multiplies a stream by, and the mean that LayerNorm takes: (..., S, 1)."""
    variance = torch.linalg.vector_norm(streams, dim=-1, keepdim=True).square() / streams.shape[-1]
    mean = variance
    if center:
        mean = streams.mean(-1, keepdim=True)
        variance = (variance - mean.square()).clamp(min=0.0)
    return (variance + 1e-6).rsqrt(), mean


def mix(streams: Tensor, alpha: Tensor, output: Optional[Tensor], beta: Optional[Tensor]) -> Tensor:
    """alpha^T @ streams (+ beta * output): (..., S, E), (..., S, K), (..., K or 1, E), (..., S) -> (..., K, E).

    An output without beta is added as it is.
    """
    if torch.jit.is_scripting():
        pass
    elif not is_plain() and alpha.shape[-1] > 1 and exact_matmul(streams):
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
    in_place = True
    if torch.jit.is_scripting():
        pass
    else:
        mixed = _laid_out_like(streams, mixed)
        in_place = not is_transformed()  # a batch or a tangent may be in one of the summands alone
    for i in range(first, streams.shape[-2]):
        if in_place:
            mixed.addcmul_(alpha[..., i, :, None], streams[..., i, None, :])
        else:
            mixed = torch.addcmul(mixed, alpha[..., i, :, None], streams[..., i, None, :])
    return mixed


def write(streams: Tensor, alpha: Optional[Tensor], output: Tensor, beta: Tensor) -> Tensor:
    """alpha^T @ streams (None: the streams) + beta * output, or + beta @ output for a beta (..., S, V)."""
    if alpha is None:
        return torch.addcmul(streams.to(beta.dtype), beta[..., None], output)
    if beta.dim() == streams.dim():
        return mix(streams, alpha, mix(output, beta.transpose(-1, -2), None, None), None)
    return mix(streams, alpha, output, beta)


def _laid_out_like(streams: Tensor, mixed: Tensor) -> Tensor:
    """Keep the memory layout of x, as ``x + branch(x)`` does: what follows may round by it."""
    if is_plain() or mixed.shape != streams.shape or mixed.stride() == streams.stride():
        return mixed
    return torch.empty_like(streams, dtype=mixed.dtype).copy_(mixed)


def exact_matmul(tensor: Tensor) -> bool:
    """Whether a matmul may mix streams: on a CPU, where it is quick, if it multiplies float32 as it is."""
    backends: Any = torch.backends  # the innermost setting says what those above it do, where it has none of its own
    return tensor.device.type == "cpu" and backends.mkldnn.matmul.fp32_precision in ("none", "ieee")
