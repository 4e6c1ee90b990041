"""Rules that carry streams as they are, as PyTorch runs them, with a backward of our own; the others: ``eager.py``.

As there, a **placeholder** stands for the carried streams in the graph of gradients, so that one pass over the streams
serves both steps.
"""

from typing import Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hcvision.connections import reference
from hcvision.connections.functions import skip_binding
from hcvision.connections.modes import needs_operations_backward, without_autocast


def read_channels(streams: Tensor, read: Tensor) -> Tuple[Tensor, Tensor]:
    """See ``steps.read_channels``."""
    view, placeholder = ReadChannels.apply(streams, read)
    return view.to(streams.dtype), placeholder


def read_gated(streams: Tensor, rows: Tensor, up: Tensor, gain: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """``reference.read_gated``, and the placeholder."""
    return ReadGated.apply(streams, rows, up, gain)[:4]


def update_orthogonal(streams: Tensor, output: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """See ``reference.update_orthogonal``."""
    return UpdateOrthogonal.apply(streams, output)


def update_low_rank(*inputs: Tensor) -> Tuple[Tensor, Tensor]:
    """See ``reference.update_low_rank``."""
    return UpdateLowRank.apply(*inputs)


def write_channels(placeholder: Tensor, output: Tensor, write: Tensor) -> Tensor:
    """See ``steps.write_channels``."""
    return WriteChannels.apply(placeholder, output, write).flatten(-2).to(placeholder.dtype)


def read_by_channel(streams: Tensor, read: Tensor) -> Tensor:
    """``reference.read_by_channel``, added up in place."""
    mixed = read[..., 0, :] * streams[..., 0, :]
    for i in range(1, streams.shape[-2]):
        mixed.addcmul_(read[..., i, :], streams[..., i, :])
    return mixed


def multiply_up(streams: Tensor, others: Tensor) -> Tensor:
    """The sum over all tokens of a product: (..., S, E), (..., S or 1, E) -> (S, E)."""
    count, width = streams.shape[-2:]
    return (streams * others).reshape(-1, count * width).sum(0).view(count, width)


@skip_binding
class ReadChannels(torch.autograd.Function):
    """``reference.read_channels`` and the placeholder; saves streams and weights."""

    @staticmethod
    def forward(streams, read):
        return read_by_channel(streams, read), streams.view_as(streams)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_view, grad_carried):
        streams, read = ctx.saved_tensors
        if grad_view is None:
            return grad_carried, torch.zeros_like(read)
        if needs_operations_backward((grad_view, grad_carried)):

            def both(streams, read):
                return reference.read_by_channel(streams, read), streams

            return tuple(reference.gradients(both, (streams, read), (grad_view, grad_carried)))
        with without_autocast(streams.device.type):
            grad = grad_view[..., None, :]
            back = read * grad if grad_carried is None else torch.addcmul(grad_carried.to(read.dtype), read, grad)
            return back, multiply_up(streams, grad) if ctx.needs_input_grad[1] else None


@skip_binding
class ReadGated(torch.autograd.Function):
    """``reference.read_gated`` and the placeholder; saves streams and parameters, and r + S + S numbers of a token.

    Gates, which are as large as the streams, are made again.
    """

    @staticmethod
    def forward(streams, rows, up, gain):
        numbers, rstd = reference.gate_numbers(streams, rows)
        hidden, write = reference.split_numbers(numbers, up.shape[1])
        view = read_by_channel(streams, reference.open_gates(hidden, up, gain))
        return view, hidden, write, streams.view_as(streams), numbers, rstd

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, *output[4:])
        ctx.mark_non_differentiable(*output[4:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_view, grad_hidden, grad_write, grad_carried, *_):
        streams, rows, up, gain, numbers, rstd = ctx.saved_tensors
        if needs_operations_backward((grad_view, grad_hidden, grad_write, grad_carried)):

            def read(streams, *parameters):
                return *reference.read_gated(streams, *parameters), streams

            grads = [grad_view, grad_hidden, grad_write, grad_carried]
            return tuple(reference.gradients(read, (streams, rows, up, gain), grads))
        with without_autocast(streams.device.type):
            x, rank, count = streams.to(rows.dtype), up.shape[1], streams.shape[-2]
            grad_x = torch.zeros_like(x) if grad_carried is None else grad_carried.to(x.dtype).clone()
            grad, grad_up, grad_gain = torch.zeros_like(numbers), torch.zeros_like(up), torch.zeros_like(gain)
            if grad_view is not None:
                half = F.linear(F.silu(numbers[..., :rank]), up).sigmoid_().view(x.shape)  # of the gates
                grad_x.addcmul_(gain * half, grad_view[..., None, :], value=2)
                grad_read = x * grad_view[..., None, :]
                grad_gain = 2 * multiply_up(grad_read, half)
                logits = grad_read.mul_(gain).mul_(half).addcmul_(grad_read, half, value=-1).mul_(2)
                logits = logits.reshape(-1, len(up))
                grad_up = logits.mT @ F.silu(numbers[..., :rank]).reshape(-1, rank)
                grad[..., :rank] = (logits @ up).view(*numbers.shape[:-1], rank)
            if grad_hidden is not None:
                grad[..., :rank] += grad_hidden
            open_share = numbers[..., :rank].sigmoid()
            grad[..., :rank] *= open_share * (1 + numbers[..., :rank] * (1 - open_share))
            if grad_write is not None:
                share = numbers[..., rank:].sigmoid()
                grad[..., rank:] = 2 * grad_write * share * (1 - share)
            grad = grad.reshape(-1, len(rows)) / count
            normed = x * rstd
            back = (grad @ rows).view(x.shape)
            along = (back * normed).sum(-1, keepdim=True) / x.shape[-1]
            grad_x.addcmul_(back.addcmul_(normed, along, value=-1), rstd)
            return grad_x, grad.mT @ normed.reshape(-1, rows.shape[1]), grad_up, grad_gain


@skip_binding
class WriteChannels(torch.autograd.Function):
    """``reference.write_channels``; saves the branch output and the weights."""

    @staticmethod
    def forward(streams, output, write):
        return torch.addcmul(streams.to(write.dtype), write, output)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        output, write = ctx.saved_tensors
        combine = reference.read_by_channel if needs_operations_backward([grad]) else read_by_channel
        with without_autocast(grad.device.type):
            grad_write = multiply_up(grad, output) if ctx.needs_input_grad[2] else None
            return grad, combine(grad, write)[..., None, :], grad_write


@skip_binding
class UpdateOrthogonal(torch.autograd.Function):
    """``reference.update_orthogonal``; saves the stream and the branch output, and two numbers of a token."""

    @staticmethod
    def forward(streams, output):
        return reference.update_orthogonal(streams, output)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx, grad, *_):
        streams, output, along, inverse = ctx.saved_tensors
        if needs_operations_backward([grad]):

            def update(*inputs):
                return reference.update_orthogonal(*inputs)[:1]

            return tuple(reference.gradients(update, (streams, output), [grad]))
        with without_autocast(grad.device.type):
            x = streams.to(grad.dtype)
            share = (grad * x).sum(-1, keepdim=True) * inverse
            grad_x = torch.addcmul(grad - along * grad, share, output.to(grad.dtype), value=-1)
            return grad_x.addcmul_(2 * along * share, x), torch.addcmul(grad, share, x, value=-1)


