"""The update rule as PyTorch runs it operation by operation, with a backward of our own.

Autograd's would keep each intermediate that it needs; these functions keep their inputs and the coefficients.

What goes from ``width_connection`` to ``depth_connection`` in the graph of gradients is a **placeholder**
(..., S, E): in memory the streams H themselves, it stands for the carried streams alpha_r^T @ H that the second step is
about to form. The gradient that comes back there is the one of the carried streams, so that one pass over H
serves both steps.
"""

from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hcvision.connections import reference
from hcvision.connections.functions import skip_binding
from hcvision.connections.modes import needs_operations_backward, without_autocast
from hcvision.connections.reference import Options, Rule


def width_connection(streams: Tensor, rule: Rule, options: Options) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``steps.width_connection``."""
    norm, center, tanh, _ = options
    views, placeholder, alpha, beta = Width.apply(streams, norm, center, tanh, *rule)[:4]
    return views.flatten(-2).to(streams.dtype), streams, alpha, beta, placeholder


def read_streams(
    streams: Tensor, alpha: Tensor, beta: Tensor, views: int
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``steps.read_streams``."""
    columns = alpha[..., None] if alpha.dim() < streams.dim() else alpha
    mixed, placeholder = ReadStreams.apply(streams, columns, views)
    return mixed.flatten(-2).to(streams.dtype), streams, alpha, beta, placeholder


def depth_connection(streams: Tensor, output: Tensor, alpha: Tensor, beta: Tensor, placeholder: Tensor) -> Tensor:
    """See ``steps.depth_connection``."""
    carried = alpha[..., output.shape[-2] :].detach() if alpha.dim() == streams.dim() else None
    return Depth.apply(placeholder, carried, output, beta).flatten(-2).to(streams.dtype)


def project(x: Tensor, rows: Tensor) -> Tensor:
    """``reference.project``, keeping x in its own type."""
    return Project.apply(x, rows)[0]


def mix(streams: Tensor, alpha: Tensor, output: Optional[Tensor] = None, beta: Optional[Tensor] = None) -> Tensor:
    """``reference.mix`` by a matmul where that is exact, else in place; laid out in memory as x is."""
    if alpha.shape[-1] > 1 and is_matmul_exact(streams):
        mixed = lay_out_like(streams, alpha.mT @ streams.to(alpha.dtype))
        if output is None:
            return mixed
        return mixed.add_(output) if beta is None else mixed.addcmul_(beta[..., None], output)
    if output is None:
        mixed, first = alpha[..., 0, :, None] * streams[..., 0, None, :], 1
    else:
        mixed, first = output if beta is None else beta[..., None] * output, 0
    mixed = lay_out_like(streams, mixed)
    for i in range(first, streams.shape[-2]):
        mixed.addcmul_(alpha[..., i, :, None], streams[..., i, None, :])
    return mixed


def write(streams: Tensor, alpha: Optional[Tensor], output: Tensor, beta: Tensor) -> Tensor:
    """``reference.write`` by ``mix``."""
    if alpha is None:
        return reference.write(streams, alpha, output, beta)
    if beta.dim() == streams.dim():
        return mix(streams, alpha, mix(output, beta.mT))
    return mix(streams, alpha, output, beta)


def lay_out_like(streams: Tensor, mixed: Tensor) -> Tensor:
    """Keep the memory layout of x, as ``x + branch(x)`` does: what follows may round by it."""
    if mixed.shape != streams.shape or mixed.stride() == streams.stride():
        return mixed
    return torch.empty_like(streams, dtype=mixed.dtype).copy_(mixed)


def is_matmul_exact(tensor: Tensor) -> bool:
    """Whether a matmul may mix streams: on a CPU, where it is quick, if it multiplies float32 as it is."""
    backends: Any = torch.backends  # the innermost setting says what those above it do, where it has none of its own
    return tensor.device.type == "cpu" and backends.mkldnn.matmul.fp32_precision in ("none", "ieee")


def mix_backward(
    streams: Tensor, alpha: Tensor, views: int, grad_views: Optional[Tensor], grad_carried: Optional[Tensor]
) -> Tuple[Tensor, List[Tensor]]:
    """Those of the streams and of alpha, in two parts, where views and carried streams are alpha^T @ H."""
    to_views, to_carried = alpha[..., :views], alpha[..., views:]
    grad_carried = torch.zeros_like(streams) if grad_carried is None else grad_carried.to(alpha.dtype)
    if to_carried.shape[-1]:
        grad_streams = mix(grad_carried, to_carried.mT).contiguous()
        grads = [streams @ grad_carried.mT]
    else:
        grad_streams, grads = grad_carried.clone(), [to_carried]
    if grad_views is None:
        return grad_streams, [torch.zeros_like(to_views), *grads]
    grad_views = grad_views.to(alpha.dtype)
    grads.insert(0, streams @ grad_views.mT)
    if views == 1:
        grad_streams.addcmul_(to_views, grad_views)
    elif not is_matmul_exact(grad_views):
        grad_streams.add_(mix(grad_views, to_views.mT))
    else:
        parts = (part.reshape(-1, *part.shape[-2:]) for part in (to_views, grad_views))
        grad_streams.view(-1, *grad_streams.shape[-2:]).baddbmm_(*parts)
    return grad_streams, grads


