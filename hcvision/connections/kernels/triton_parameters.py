"""The kernels in Triton for the parameters of a connection: what the others need of them, and their gradients.

Letters in shapes are those of ``operators.py``; M = V + S columns of alpha. Packed parameters are rows (K, E), static
alpha and beta (S, K) and scales (K,), one after the other.
"""

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of PyTorch without it
    triton = None

if triton is not None:
    from hcvision.connections.kernels.triton_tiles import cast

    @triton.jit
    def load_projection(
        alpha_fn, beta_fn, norm_weight, k, start,
        M: tl.constexpr, E: tl.constexpr, WEIGHTED: tl.constexpr, BC: tl.constexpr,
    ):  # fmt: skip
        """Columns from start on of row k of the projections (K, E), of alpha_fn (E, M) and beta_fn (E, 1): (BC,)."""
        e = start + tl.arange(0, BC)
        row = tl.load(alpha_fn + e * M + k, mask=(e < E) & (k < M), other=0.0).to(tl.float32)
        row += tl.load(beta_fn + e, mask=(e < E) & (k == M), other=0.0).to(tl.float32)
        if WEIGHTED:
            row = row * tl.load(norm_weight + e, mask=e < E, other=0.0).to(tl.float32)
        return row

    @triton.jit
    def _pack_kernel(
        static_alpha, static_beta, alpha_fn, beta_fn, alpha_scale, beta_scale, norm_weight,  # read
        packed,  # written
        S: tl.constexpr, M: tl.constexpr, E: tl.constexpr,
        DYNAMIC: tl.constexpr, CENTER: tl.constexpr, WEIGHTED: tl.constexpr, CP: tl.constexpr, BC: tl.constexpr,
    ):  # fmt: skip
        """What kernels need of the parameters: a program for each row (K, E), the last one for static and scale."""
        K: tl.constexpr = M + 1
        k = tl.program_id(0)
        if DYNAMIC:
            if k < K:
                total = tl.zeros([BC], tl.float32)
                for start in range(0, E, BC):
                    total += load_projection(alpha_fn, beta_fn, norm_weight, k, start, M, E, WEIGHTED, BC)
                mean = tl.sum(total, axis=0) / E
                for start in range(0, E, BC):
                    e = start + tl.arange(0, BC)
                    row = load_projection(alpha_fn, beta_fn, norm_weight, k, start, M, E, WEIGHTED, BC)
                    if CENTER:
                        row = row - mean
                    tl.store(packed + k * E + e, row, mask=e < E)
            packed += K * E
        if k == tl.num_programs(0) - 1:
            place = tl.arange(0, CP)
            stream = place // K
            column = place % K
            there = place < S * K
            alpha = tl.load(static_alpha + stream * M + column, mask=there & (column < M), other=0.0).to(tl.float32)
            beta = tl.load(static_beta + stream, mask=there & (column == M), other=0.0).to(tl.float32)
            tl.store(packed + place, alpha + beta, mask=there)
            if DYNAMIC:
                scale = tl.where(place < M, tl.load(alpha_scale).to(tl.float32), tl.load(beta_scale).to(tl.float32))
                tl.store(packed + S * K + place, scale, mask=place < K)

    @triton.jit
    def _unpack_kernel(
        total, alpha_fn, beta_fn, norm_weight,  # read
        to_static_alpha, to_static_beta, to_alpha_fn, to_beta_fn, to_alpha_scale, to_beta_scale, to_weight,  # written
        S: tl.constexpr, M: tl.constexpr, E: tl.constexpr,
        DYNAMIC: tl.constexpr, CENTER: tl.constexpr, WEIGHTED: tl.constexpr, CP: tl.constexpr, BC: tl.constexpr,
    ):  # fmt: skip
        """The gradients of the parameters, from those of what ``_pack_kernel`` makes; a program does the same part."""
        tl.static_assert(not (CENTER and WEIGHTED), "a norm with a weight takes no mean")
        K: tl.constexpr = M + 1
        k = tl.program_id(0)
        if DYNAMIC and k < K:
            sum = tl.zeros([BC], tl.float32)
            for start in range(0, E, BC):
                e = start + tl.arange(0, BC)
                sum += tl.load(total + k * E + e, mask=e < E, other=0.0)
            mean = tl.sum(sum, axis=0) / E
            for start in range(0, E, BC):
                e = start + tl.arange(0, BC)
                grad = tl.load(total + k * E + e, mask=e < E, other=0.0)
                if CENTER:
                    grad = grad - mean
                if WEIGHTED:
                    grad = grad * tl.load(norm_weight + e, mask=e < E, other=0.0).to(tl.float32)
                tl.store(to_alpha_fn + e * M + k, cast(grad, to_alpha_fn.dtype.element_ty), mask=(e < E) & (k < M))
                tl.store(to_beta_fn + e, cast(grad, to_beta_fn.dtype.element_ty), mask=(e < E) & (k == M))
        if k == tl.num_programs(0) - 1:
            if WEIGHTED:
                for start in range(0, E, BC):
                    e = start + tl.arange(0, BC)
                    grad = tl.zeros([BC], tl.float32)
                    for row in range(K):
                        fn = load_projection(alpha_fn, beta_fn, norm_weight, row, start, M, E, False, BC)
                        grad += fn * tl.load(total + row * E + e, mask=e < E, other=0.0)
                    tl.store(to_weight + e, cast(grad, to_weight.dtype.element_ty), mask=e < E)
            if DYNAMIC:
                total += K * E
            place = tl.arange(0, CP)
            stream = place // K
            column = place % K
            there = place < S * K
            grad = tl.load(total + place, mask=there, other=0.0)
            to_alpha = to_static_alpha + stream * M + column
            tl.store(to_alpha, cast(grad, to_alpha.dtype.element_ty), mask=there & (column < M))
            to_beta = to_static_beta + stream
            tl.store(to_beta, cast(grad, to_beta.dtype.element_ty), mask=there & (column == M))
            if DYNAMIC:
                grad = tl.load(total + S * K + place, mask=place < K, other=0.0)
                of_alpha = tl.zeros([CP], tl.float32) + tl.sum(tl.where(place < M, grad, 0.0), axis=0)
                of_beta = tl.zeros([CP], tl.float32) + tl.sum(tl.where(place == M, grad, 0.0), axis=0)
                tl.store(to_alpha_scale + place, cast(of_alpha, to_alpha_scale.dtype.element_ty), mask=place < 1)
                tl.store(to_beta_scale + place, cast(of_beta, to_beta_scale.dtype.element_ty), mask=place < 1)