@skip_binding
class UpdateLowRank(torch.autograd.Function):
    """``reference.update_low_rank``; saves the stream, the branch output, and the r numbers A x of a token."""

    @staticmethod
    def forward(streams, output, low_rank, scales):
        return reference.update_low_rank(streams, output, low_rank, scales)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad, _):
        streams, output, low_rank, scales, inner = ctx.saved_tensors
        if needs_operations_backward([grad]):

            def update(*inputs):
                return reference.update_low_rank(*inputs)[:1]

            return tuple(reference.gradients(update, (streams, output, low_rank, scales), [grad]))
        with without_autocast(grad.device.type):
            x, rank = streams.to(grad.dtype).reshape(-1, streams.shape[-1]), low_rank.shape[1]
            flat, inner = grad.reshape(x.shape), inner.reshape(-1, rank)
            to_inner = flat @ low_rank[1].mT
            grad_scales = torch.stack(
                [
                    torch.dot(flat.flatten(), output.to(grad.dtype).reshape(-1)),
                    torch.dot(flat.flatten(), x.flatten()) + torch.dot(to_inner.flatten(), inner.flatten()),
                ]
            )
            to_inner, carried = scales[1] * to_inner, scales[1] * flat
            grad_low_rank = torch.stack([to_inner.mT @ x, inner.mT @ carried])
            grad_x = carried.addmm_(to_inner, low_rank[0]).view(grad.shape)
            return grad_x, scales[0] * grad, grad_low_rank, grad_scales
