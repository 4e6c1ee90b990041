"""The kernels in Triton: what one token needs, in one pass over its streams.

Two kernels do everything. ``_forward_kernel`` is the depth-connection of a sub-layer, the width-connection of the
next one, or both joined; ``_backward_kernel`` goes back through the same. Streams are float32, bfloat16 or float16.
Sums over tokens go through a buffer per program and are added up in a fixed order. ``TRITON_INTERPRET=1`` in the
environment runs the kernels on a CPU, slowly, for tests. Letters in shapes are those of ``operators.py``.
"""

import contextlib
import os
from typing import Any, Optional

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of PyTorch without it
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LANES = 32


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
    def _lane_sums(x, BT: tl.constexpr, BC: tl.constexpr, LANES: tl.constexpr):
        """(BT, BC) -> (BT, LANES): what each lane adds up by itself; the lanes are added up once, at the end."""
        return tl.sum(tl.reshape(x, [BT, LANES, BC // LANES]), axis=2)

    if INTERPRETED:

        @triton.jit
        def _cast(x, dtype: tl.constexpr):
            """float32 to a stream's type. Triton's interpreter cuts bfloat16 off, where a GPU rounds to even."""
            if dtype == tl.bfloat16:
                bits = x.to(tl.int32, bitcast=True)
                x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
            return x.to(dtype)

    else:

        @triton.jit
        def _cast(x, dtype: tl.constexpr):
            """float32 to a stream's type."""
            return x.to(dtype)

    @triton.jit
    def _tanh(x):
        """In float32: a series near 0, where the other form would cancel."""
        square = x * x
        near = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
        e = tl.exp(-2 * tl.abs(x))
        far = (1 - e) / (1 + e)
        return tl.where(square < 0.04, near, tl.where(x < 0, -far, far))

    @triton.jit
    def _tanh_slope(x):
        """1 - tanh(x)^2, which would cancel where tanh is near 1."""
        e = tl.exp(-2 * tl.abs(x))
        return 4 * e / ((1 + e) * (1 + e))

    @triton.jit
    def _zeros(NUMBER: tl.constexpr, BT: tl.constexpr, LANES: tl.constexpr):
        sums = ()
        for _ in tl.static_range(NUMBER):
            sums = sums + (tl.zeros([BT, LANES], tl.float32),)
        return sums

    @triton.jit
    def _load_rows(base, offsets, mask, NUMBER: tl.constexpr, E: tl.constexpr):
        """NUMBER vectors (BT, BC) that lie E apart, as float32."""
        rows = ()
        for i in tl.static_range(NUMBER):
            rows = rows + (tl.load(base + offsets + i * E, mask=mask, other=0.0).to(tl.float32),)
        return rows

    @triton.jit
    def _load_row(base, e, E: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
        """One vector for all tokens, (BT, BC): each warp loads it for itself, so that none waits for another."""
        at = tl.broadcast_to(e[None, :], [BT, BC])
        return tl.load(base + at, mask=at < E, other=0.0)

    @triton.jit
    def _load_numbers(base, first, mask, NUMBER: tl.constexpr):
        """NUMBER neighbouring numbers of each token, (BT,) each."""
        numbers = ()
        for i in tl.static_range(NUMBER):
            numbers = numbers + (tl.load(base + first + i, mask=mask, other=0.0),)
        return numbers

    @triton.jit
    def _project(
        projected, square, total, h, rows, e,
        S: tl.constexpr, K: tl.constexpr, E: tl.constexpr, NORM: tl.constexpr, CENTER: tl.constexpr,
        BT: tl.constexpr, BC: tl.constexpr, LANES: tl.constexpr,
    ):  # fmt: skip
        """What the columns e of the streams h add to projections (K, S), squares (S,) and sums (S,), lane by lane."""
        projections = ()
        for k in tl.static_range(K):
            row = _load_row(rows + k * E, e, E, BT, BC)
            for i in tl.static_range(S):
                projections = projections + (projected[k * S + i] + _lane_sums(h[i] * row, BT, BC, LANES),)
        if NORM:
            squares = ()
            for i in tl.static_range(S):
                squares = squares + (square[i] + _lane_sums(h[i] * h[i], BT, BC, LANES),)
            square = squares
            if CENTER:
                totals = ()
                for i in tl.static_range(S):
                    totals = totals + (total[i] + _lane_sums(h[i], BT, BC, LANES),)
                total = totals
        return projections, square, total

    @triton.jit
    def _put(tile, number, place: tl.constexpr, W: tl.constexpr):
        """Number (BT,) into a column of a tile (BT, W), which is stored whole: single stores would leave the warp."""
        return tl.where((tl.arange(0, W) == place)[None, :], number[:, None], tile)

    @triton.jit
    def _store_tile(base, tile, t, there, NUMBER: tl.constexpr, W: tl.constexpr):
        """The first NUMBER columns of a tile (BT, W), token by token."""
        column = tl.arange(0, W)[None, :]
        tl.store(base + t[:, None] * NUMBER + column, tile, mask=there[:, None] & (column < NUMBER))

    @triton.jit
    def _inverse_deviation(square, total, E: tl.constexpr, CENTER: tl.constexpr):
        variance = square / E
        if CENTER:
            variance = tl.maximum(variance - (total / E) * (total / E), 0.0)
        return tl.rsqrt(variance + 1e-6)

    @triton.jit
    def _forward_kernel(
        streams, output, alpha, beta, static, rows, scale,  # read
        following, views, new_alpha, new_beta,  # written
        T,
        S: tl.constexpr, V: tl.constexpr, E: tl.constexpr,
        DEPTH: tl.constexpr, WIDTH: tl.constexpr, DYNAMIC: tl.constexpr,
        NORM: tl.constexpr, CENTER: tl.constexpr, TANH: tl.constexpr,
        BT: tl.constexpr, BC: tl.constexpr, LANES: tl.constexpr, W: tl.constexpr,
    ):  # fmt: skip
        """DEPTH: following = beta * output + alpha_r^T streams. WIDTH: views and coefficients of what is there then."""
        K: tl.constexpr = V + S + 1
        t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
        there = t < T
        if DEPTH:
            old_alpha = _load_numbers(alpha, t * (S * (V + S)), there, S * (V + S))
            old_beta = _load_numbers(beta, t * S, there, S)
        projected = _zeros(S * K, BT, LANES)
        square = _zeros(S, BT, LANES)
        total = _zeros(S, BT, LANES)
        for start in range(0, E, BC):
            e = start + tl.arange(0, BC)
            mask = there[:, None] & (e < E)[None, :]
            at = t[:, None] * (S * E) + e[None, :]
            h = _load_rows(streams, at, mask, S, E)
            if DEPTH:
                out = _load_rows(output, t[:, None] * (V * E) + e[None, :], mask, V, E)
                mixed = ()
                for j in tl.static_range(S):
                    new = old_beta[j][:, None] * out[j % V]
                    for i in tl.static_range(S):
                        new += old_alpha[i * (V + S) + V + j][:, None] * h[i]
                    new = _cast(new, following.dtype.element_ty)
                    tl.store(following + at + j * E, new, mask=mask)
                    mixed = mixed + (new.to(tl.float32),)
                h = mixed
            if WIDTH and DYNAMIC:
                projected, square, total = _project(
                    projected, square, total, h, rows, e, S, K, E, NORM, CENTER, BT, BC, LANES
                )
        if WIDTH:
            read = ()
            alphas = tl.zeros([BT, W], tl.float32)
            betas = tl.zeros([BT, LANES], tl.float32)
            for i in tl.static_range(S):
                if DYNAMIC and NORM:
                    rstd = _inverse_deviation(tl.sum(square[i], axis=1), tl.sum(total[i], axis=1), E, CENTER)
                for k in tl.static_range(K):
                    number = tl.zeros([BT], tl.float32) + tl.load(static + i * K + k)
                    if DYNAMIC:
                        dynamic = tl.sum(projected[k * S + i], axis=1)
                        if NORM:
                            dynamic = dynamic * rstd
                        if TANH:
                            dynamic = _tanh(dynamic)
                        number += tl.load(scale + k) * dynamic
                    if k < V:
                        read = read + (number,)
                    if k < V + S:
                        alphas = _put(alphas, number, i * (V + S) + k, W)
                    else:
                        betas = _put(betas, number, i, LANES)
            _store_tile(new_alpha, alphas, t, there, S * (V + S), W)
            _store_tile(new_beta, betas, t, there, S, LANES)
            if DEPTH:
                tl.debug_barrier()
            for start in range(0, E, BC):
                e = start + tl.arange(0, BC)
                mask = there[:, None] & (e < E)[None, :]
                h = _load_rows(following if DEPTH else streams, t[:, None] * (S * E) + e[None, :], mask, S, E)
                for v in tl.static_range(V):
                    view = read[v][:, None] * h[0]
                    for i in tl.static_range(1, S):
                        view += read[i * V + v][:, None] * h[i]
                    at = t[:, None] * (V * E) + v * E + e[None, :]
                    tl.store(views + at, _cast(view, views.dtype.element_ty), mask=mask)

    @triton.jit
    def _backward_kernel(
        streams, grad_views, grad_carried, grad_alpha, grad_beta, static, rows, scale, output, old_beta,  # read
        grad_streams, grad_coefficients, dynamics, grad_rows, grad_output, grad_old_beta,  # written
        T, tiles,
        S: tl.constexpr, V: tl.constexpr, E: tl.constexpr,
        DEPTH: tl.constexpr, WIDTH: tl.constexpr, DYNAMIC: tl.constexpr,
        NORM: tl.constexpr, CENTER: tl.constexpr, TANH: tl.constexpr, HAS_GRAD_ALPHA: tl.constexpr,
        BT: tl.constexpr, BC: tl.constexpr, LANES: tl.constexpr, W: tl.constexpr,
    ):  # fmt: skip
        """WIDTH: to the streams, from views, carried streams and coefficients. DEPTH: on to output and beta before it.

        Without WIDTH, ``grad_carried`` is the gradient of the streams behind the depth-connection.
        """
        K: tl.constexpr = V + S + 1
        program = tl.program_id(0)
        for tile in range(program, tiles, tl.num_programs(0)):
            t = (tile * BT + tl.arange(0, BT)).to(tl.int64)
            there = t < T
            if WIDTH:
                projected = _zeros(S * K, BT, LANES)
                square = _zeros(S, BT, LANES)
                total = _zeros(S, BT, LANES)
                through = _zeros(S * (V + S), BT, LANES)
                for start in range(0, E, BC):
                    e = start + tl.arange(0, BC)
                    mask = there[:, None] & (e < E)[None, :]
                    at = t[:, None] * (S * E) + e[None, :]
                    h = _load_rows(streams, at, mask, S, E)
                    g = _load_rows(grad_views, t[:, None] * (V * E) + e[None, :], mask, V, E)
                    g = g + _load_rows(grad_carried, at, mask, S, E)
                    sums = ()
                    for i in tl.static_range(S):
                        for k in tl.static_range(V + S):
                            sums = sums + (through[i * (V + S) + k] + _lane_sums(h[i] * g[k], BT, BC, LANES),)
                    through = sums
                    if DYNAMIC:
                        projected, square, total = _project(
                            projected, square, total, h, rows, e, S, K, E, NORM, CENTER, BT, BC, LANES
                        )
                grads = tl.zeros([BT, W], tl.float32)
                dynamic_parts = tl.zeros([BT, W], tl.float32)
                coefficients = ()  # alpha, (S, V + S)
                back = ()  # what goes back through the rows, (S, K)
                along = ()  # what goes back through the norm, (S,)
                mean = ()
                for i in tl.static_range(S):
                    if DYNAMIC:
                        rstd = tl.full([BT], 1.0, tl.float32)
                        average = tl.sum(total[i], axis=1) / E
                        if NORM:
                            rstd = _inverse_deviation(tl.sum(square[i], axis=1), tl.sum(total[i], axis=1), E, CENTER)
                        inner = tl.zeros([BT], tl.float32)
                        mean = mean + (average,)
                    for k in tl.static_range(K):
                        if k < V + S:
                            grad = tl.sum(through[i * (V + S) + k], axis=1)
                            if HAS_GRAD_ALPHA:
                                grad += tl.load(grad_alpha + t * (S * (V + S)) + i * (V + S) + k, mask=there, other=0.0)
                        else:
                            grad = tl.load(grad_beta + t * S + i, mask=there, other=0.0)
                        grads = _put(grads, grad, i * K + k, W)
                        number = tl.zeros([BT], tl.float32) + tl.load(static + i * K + k)
                        if DYNAMIC:
                            factor = tl.load(scale + k)
                            raw = tl.sum(projected[k * S + i], axis=1) * rstd
                            dynamic = raw
                            if TANH:
                                dynamic = _tanh(raw)
                            dynamic_parts = _put(dynamic_parts, dynamic, i * K + k, W)
                            number += factor * dynamic
                            grad = grad * factor
                            if TANH:
                                grad = grad * _tanh_slope(raw)
                            inner += grad * raw
                            back = back + (grad * rstd,)
                        if k < V + S:
                            coefficients = coefficients + (number,)
                    if DYNAMIC and NORM:
                        along = along + (-rstd * rstd * inner / E,)
                _store_tile(grad_coefficients, grads, t, there, S * K, W)
                if DYNAMIC:
                    _store_tile(dynamics, dynamic_parts, t, there, S * K, W)
            if DEPTH:
                write = _load_numbers(old_beta, t * S, there, S)
                taken = _zeros(S, BT, LANES)
            for start in range(0, E, BC):
                e = start + tl.arange(0, BC)
                mask = there[:, None] & (e < E)[None, :]
                at = t[:, None] * (S * E) + e[None, :]
                g = _load_rows(grad_carried, at, mask, S, E)
                if WIDTH:
                    g = _load_rows(grad_views, t[:, None] * (V * E) + e[None, :], mask, V, E) + g
                    h = _load_rows(streams, at, mask, S, E)
                    to_streams = ()
                    for i in tl.static_range(S):
                        new = coefficients[i * (V + S)][:, None] * g[0]
                        for k in tl.static_range(1, V + S):
                            new += coefficients[i * (V + S) + k][:, None] * g[k]
                        if DYNAMIC and NORM:
                            if CENTER:
                                new += along[i][:, None] * (h[i] - mean[i][:, None])
                            else:
                                new += along[i][:, None] * h[i]
                        to_streams = to_streams + (new,)
                    if DYNAMIC:
                        for k in tl.static_range(K):
                            row = _load_row(rows + k * E, e, E, BT, BC)
                            of_row = back[k][:, None] * h[0]
                            added = (to_streams[0] + back[k][:, None] * row,)
                            for i in tl.static_range(1, S):
                                of_row += back[i * K + k][:, None] * h[i]
                                added = added + (to_streams[i] + back[i * K + k][:, None] * row,)
                            to_streams = added
                            place = grad_rows + program * (K * E) + k * E + e
                            of_row = tl.sum(of_row, axis=0)
                            if tile != program:
                                of_row += tl.load(place, mask=e < E, other=0.0)
                            tl.store(place, of_row, mask=e < E)
                    g = ()
                    for i in tl.static_range(S):
                        new = _cast(to_streams[i], grad_streams.dtype.element_ty)
                        tl.store(grad_streams + at + i * E, new, mask=mask)
                        g = g + (new.to(tl.float32),)
                if DEPTH:
                    out = _load_rows(output, t[:, None] * (V * E) + e[None, :], mask, V, E)
                    sums = ()
                    for i in tl.static_range(S):
                        sums = sums + (taken[i] + _lane_sums(out[i % V] * g[i], BT, BC, LANES),)
                    taken = sums
                    for v in tl.static_range(V):
                        new = write[v][:, None] * g[v]
                        for i in tl.static_range(v + V, S, V):  # every stream took the one output of HC
                            new += write[i][:, None] * g[i]
                        place = grad_output + t[:, None] * (V * E) + v * E + e[None, :]
                        tl.store(place, _cast(new, grad_output.dtype.element_ty), mask=mask)
            if DEPTH:
                betas = tl.zeros([BT, LANES], tl.float32)
                for i in tl.static_range(S):
                    betas = _put(betas, tl.sum(taken[i], axis=1), i, LANES)
                _store_tile(grad_old_beta, betas, t, there, S, LANES)
            if WIDTH and DYNAMIC:
                tl.debug_barrier()  # before the next tile adds to the program's rows


def tile_sizes(S: int, V: int, E: int, itemsize: int) -> dict[str, int]:
    """The tile of a program: BT tokens, a warp each, by BC columns.

    A lane loads 16 bytes of a column, or 8 where there are many streams. W is how wide a tile is that holds
    a token's coefficients, LANES how many lanes a warp has.
    """
    columns = LANES * (16 if S <= 4 else 8) // itemsize

    def power(number: int) -> int:
        return max(LANES, 1 << (number - 1).bit_length())

    return {"BT": 4, "BC": min(columns, power(E)), "LANES": LANES, "W": power(S * (V + S + 1)), "num_warps": 4}


def _programs(tiles: int, device: torch.device) -> int:
    """How many programs go through the tiles in backward; each has a buffer for its sums over tokens."""
    if device.type != "cuda":
        return min(tiles, 2)
    return min(tiles, 4 * torch.cuda.get_device_properties(device).multi_processor_count)


def _launch(kernel: Any, programs: int, tensors: list[Optional[Tensor]], numbers: list[int], options: dict) -> None:
    """Run a kernel; a tensor that it does not touch is None here and any other one there."""
    some = next(tensor for tensor in tensors if tensor is not None)
    with torch.cuda.device(some.device) if some.is_cuda else contextlib.nullcontext():  # Triton takes the current one
        kernel[(programs,)](*(some if tensor is None else tensor for tensor in tensors), *numbers, **options)


def forward(tensors: list[Optional[Tensor]], sizes: tuple[int, int, int, int], flags: list[bool]) -> None:
    """Run ``_forward_kernel`` on its tensors, of T, S, V, E, with norm, center and tanh."""
    T, S, V, E = sizes
    streams, output, _, _, static, rows, *_ = tensors
    if T and E and streams is not None:
        tile = tile_sizes(S, V, E, streams.element_size())
        options = {"S": S, "V": V, "E": E, **_options(output, static, rows, flags), **tile}
        _launch(_forward_kernel, triton.cdiv(T, tile["BT"]), tensors, [T], options)


def backward(
    read: list[Optional[Tensor]], written: list[Optional[Tensor]], sizes: tuple[int, int, int, int], flags: list[bool]
) -> list[Optional[Tensor]]:
    """Run ``_backward_kernel``, which writes the gradients of streams, output and beta.

    Returns those of static, rows and scale.
    """
    T, S, V, E = sizes
    _, _, grad_carried, grad_alpha, _, static, rows, _, output, _ = read
    assert grad_carried is not None
    tile = tile_sizes(S, V, E, grad_carried.element_size())
    tiles = -(-T // tile["BT"])
    programs = _programs(tiles, grad_carried.device) if rows is not None else tiles

    def float32(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=grad_carried.device)

    coefficients = float32(T, S, V + S + 1) if static is not None else None
    dynamics = float32(T, S, V + S + 1) if rows is not None else None
    grad_rows = float32(programs, V + S + 1, E) if rows is not None else None
    if T and E:
        tensors = [*read, written[0], coefficients, dynamics, grad_rows, *written[1:]]
        options = {"S": S, "V": V, "E": E, **_options(output, static, rows, flags), **tile}
        options["HAS_GRAD_ALPHA"] = grad_alpha is not None
        _launch(_backward_kernel, programs, tensors, [T, tiles], options)
    if coefficients is None or dynamics is None or grad_rows is None:
        return [None if coefficients is None else coefficients.sum(0), None, None]
    return [coefficients.sum(0), grad_rows.sum(0), (coefficients * dynamics).sum((0, 1))]


def _options(
    output: Optional[Tensor], static: Optional[Tensor], rows: Optional[Tensor], flags: list[bool]
) -> dict[str, bool]:
    steps = {"DEPTH": output is not None, "WIDTH": static is not None, "DYNAMIC": rows is not None}
    return steps | dict(zip(("NORM", "CENTER", "TANH"), flags, strict=True))