def project_backward(
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


def prepare_backward(
    rule: Any, center: bool, grad_static: Optional[Tensor], grad_rows: Optional[Tensor], grad_scale: Optional[Tensor]
) -> List[Optional[Tensor]]:
    """Those of the parameters, from those of what ``reference.prepare`` makes of them."""
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


def choose_kept(parts: List[Tensor], norm: bool, center: bool, tanh: bool) -> List[Optional[Tensor]]:
    """Of the parts of ``reference.coefficients``, those that its gradient needs."""
    projected, dynamic, rstd, mean = parts or (None,) * 4
    return [projected, dynamic if tanh else None, rstd if norm else None, mean if norm and center else None]


@skip_binding
class Width(torch.autograd.Function):
    """``reference.prepare``, ``reference.read``, the placeholder; saves streams and parts of the coefficients."""

    @staticmethod
    def forward(streams, norm, center, tanh, *rule):
        prepared = reference.prepare(rule, center and norm, streams.dtype)
        numbers, parts = reference.coefficients(streams, *prepared, norm, center, tanh)
        to_views, alpha, beta = reference.split_coefficients(numbers, rule[1].dim() == 1)
        views, kept = mix(streams, to_views), choose_kept(parts, norm, center, tanh)
        # beta is kept longer than alpha, which must not stay with it
        return views, streams.view_as(streams), alpha, beta.contiguous(), *prepared, *kept

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
        if needs_operations_backward((grad_views, grad_carried, grad_alpha, grad_beta)):

            def read(streams, *rule):
                return reference.read_and_carry(streams, rule, ctx.norm, ctx.center, ctx.tanh)

            grads = [grad_views, grad_alpha, grad_beta, grad_carried]
            grad_streams, *grads = reference.gradients(read, (streams, *rule), grads)
            return grad_streams, None, None, None, *grads
        with without_autocast(streams.device.type):
            coefficients = static.expand(*streams.shape[:-2], *static.shape)
            if rows is not None:
                coefficients = torch.addcmul(static, scale, projected if dynamic is None else dynamic)
            streams = streams.to(static.dtype)
            dynamic = projected if dynamic is None else dynamic
            grad_streams, through = mix_backward(streams, coefficients[..., :last], views, grad_views, grad_carried)
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
                grad_rows = project_backward(grad_streams, streams, rows, projected, grad, rstd, mean)
            grads = prepare_backward(rule, center, grad_static, grad_rows, grad_scale)
        return grad_streams, None, None, None, *grads


@skip_binding
class Project(torch.autograd.Function):
    """RMSNorm(x) @ rows^T, keeping x in its own type."""

    @staticmethod
    def forward(x, rows):
        return reference.projections(x.to(rows.dtype), rows, True, False)[:2]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad, _):
        x, rows, projected, rstd = ctx.saved_tensors
        if needs_operations_backward([grad]):
            return tuple(reference.gradients(Project.forward, (x, rows), (grad, None)))
        x = x.to(rows.dtype)
        grad_x = x.new_zeros(x.shape)
        with without_autocast(x.device.type):
            grad_rows = project_backward(grad_x, x, rows, projected, grad, rstd, None)
        return grad_x, grad_rows


@skip_binding
class ReadStreams(torch.autograd.Function):
    """The views of streams by given weights, and the streams, for alpha^T @ streams that are about to be formed."""

    @staticmethod
    def forward(streams, alpha, views):
        return mix(streams, alpha[..., :views]), streams.view_as(streams)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.views = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_views, grad_carried):
        streams, alpha = ctx.saved_tensors
        if needs_operations_backward((grad_views, grad_carried)):

            def read(streams, alpha):
                to_views, to_carried = alpha[..., : ctx.views], alpha[..., ctx.views :]
                carried = reference.mix(streams, to_carried) if to_carried.shape[-1] else streams
                return reference.mix(streams, to_views), carried

            return *reference.gradients(read, (streams, alpha), (grad_views, grad_carried)), None
        with without_autocast(streams.device.type):
            grads = mix_backward(streams.to(alpha.dtype), alpha, ctx.views, grad_views, grad_carried)
            return grads[0], torch.cat(grads[1], dim=-1), None


@skip_binding
class Depth(torch.autograd.Function):
    """``reference.write``; saves the branch output and beta. The placeholder has the gradient of the next streams."""

    @staticmethod
    def forward(streams, alpha, output, beta):
        return write(streams, alpha, output, beta)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx, grad):
        output, beta = ctx.saved_tensors
        combine = reference.mix if needs_operations_backward([grad]) else mix
        with without_autocast(grad.device.type):
            if beta.dim() == grad.dim():  # every output went to every stream
                grad_output = combine(grad, beta)
                grad_beta = grad @ output.to(grad.dtype).mT
            elif output.shape[-2] == 1:  # one output went to every stream (HC)
                grad_output = combine(grad, beta[..., None])
                grad_beta = (grad @ output.to(grad.dtype).mT).squeeze(-1)
            else:  # or each its own (FC)
                grad_output = beta[..., None] * grad
                grad_beta = torch.linalg.vecdot(output.to(grad.dtype), grad)
        return grad, None, grad_output, grad_beta


@skip_binding
class KeepInputs(torch.autograd.Function):
    """A function of tensors, of which backward keeps the inputs alone and computes it once more."""

    @staticmethod
    def forward(function, *inputs):
        return function(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.function, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        inputs = ctx.saved_tensors
        found: List[Optional[Tensor]] = [None] * len(inputs)
        if any(grad is not None for grad in grads):
            found = reference.gradients(ctx.function, inputs, grads)
        # an input that none of these outputs depends on has a gradient of zeros, which DDP waits for
        pairs = zip(inputs, found, ctx.needs_input_grad[1:], strict=True)
        return None, *(torch.zeros_like(one) if need and grad is None else grad for one, grad, need in pairs)
