"""What the kernels in Triton do with a tile of tokens: load, convert, multiply, add up, store.

A vector is a tile (BT, BC) of BT tokens by BC columns, LANES lanes of a warp to a token; a lane's columns lie side by
side. Letters in shapes are those of ``operators.py``.
"""

import os

try:
    import triton
    import triton.language as tl
    from triton.language import target_info
except ImportError:  # a build of PyTorch without it
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if triton is not None:

    @triton.jit
    def halves(x, BT: tl.constexpr, LANES: tl.constexpr, N: tl.constexpr):
        """(BT, LANES, N) -> N of (BT, LANES)."""
        if N == 1:
            return (tl.reshape(x, [BT, LANES]),)
        else:
            even, odd = tl.split(tl.reshape(x, [BT, LANES, N // 2, 2]))
            return halves(even, BT, LANES, N // 2) + halves(odd, BT, LANES, N // 2)

    @triton.jit
    def apart(vectors, NUMBER: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, LANES: tl.constexpr):
        """NUMBER vectors (BT, BC), each as the columns (BT, LANES) that a lane holds: no instruction is needed for it.

        Sums over columns are chains of multiply-adds then, a lane for itself; the lanes are added up once, at the end.
        """
        parts = ()
        for i in tl.static_range(NUMBER):
            parts = parts + (halves(tl.reshape(vectors[i], [BT, LANES, BC // LANES]), BT, LANES, BC // LANES),)
        return parts

    @triton.jit
    def add_product(total, a, b, N: tl.constexpr):
        """Total and the product of two vectors, N columns (BT, LANES) each, lane by lane."""
        for n in tl.static_range(N):
            total += a[n] * b[n]
        return total

    @triton.jit
    def side_by_side(tiles, N: tl.constexpr):
        """N tiles (BT, C) -> (BT, C * N), the tile's number being the last index of a column."""
        if N == 1:
            return tiles[0]
        else:
            pairs = ()
            for i in tl.static_range(N // 2):
                pair = tl.join(tiles[i], tiles[i + N // 2])
                pairs = pairs + (tl.reshape(pair, [pair.shape[0], pair.shape[1] * pair.shape[2]]),)
            return side_by_side(pairs, N // 2)

    @triton.jit
    def stack(numbers, N: tl.constexpr):
        """N numbers of each token, (BT,) each -> (BT, N); N is a power of two. This needs no instruction either."""
        if N == 1:
            return numbers[0][:, None]
        else:
            pairs = ()
            for i in tl.static_range(N // 2):
                pairs = pairs + (tl.join(numbers[i], numbers[i + N // 2]),)
            return side_by_side(pairs, N // 2)

    if INTERPRETED:

        @triton.jit
        def cast(x, dtype: tl.constexpr):
            """float32 to a stream's type. Triton's interpreter cuts bfloat16 off, where a GPU rounds to even."""
            if dtype == tl.bfloat16:
                bits = x.to(tl.int32, bitcast=True)
                x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
            return x.to(dtype)

        @triton.jit
        def to_float32(x):
            return x.to(tl.float32)

        @triton.jit
        def power_of_two(x):
            return tl.exp2(x)

        @triton.jit
        def invert(x):
            return 1 / x

        @triton.jit
        def operand(x):
            """Of a matmul. The interpreter would take the bits of a bfloat16 for a number."""
            return x.to(tl.float32)

    else:

        @triton.jit
        def cast(x, dtype: tl.constexpr):
            """float32 to a stream's type; one instruction rounds two numbers to bfloat16, where there is one."""
            if dtype == tl.bfloat16 and target_info.cuda_capability_geq(8, 0):
                return tl.inline_asm_elementwise(
                    "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
                )
            else:
                return x.to(dtype)

        @triton.jit
        def to_float32(x):
            """A stream's type to float32: one instruction for each bfloat16, where the compiler takes three for two."""
            if x.dtype == tl.bfloat16 and target_info.is_cuda():
                return tl.inline_asm_elementwise(
                    "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x],
                    dtype=tl.float32, is_pure=True, pack=2,
                )  # fmt: skip
            else:
                return x.to(tl.float32)

        @triton.jit
        def power_of_two(x):
            """2^x; what float32 holds without its leading bit may be 0, as nothing here is worth three instructions."""
            if target_info.is_cuda():
                return tl.inline_asm_elementwise(
                    "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
                )
            else:
                return tl.exp2(x)

        @triton.jit
        def invert(x):
            """1 / x, for numbers of usual size, right to the last bit or the one before."""
            if target_info.is_cuda():
                return tl.inline_asm_elementwise(
                    "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
                )
            else:
                return 1 / x

        @triton.jit
        def operand(x):
            """Of a matmul on tensor cores, or on others where these do not know bfloat16."""
            if target_info.is_cuda() and not target_info.cuda_capability_geq(8, 0):
                return x.to(tl.float32)
            else:
                return x

    @triton.jit
    def tanh(x):
        """tanh and its slope 1 - tanh^2, in float32: a series near 0, and no difference that would cancel."""
        square = x * x
        near = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
        e = power_of_two(-2.8853900817779268 * tl.abs(x))  # exp(-2 |x|)
        inverse = invert(1 + e)
        far = (1 - e) * inverse
        return tl.where(square < 0.04, near, tl.where(x < 0, -far, far)), 4 * e * inverse * inverse

    @triton.jit
    def make_zeros(NUMBER: tl.constexpr, BT: tl.constexpr, LANES: tl.constexpr):
        sums = ()
        for _ in tl.static_range(NUMBER):
            sums = sums + (tl.zeros([BT, LANES], tl.float32),)
        return sums

    @triton.jit
    def load_vectors(base, offsets, e, NUMBER: tl.constexpr, E: tl.constexpr, BC: tl.constexpr):
        """NUMBER vectors (BT, BC) that lie E apart, as they are; of their columns e some may be past the end."""
        vectors = ()
        for i in tl.static_range(NUMBER):
            if E % BC == 0:
                vectors = vectors + (tl.load(base + offsets + i * E),)
            else:
                mask = tl.broadcast_to((e < E)[None, :], offsets.shape)
                vectors = vectors + (tl.load(base + offsets + i * E, mask=mask, other=0.0),)
        return vectors

    @triton.jit
    def all_float32(vectors, NUMBER: tl.constexpr):
        converted = ()
        for i in tl.static_range(NUMBER):
            converted = converted + (to_float32(vectors[i]),)
        return converted

    @triton.jit
    def load_row(base, e, E: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
        """One vector for all tokens, (BT, BC): each warp loads it for itself, so that none waits for another."""
        (row,) = load_vectors(base, tl.broadcast_to(e[None, :], [BT, BC]), e, 1, E, BC)
        return row

    @triton.jit
    def load_numbers(base, first, mask, NUMBER: tl.constexpr):
        """NUMBER neighbouring numbers of each token, (BT,) each."""
        numbers = ()
        for i in tl.static_range(NUMBER):
            numbers = numbers + (tl.load(base + first + i, mask=mask, other=0.0),)
        return numbers

    @triton.jit
    def store_numbers(base, numbers, t, there, NUMBER: tl.constexpr, W: tl.constexpr):
        """NUMBER neighbouring numbers of each token, (BT,) each; W is the next power of two."""
        columns = ()
        for i in tl.static_range(W):
            columns = columns + (numbers[i if i < NUMBER else 0],)
        column = tl.arange(0, W)[None, :]
        tl.store(base + t[:, None] * NUMBER + column, stack(columns, W), mask=there[:, None] & (column < NUMBER))

    @triton.jit
    def add_to_column(tile, numbers, place: tl.constexpr, W: tl.constexpr):
        """A number of each token, (BT,), added to a column of a tile (BT, W)."""
        return tile + tl.where((tl.arange(0, W) == place)[None, :], numbers[:, None], 0.0)

    @triton.jit
    def project(
        projected, square, total, h, rows, e,
        S: tl.constexpr, K: tl.constexpr, E: tl.constexpr, NORM: tl.constexpr, CENTER: tl.constexpr,
        BT: tl.constexpr, BC: tl.constexpr, LANES: tl.constexpr,
    ):  # fmt: skip
        """What the columns e of the streams h add to projections (K, S), squares (S,) and sums (S,), lane by lane.

        The streams come apart (``apart``).
        """
        N: tl.constexpr = BC // LANES
        projections = ()
        for k in tl.static_range(K):
            (row,) = apart((load_row(rows + k * E, e, E, BT, BC),), 1, BT, BC, LANES)
            for i in tl.static_range(S):
                projections = projections + (add_product(projected[k * S + i], h[i], row, N),)
        if NORM:
            squares = ()
            for i in tl.static_range(S):
                squares = squares + (add_product(square[i], h[i], h[i], N),)
            square = squares
            if CENTER:
                totals = ()
                for i in tl.static_range(S):
                    sum = total[i]
                    for n in tl.static_range(N):
                        sum += h[i][n]
                    totals = totals + (sum,)
                total = totals
        return projections, square, total

    @triton.jit
    def inverse_deviation(square, total, E: tl.constexpr, CENTER: tl.constexpr):
        variance = square / E
        if CENTER:
            variance = tl.maximum(variance - (total / E) * (total / E), 0.0)
        return tl.rsqrt(variance + 1e-6)

    @triton.jit
    def to_coefficients(
        base, t, there, static, scale,
        S: tl.constexpr, NUMBER: tl.constexpr, FIRST: tl.constexpr, K: tl.constexpr, W: tl.constexpr,
        DYNAMIC: tl.constexpr, TANH: tl.constexpr,
    ):  # fmt: skip
        """Turn projections (S, NUMBER) of each token into coefficients, those from FIRST on, in memory, where they are.

        A lane takes a few of them. Where they come from, all lanes of a token have all of them.
        """
        column = tl.arange(0, W)[None, :]
        k = FIRST + column % NUMBER
        mask = there[:, None] & (column < S * NUMBER)
        at = base + t[:, None] * (S * NUMBER) + column
        number = tl.load(static + column // NUMBER * K + k, mask=column < S * NUMBER, other=0.0)
        if DYNAMIC:
            dynamic = tl.load(at, mask=mask, other=0.0)
            if TANH:
                dynamic, _ = tanh(dynamic)
            number = number + tl.load(scale + k, mask=column < S * NUMBER, other=0.0) * dynamic
        else:
            number = tl.broadcast_to(number, at.shape)
        tl.store(at, number, mask=mask)

    @triton.jit
    def split_terms(x, NUMBER: tl.constexpr):
        """Numbers of bfloat16 that sum up to x: eight bits of it each."""
        terms = ()
        for _ in tl.static_range(NUMBER):
            term = cast(x, tl.bfloat16)
            terms = terms + (term,)
            x = x - to_float32(term)
        return terms

    @triton.jit
    def add_matmul(total, a, b, A: tl.constexpr, B: tl.constexpr):
        """Total and a matmul, on tensor cores, of A terms by B terms: what is smaller than the last bit is left out."""
        for i in tl.static_range(A):
            for j in tl.static_range(B):
                if i + j < A:
                    total = tl.dot(operand(a[i]), operand(b[j]), total, input_precision="ieee")
        return total
