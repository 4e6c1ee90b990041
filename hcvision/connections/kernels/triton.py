"""The kernels in Triton: what one token needs, in one pass over its streams.

Two kernels do everything. ``_forward_kernel`` is the depth-connection of a sub-layer, the width-connection of the
next one, or both joined; ``_backward_kernel`` goes back through the same. Streams are float32, bfloat16 or float16.
Sums over tokens are taken in a fixed order: a program adds those of its tiles to a buffer of its own, one after the
other, and ``_sums_kernel`` adds up the buffers. What a kernel does with a tile of tokens is in ``triton_tiles.py``, and
what becomes of parameters before, and of their gradients behind, in ``triton_parameters.py``: a launch each.
``TRITON_INTERPRET=1`` in the environment runs the kernels on a CPU, slowly, for tests. Letters in shapes are those of
``operators.py``; ``benchmarks/kernel_code.py`` counts what the kernels compile to.
"""

import contextlib
from typing import Any, Optional

import torch
from torch import Tensor

from hcvision.connections.kernels.triton_tiles import INTERPRETED
from hcvision.connections.reference import Rule

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of PyTorch without it
    triton = None

if triton is not None:
    from hcvision.connections.kernels.triton_parameters import _pack_kernel, _unpack_kernel
    from hcvision.connections.kernels.triton_tiles import (
        add_matmul,
        add_product,
        add_to_column,
        all_float32,
        apart,
        cast,
        inverse_deviation,
        load_numbers,
        load_row,
        load_vectors,
        make_zeros,
        project,
        split_terms,
        store_numbers,
        tanh,
        to_coefficients,
        to_float32,
    )

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LANES = 4


def find_obstacle(streams: Tensor, views: int) -> str | None:
    """Why the kernels cannot take these streams (..., S, E), or None."""
    if triton is None:
        return "this PyTorch comes without Triton"
    if not (streams.is_cuda or (INTERPRETED and streams.device.type == "cpu")):
        return f"they need a CUDA tensor, or TRITON_INTERPRET=1 in the environment, got one on {streams.device.type}"
    if streams.dtype not in DTYPES:
        return f"they take float32, bfloat16 and float16, got {str(streams.dtype).removeprefix('torch.')}"
    return None


if triton is not None:

    @triton.jit
    def _forward_kernel(
        streams, output, alpha, beta, static, rows, scale,  # read
        following, views, new_alpha, new_beta,  # written
        T,
        S: tl.constexpr, V: tl.constexpr, E: tl.constexpr,
        DEPTH: tl.constexpr, WIDTH: tl.constexpr, DYNAMIC: tl.constexpr,
        NORM: tl.constexpr, CENTER: tl.constexpr, TANH: tl.constexpr,
        BT: tl.constexpr, BC: tl.constexpr, LANES: tl.constexpr, SP: tl.constexpr, WP: tl.constexpr,
    ):  # fmt: skip
        """DEPTH: following = beta * output + alpha_r^T streams. WIDTH: views and coefficients of what is there then."""
        K: tl.constexpr = V + S + 1
        t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
        there = t < T
        last = tl.minimum(t, T - 1)  # tokens to load: no number is cleared where there are no more
        projected = make_zeros(S * K, BT, LANES)
        square = make_zeros(S, BT, LANES)
        total = make_zeros(S, BT, LANES)
        for start in range(0, E, BC):
            e = start + tl.arange(0, BC)
            mask = there[:, None] & (e < E)[None, :]
            at = last[:, None] * (S * E) + e[None, :]
            h = all_float32(load_vectors(streams, at, e, S, E, BC), S)
            if DEPTH:
                out = load_vectors(output, last[:, None] * (V * E) + e[None, :], e, V, E, BC)
                out = all_float32(out, V)
                mixed = ()
                for j in tl.static_range(S):
                    (old_beta,) = load_numbers(beta, t * S + j, there, 1)  # again, which costs less than keeping it
                    new = old_beta[:, None] * out[j % V]
                    for i in tl.static_range(S):
                        (old_alpha,) = load_numbers(alpha, t * (S * (V + S)) + i * (V + S) + V + j, there, 1)
                        new += old_alpha[:, None] * h[i]
                    new = cast(new, following.dtype.element_ty)
                    tl.store(following + at + j * E, new, mask=mask)
                    mixed = mixed + (to_float32(new),)
                h = mixed
            if WIDTH and DYNAMIC:
                columns = apart(h, S, BT, BC, LANES)
                projected, square, total = project(
                    projected, square, total, columns, rows, e, S, K, E, NORM, CENTER, BT, BC, LANES
                )
        if WIDTH:
            if DYNAMIC:
                to_alpha = ()
                to_beta = ()
                for i in tl.static_range(S):
                    if NORM:
                        rstd = inverse_deviation(tl.sum(square[i], axis=1), tl.sum(total[i], axis=1), E, CENTER)
                    for k in tl.static_range(K):
                        number = tl.sum(projected[k * S + i], axis=1)
                        if NORM:
                            number = number * rstd
                        if k < V + S:
                            to_alpha = to_alpha + (number,)
                        else:
                            to_beta = to_beta + (number,)
                store_numbers(new_alpha, to_alpha, t, there, S * (V + S), WP)
                store_numbers(new_beta, to_beta, t, there, S, SP)
                tl.debug_barrier()
            to_coefficients(new_alpha, t, there, static, scale, S, V + S, 0, K, WP, DYNAMIC, TANH)
            to_coefficients(new_beta, t, there, static, scale, S, 1, V + S, K, SP, DYNAMIC, TANH)
            tl.debug_barrier()
            read = ()  # (S, V), from memory, where each lane of a token finds them
            for i in tl.static_range(S):
                read = read + load_numbers(new_alpha, t * (S * (V + S)) + i * (V + S), there, V)
            for start in range(0, E, BC):
                e = start + tl.arange(0, BC)
                mask = there[:, None] & (e < E)[None, :]
                at = last[:, None] * (S * E) + e[None, :]
                h = all_float32(load_vectors(following if DEPTH else streams, at, e, S, E, BC), S)
                for v in tl.static_range(V):
                    view = read[v][:, None] * h[0]
                    for i in tl.static_range(1, S):
                        view += read[i * V + v][:, None] * h[i]
                    at = last[:, None] * (V * E) + v * E + e[None, :]
                    tl.store(views + at, cast(view, views.dtype.element_ty), mask=mask)

    @triton.jit
    def _backward_kernel(
        streams, grad_views, grad_carried, grad_alpha, grad_beta, static, rows, scale, output, old_beta,  # read
        grad_streams, sums, grad_output, grad_old_beta,  # written
        T, tiles,
        S: tl.constexpr, V: tl.constexpr, E: tl.constexpr,
        DEPTH: tl.constexpr, WIDTH: tl.constexpr, DYNAMIC: tl.constexpr,
        NORM: tl.constexpr, CENTER: tl.constexpr, TANH: tl.constexpr, HAS_GRAD_ALPHA: tl.constexpr,
        BT: tl.constexpr, BC: tl.constexpr, LANES: tl.constexpr, SP: tl.constexpr, KP: tl.constexpr, CP: tl.constexpr,
    ):  # fmt: skip
        """WIDTH: to the streams, from views, carried streams and coefficients. DEPTH: on to output and beta before it.

        Without WIDTH, ``grad_carried`` is the gradient of the streams behind the depth-connection. ``sums`` has what a
        program's tokens add to the gradients of rows (K, E), static (S, K) and scale (K,), one after the other. They
        are added by atomics, which wait for nothing: no other program adds to them, and in this one always the same
        lane, so that their order is that of the tiles.
        """
        K: tl.constexpr = V + S + 1
        H_TERMS: tl.constexpr = 1 if streams.dtype.element_ty == tl.bfloat16 else 3
        BACK_TERMS: tl.constexpr = 2 if streams.dtype.element_ty == tl.bfloat16 else 3
        program = tl.program_id(0)
        sums += program.to(tl.int64) * (K * E + S * K + K)
        if WIDTH:
            first: tl.constexpr = 0 if DYNAMIC else K * E
            for start in range(first, K * E + S * K + K, 1024):
                place = start + tl.arange(0, 1024)
                tl.store(sums + place, tl.zeros([1024], tl.float32), mask=place < K * E + S * K + K)
            tl.debug_barrier()
        for tile in range(program, tiles, tl.num_programs(0)):
            t = (tile * BT + tl.arange(0, BT)).to(tl.int64)
            there = t < T
            last = tl.minimum(t, T - 1)  # tokens to load
            if WIDTH:
                projected = make_zeros(S * K, BT, LANES)
                square = make_zeros(S, BT, LANES)
                total = make_zeros(S, BT, LANES)
                through = make_zeros(S * (V + S), BT, LANES)
                for start in range(0, E, BC):
                    e = start + tl.arange(0, BC)
                    at = last[:, None] * (S * E) + e[None, :]
                    h = all_float32(load_vectors(streams, at, e, S, E, BC), S)
                    h = apart(h, S, BT, BC, LANES)
                    g = load_vectors(grad_views, last[:, None] * (V * E) + e[None, :], e, V, E, BC)
                    g = g + load_vectors(grad_carried, at, e, S, E, BC)
                    g = apart(all_float32(g, V + S), V + S, BT, BC, LANES)
                    more = ()
                    for i in tl.static_range(S):
                        for k in tl.static_range(V + S):
                            more = more + (add_product(through[i * (V + S) + k], h[i], g[k], BC // LANES),)
                    through = more
                    if DYNAMIC:
                        projected, square, total = project(
                            projected, square, total, h, rows, e, S, K, E, NORM, CENTER, BT, BC, LANES
                        )
                to_sums = tl.zeros([BT, CP], tl.float32)  # of the gradients of static and scale, (S, K) and (K,)
                to_scale = ()  # (S, K), to be added up over streams
                coefficients = ()  # alpha, (S, V + S)
                back = ()  # what goes back through the rows, (S, K)
                backs = ()  # the same as terms of a tile (KP, BT) for each stream
                along = ()  # what goes back through the norm, (S,)
                shift = ()  # the part of it that comes from the mean, (S,)
                for i in tl.static_range(S):
                    if DYNAMIC:
                        rstd = tl.full([BT], 1.0, tl.float32)
                        sum = tl.sum(total[i], axis=1)
                        if NORM:
                            rstd = inverse_deviation(tl.sum(square[i], axis=1), sum, E, CENTER)
                        inner = tl.zeros([BT], tl.float32)
                        column = tl.zeros([BT, KP], tl.float32)
                    for k in tl.static_range(K):
                        if k < V + S:
                            grad = tl.where(there, tl.sum(through[i * (V + S) + k], axis=1), 0.0)
                            if HAS_GRAD_ALPHA:
                                grad += tl.load(grad_alpha + t * (S * (V + S)) + i * (V + S) + k, mask=there, other=0.0)
                        else:
                            grad = tl.load(grad_beta + t * S + i, mask=there, other=0.0)
                        to_sums = add_to_column(to_sums, grad, i * K + k, CP)
                        number = tl.zeros([BT], tl.float32) + tl.load(static + i * K + k)
                        if DYNAMIC:
                            factor = tl.load(scale + k)
                            raw = tl.sum(projected[k * S + i], axis=1) * rstd
                            dynamic = raw
                            if TANH:
                                dynamic, slope = tanh(raw)
                            number += factor * dynamic
                            to_scale = to_scale + (grad * dynamic,)
                            grad = grad * factor
                            if TANH:
                                grad = grad * slope
                            inner += grad * raw
                            back = back + (grad * rstd,)
                            column = add_to_column(column, grad * rstd, k, KP)
                        if k < V + S:
                            coefficients = coefficients + (number,)
                    if DYNAMIC:
                        if NORM:
                            along = along + (-rstd * rstd * inner / E,)
                            shift = shift + (rstd * rstd * inner / E * (sum / E),)
                        terms = split_terms(column, BACK_TERMS)
                        transposed = ()
                        for n in tl.static_range(BACK_TERMS):
                            transposed = transposed + (tl.trans(terms[n]),)
                        backs = backs + (transposed,)
                if DYNAMIC:
                    for k in tl.static_range(K):
                        grad = to_scale[k]
                        for i in tl.static_range(1, S):
                            grad += to_scale[i * K + k]
                        to_sums = add_to_column(to_sums, grad, S * K + k, CP)
                number = tl.arange(0, CP)
                mine = number < S * K + K
                tl.atomic_add(sums + K * E + number, tl.sum(to_sums, axis=0), mask=mine, sem="relaxed")
            if DEPTH:
                write = load_numbers(old_beta, t * S, there, S)
                beta_sums = make_zeros(S, BT, LANES)
            for start in range(0, E, BC):
                e = start + tl.arange(0, BC)
                mask = there[:, None] & (e < E)[None, :]
                at = last[:, None] * (S * E) + e[None, :]
                at_views = last[:, None] * (V * E) + e[None, :]
                if WIDTH:
                    loaded = load_vectors(streams, at, e, S, E, BC)
                    h = all_float32(loaded, S)
                    if DYNAMIC:
                        to_rows = tl.zeros([KP, BC], tl.float32)
                        for i in tl.static_range(S):
                            of_h = (loaded[i],) if H_TERMS == 1 else split_terms(h[i], H_TERMS)
                            to_rows = add_matmul(to_rows, backs[i], of_h, BACK_TERMS, H_TERMS)
                        k_at = tl.arange(0, KP)[:, None]
                        of_rows = (k_at < K) & (e < E)[None, :]
                        tl.atomic_add(sums + k_at * E + e[None, :], to_rows, mask=of_rows, sem="relaxed")
                g = all_float32(load_vectors(grad_carried, at, e, S, E, BC), S)
                if WIDTH:
                    to_views = load_vectors(grad_views, at_views, e, V, E, BC)
                    g = all_float32(to_views, V) + g
                    to_streams = ()
                    for i in tl.static_range(S):
                        new = coefficients[i * (V + S)][:, None] * g[0]
                        if DYNAMIC and NORM:
                            if CENTER:
                                new += shift[i][:, None]
                            new += along[i][:, None] * h[i]
                        for k in tl.static_range(1, V + S):
                            new += coefficients[i * (V + S) + k][:, None] * g[k]
                        to_streams = to_streams + (new,)
                    if DYNAMIC:
                        for k in tl.static_range(K):
                            row = load_row(rows + k * E, e, E, BT, BC)
                            added = ()
                            for i in tl.static_range(S):
                                added = added + (to_streams[i] + back[i * K + k][:, None] * row,)
                            to_streams = added
                    g = ()
                    for i in tl.static_range(S):
                        new = cast(to_streams[i], grad_streams.dtype.element_ty)
                        tl.store(grad_streams + at + i * E, new, mask=mask)
                        g = g + (to_float32(new),)
                if DEPTH:
                    out = load_vectors(output, at_views, e, V, E, BC)
                    out = apart(all_float32(out, V), V, BT, BC, LANES)
                    to_next = apart(g, S, BT, BC, LANES)
                    more = ()
                    for i in tl.static_range(S):
                        more = more + (add_product(beta_sums[i], out[i % V], to_next[i], BC // LANES),)
                    beta_sums = more
                    for v in tl.static_range(V):
                        new = write[v][:, None] * g[v]
                        for i in tl.static_range(v + V, S, V):  # every stream took the one output of HC
                            new += write[i][:, None] * g[i]
                        place = grad_output + at_views + v * E
                        tl.store(place, cast(new, grad_output.dtype.element_ty), mask=mask)
            if DEPTH:
                to_beta = tl.zeros([BT, SP], tl.float32)
                for i in tl.static_range(S):
                    to_beta = add_to_column(to_beta, tl.sum(beta_sums[i], axis=1), i, SP)
                column = tl.arange(0, SP)[None, :]
                tl.store(grad_old_beta + t[:, None] * S + column, to_beta, mask=there[:, None] & (column < S))

    @triton.jit
    def _sums_kernel(
        sums, grad_rows, grad_static, grad_scale, programs,
        S: tl.constexpr, K: tl.constexpr, E: tl.constexpr, DYNAMIC: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
    ):  # fmt: skip
        """Add up what programs of ``_backward_kernel`` left, always in the same order."""
        LENGTH: tl.constexpr = K * E + S * K + K
        first: tl.constexpr = 0 if DYNAMIC else K * E
        column = first + tl.program_id(0) * BC + tl.arange(0, BC)
        total = tl.zeros([BP, BC], tl.float32)
        for start in range(0, programs, BP):
            program = start + tl.arange(0, BP)[:, None]
            mask = (program < programs) & (column < LENGTH)[None, :]
            total += tl.load(sums + program.to(tl.int64) * LENGTH + column[None, :], mask=mask, other=0.0)
        total = tl.sum(total, axis=0)
        tl.store(grad_static + column - K * E, total, mask=(column >= K * E) & (column < K * E + S * K))
        if DYNAMIC:
            tl.store(grad_rows + column, total, mask=column < K * E)
            tl.store(grad_scale + column - (K * E + S * K), total, mask=(column >= K * E + S * K) & (column < LENGTH))


def tile_sizes(S: int, V: int, E: int, itemsize: int) -> dict[str, int]:
    """The tile of a program: BT tokens by BC columns, LANES lanes of a warp to a token.

    A lane loads 16 bytes of a column, or 8 where there are many streams. The coefficients of a token, (S, K), are
    filled up to powers of two, SP and KP.
    """
    columns = LANES * (16 if S <= 4 else 8) // itemsize
    K = V + S + 1
    numbers = {"SP": S, "WP": S * (V + S), "CP": (S + 1) * K, "KP": max(K, 16)}  # 16 is what a tensor core takes
    padded = {name: triton.next_power_of_2(number) for name, number in numbers.items()}
    return {"BT": 32, "BC": columns, "LANES": LANES, **padded, "num_warps": 4}


def _programs(tiles: int, device: torch.device, large: bool) -> int:
    """How many programs go through the tiles in backward: as many as run at a time. Each has a buffer for its sums."""
    if device.type != "cuda":
        return min(tiles, 2)
    at_a_time = 2 if large else 4  # on a multiprocessor, by the registers that they take
    return min(tiles, at_a_time * torch.cuda.get_device_properties(device).multi_processor_count)


def _launch(kernel: Any, programs: int, tensors: list[Optional[Tensor]], numbers: list[int], options: dict) -> None:
    """Run a kernel; a tensor that it does not touch is None here and any other one there."""
    some = next(tensor for tensor in tensors if tensor is not None)
    with torch.cuda.device(some.device) if some.is_cuda else contextlib.nullcontext():  # Triton takes the current one
        kernel[(programs,)](*(some if tensor is None else tensor for tensor in tensors), *numbers, **options)


def _pack(kernel: Any, tensors: list[Optional[Tensor]], rule: Rule, E: int, flags: list[bool]) -> None:
    """Run ``_pack_kernel`` or ``_unpack_kernel``."""
    S, M = rule[0].shape
    norm, center, _ = flags
    dynamic = rule[2] is not None
    options = {"DYNAMIC": dynamic, "CENTER": norm and center, "WEIGHTED": rule[6] is not None}
    blocks = {"CP": triton.next_power_of_2((S + 1) * (M + 1)), "BC": min(triton.next_power_of_2(E), 1024)}
    _launch(kernel, M + 2 if dynamic else 1, tensors, [], {"S": S, "M": M, "E": E, **options, **blocks, "num_warps": 4})


def _parts(packed: Tensor, rule: Rule, E: int) -> list[Optional[Tensor]]:
    """Static (S, K), rows (K, E) and scale (K,) of packed parameters; no rows and no scale of static weights."""
    S, K = rule[0].shape[0], rule[0].shape[1] + 1
    if rule[2] is None:
        return [packed.view(S, K), None, None]
    rows, static, scale = packed.split([K * E, S * K, K])
    return [static.view(S, K), rows.view(K, E), scale]


def forward(
    read: list[Optional[Tensor]],
    written: list[Optional[Tensor]],
    rule: Rule,
    sizes: tuple[int, int, int, int],
    flags: list[bool],
) -> None:
    """Run ``_forward_kernel``, of T, S, V, E, with norm, center and tanh."""
    T, S, V, E = sizes
    streams, output = read[:2]
    *outputs, packed = written
    rule = _make_contiguous(rule)
    if not (T and E) or streams is None:
        return
    parts: list[Optional[Tensor]] = [None, None, None]
    if packed is not None:
        _pack(_pack_kernel, [*rule, packed], rule, E, flags)
        parts = _parts(packed, rule, E)
    tile = tile_sizes(S, V, E, streams.element_size())
    options = {"S": S, "V": V, "E": E, **_options(output, rule, flags), **tile}
    _launch(_forward_kernel, triton.cdiv(T, tile["BT"]), [*read, *parts, *outputs], [T], options)


def _make_contiguous(rule: Rule) -> Rule:
    return tuple(None if part is None else part.contiguous() for part in rule)  # type: ignore[return-value]


def backward(
    read: list[Optional[Tensor]],
    written: list[Optional[Tensor]],
    rule: Rule,
    grads: list[Optional[Tensor]],
    sizes: tuple[int, int, int, int],
    flags: list[bool],
) -> None:
    """Run ``_backward_kernel``, and what makes the gradients of the parameters of its sums."""
    T, S, V, E = sizes
    *gradients, packed, output, beta = read
    grad_carried, grad_alpha = gradients[2:4]
    rule = _make_contiguous(rule)
    assert grad_carried is not None
    if not (T and E):
        for part in grads:
            if part is not None:
                part.zero_()
        return
    tile = tile_sizes(S, V, E, grad_carried.element_size())
    tiles = triton.cdiv(T, tile["BT"])
    dynamic = rule[2] is not None
    programs = tiles if packed is None else _programs(tiles, grad_carried.device, dynamic and S > 2)
    options = {"S": S, "V": V, "E": E, **_options(output, rule, flags), **tile}
    options["HAS_GRAD_ALPHA"] = grad_alpha is not None
    sums, parts = None, [None, None, None]
    if packed is not None:
        length = (E + S + 1) * (V + S + 1)
        sums = torch.empty((programs, length), dtype=torch.float32, device=grad_carried.device)
        parts = _parts(packed, rule, E)
    tensors = [*gradients, *parts, output, beta, written[0], sums, *written[1:]]
    _launch(_backward_kernel, programs, tensors, [T, tiles], options)
    if packed is not None:
        block = {"BP": 32, "BC": 32, "num_warps": 4}
        total = torch.empty_like(packed)
        static, rows, scale = _parts(total, rule, E)
        sizes_and_block = {"S": S, "K": V + S + 1, "E": E, "DYNAMIC": dynamic, **block}
        launches = triton.cdiv(length if dynamic else total.numel(), block["BC"])
        _launch(_sums_kernel, launches, [sums, rows, static, scale], [programs], sizes_and_block)
        _pack(_unpack_kernel, [total, rule[2], rule[3], rule[6], *grads], rule, E, flags)


def _options(output: Optional[Tensor], rule: Rule, flags: list[bool]) -> dict[str, bool]:
    steps = {"DEPTH": output is not None, "WIDTH": rule[0] is not None, "DYNAMIC": rule[2] is not None}
    return steps | dict(zip(("NORM", "CENTER", "TANH"), flags, strict=True))
