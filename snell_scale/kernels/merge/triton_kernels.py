"""Triton kernels of the merge and its gradients; launched by triton_impl.py, derivations in README.md.

Every kernel sees a delta as (G, H, Q, rows) and (G, H, Q, columns) factors: transposed, so that a tile loads
neighbouring numbers. Kernels that do not tell components apart are given H = 1 and Q = r. `kernel_values` is the
one place where K is computed. The mask 1[|K| > τ] needs the same bits of K everywhere: it adds the Q products of
an entry one after the other whatever the tile's shape, spells out each fused multiply-add, and is compiled
without any other fusion (Config in triton_impl.py). Some functions are longer than 40 lines: a kernel is one pass
over a tile, and what it keeps in registers cannot be handed around.

Rows and columns are index tiles, (BLOCK_M, 1) and (1, BLOCK_N): their outer product is the tile. Pointers are
fp32 but for `weight`, `out` and `grad`, which may be any float; offsets are int64.
"""

# A call of a jitted function is typed NoReturn, for outside of a kernel it raises.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def kernel_values(
    a_ptr, b_ptr, logs_ptr, alpha_ptr, gamma_ptr, beta_ptr, scale, group, rows, columns, num_rows, num_columns,
    KERNEL: tl.constexpr, H: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """(K, base, shape, distances) at rows × columns of one group, fp32; anything where either is out of range.

    base: the signed sum of distances (distance, mixk), b·a (linear, sigmoid), D² (rbf), D (exponential).
    shape: what α multiplies, that is softmax, σ or exp. distances: d_h (distance, mixk).
    """
    group = group.to(tl.int64)
    a_ptr += group * (H * Q) * num_columns
    b_ptr += group * (H * Q) * num_rows
    distances = ()
    if KERNEL == "distance" or KERNEL == "mixk":
        base, distances = _signed_distances(a_ptr, b_ptr, scale, rows, columns, num_rows, num_columns, H, Q)
    elif KERNEL == "linear" or KERNEL == "sigmoid":
        base = _pairs(a_ptr, b_ptr, rows, columns, num_rows, num_columns, Q, False)
    else:
        base = _pairs(a_ptr, b_ptr, rows, columns, num_rows, num_columns, Q, True)
        if KERNEL == "exponential":
            base = tl.sqrt_rn(base)
    shape = base
    K = base
    if KERNEL != "distance" and KERNEL != "linear":
        alpha = tl.load(alpha_ptr + group)
        gamma = tl.load(gamma_ptr + group)
        beta = tl.load(beta_ptr + group)
        if KERNEL == "mixk":
            logs = tl.load(logs_ptr + group * num_columns + columns, mask=columns < num_columns, other=0.0)
            shape = tl.exp(tl.fma(base, 1.0 / gamma, -logs))
            K = tl.fma(alpha, shape, base) + beta
        elif KERNEL == "sigmoid":
            shape = 1.0 / (1.0 + tl.exp(-beta * base))
            K = tl.fma(alpha, shape, gamma)
        else:
            shape = tl.exp(-beta * base)
            K = tl.fma(alpha, shape, gamma)
    return K, base, shape, distances


@triton.jit
def _signed_distances(
    a_ptr, b_ptr, scale, rows, columns, num_rows, num_columns, H: tl.constexpr, Q: tl.constexpr
):  # fmt: skip
    """Σ_h c (−1)^h d_h, and the d_h."""
    first = tl.sqrt_rn(_pairs(a_ptr, b_ptr, rows, columns, num_rows, num_columns, Q, True))
    distances = (first,)
    total = scale * first
    for h in tl.static_range(1, H):
        a_ptr += Q * num_columns
        b_ptr += Q * num_rows
        distance = tl.sqrt_rn(_pairs(a_ptr, b_ptr, rows, columns, num_rows, num_columns, Q, True))
        distances = distances + (distance,)
        total = tl.fma(scale * (1 - 2 * (h % 2)), distance, total)
    return total, distances


@triton.jit
def _pairs(
    a_ptr, b_ptr, rows, columns, num_rows, num_columns, Q: tl.constexpr, IS_DISTANCE: tl.constexpr
):  # fmt: skip
    """b·a over Q numbers, or ‖b − a‖² as |a|² − 2 b·a + |b|², not below 0."""
    row_mask = rows < num_rows
    column_mask = columns < num_columns
    a_pointers = a_ptr + columns
    b_pointers = b_ptr + rows
    product = tl.zeros((rows + columns).shape, tl.float32)
    a_norm = tl.zeros(columns.shape, tl.float32)
    b_norm = tl.zeros(rows.shape, tl.float32)
    for _ in range(Q):
        a = tl.load(a_pointers, mask=column_mask, other=0.0)
        b = tl.load(b_pointers, mask=row_mask, other=0.0)
        if IS_DISTANCE and Q <= 2:
            # Few numbers: many pairs are close, where the other form cancels most.
            difference = b - a
            product = tl.fma(difference, difference, product)
        else:
            product = tl.fma(b, a, product)
        if IS_DISTANCE and Q > 2:
            a_norm = tl.fma(a, a, a_norm)
            b_norm = tl.fma(b, b, b_norm)
        a_pointers += num_columns
        b_pointers += num_rows
    if IS_DISTANCE and Q > 2:
        squared = tl.fma(product, -2.0, a_norm + b_norm)
        # Not tl.maximum, which would turn the NaN of a diverged factor into 0.
        product = tl.where(squared < 0.0, 0.0, squared)
    return product


@triton.jit
def gate_values(K, tau_ptr, group, WEIGHTING: tl.constexpr):
    """g ⊙ M; 1 for a dense delta."""
    if WEIGHTING == "dense":
        gate = tl.full(K.shape, 1.0, tl.float32)
    else:
        tau = tl.load(tau_ptr + group)
        magnitude = tl.abs(K)
        if WEIGHTING == "magnitude":
            factor = magnitude
        elif WEIGHTING == "soft":
            factor = magnitude - tau
        else:
            factor = tl.full(K.shape, 1.0, tl.float32)
        gate = tl.where(magnitude > tau, factor, 0.0)
    return gate


@triton.jit
def program_tile(num_row_blocks, num_column_blocks):
    """(group, row block, column block) of a one-dimensional grid over all tiles of all groups."""
    program = tl.program_id(0)
    tiles = num_row_blocks * num_column_blocks
    tile = program % tiles
    return program // tiles, tile // num_column_blocks, tile % num_column_blocks


@triton.jit
def _merge_fwd_kernel(
    out_ptr, out_row_stride, out_column_stride, weight_ptr, weight_row_stride, weight_column_stride, tau_ptr,
    a_ptr, b_ptr, logs_ptr, alpha_ptr, gamma_ptr, beta_ptr, scale, num_rows, num_columns,
    first_column, num_out_columns, num_row_blocks, num_column_blocks,
    KERNEL: tl.constexpr, WEIGHTING: tl.constexpr, HAS_WEIGHT: tl.constexpr, H: tl.constexpr, Q: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out (G·rows, num_out_columns) = W0 + K ⊙ gate in columns [first_column, first_column + num_out_columns)."""
    group, row_block, column_block = program_tile(num_row_blocks, num_column_blocks)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    local = column_block * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    columns = first_column + local
    K, _, _, _ = kernel_values(
        a_ptr, b_ptr, logs_ptr, alpha_ptr, gamma_ptr, beta_ptr, scale, group, rows, columns,
        num_rows, num_columns, KERNEL, H, Q,
    )  # fmt: skip
    merged = K * gate_values(K, tau_ptr, group, WEIGHTING)
    mask = (rows < num_rows) & (local < num_out_columns)
    out_rows = group.to(tl.int64) * num_rows + rows
    if HAS_WEIGHT:
        offsets = out_rows * weight_row_stride + columns.to(tl.int64) * weight_column_stride
        merged += tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    offsets = out_rows * out_row_stride + local.to(tl.int64) * out_column_stride
    tl.store(out_ptr + offsets, merged.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _column_logs_kernel(
    partial_ptr, a_ptr, b_ptr, gamma_ptr, scale, num_rows, num_columns, num_row_chunks, num_column_blocks,
    H: tl.constexpr, Q: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial (G, num_row_chunks, num_columns) = log Σ exp(K/γ) over CHUNK rows, by a running maximum and sum."""
    group, chunk, column_block = program_tile(num_row_chunks, num_column_blocks)
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inverse = 1.0 / tl.load(gamma_ptr + group)
    largest = tl.full((1, BLOCK_N), float("-inf"), tl.float32)
    total = tl.zeros((1, BLOCK_N), tl.float32)
    for first_row in range(0, CHUNK, BLOCK_M):
        rows = chunk * CHUNK + first_row + tl.arange(0, BLOCK_M)[:, None]
        _, base, _, _ = kernel_values(
            a_ptr, b_ptr, a_ptr, a_ptr, a_ptr, a_ptr, scale, group, rows, columns, num_rows, num_columns,
            "distance", H, Q,
        )  # fmt: skip
        scaled = tl.where(rows < num_rows, base * inverse, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scaled, axis=0, keep_dims=True))
        total = total * tl.exp(largest - new_largest)
        total += tl.sum(tl.exp(scaled - new_largest), axis=0, keep_dims=True)
        largest = new_largest
    offsets = (group.to(tl.int64) * num_row_chunks + chunk) * num_columns + columns
    tl.store(partial_ptr + offsets, largest + tl.log(total), mask=columns < num_columns)


@triton.jit
def _grad_tile(grad_ptr, row_stride, column_stride, group, rows, local, num_rows, num_grad_columns):
    """A tile of G in fp32, 0 out of range."""
    mask = (rows < num_rows) & (local < num_grad_columns)
    offsets = (group.to(tl.int64) * num_rows + rows) * row_stride + local.to(tl.int64) * column_stride
    return tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _column_sums_kernel(
    partial_ptr, partial_stride, grad_ptr, grad_row_stride, grad_column_stride, tau_ptr,
    a_ptr, b_ptr, logs_ptr, alpha_ptr, gamma_ptr, beta_ptr, scale, num_rows, num_columns,
    first_column, num_grad_columns, num_row_chunks, num_column_blocks,
    WEIGHTING: tl.constexpr, H: tl.constexpr, Q: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """mixk's sums over CHUNK rows: partial (4, G, num_row_chunks, num_grad_columns) of Ĝ, Ĝ⊙s, s⊙K and Ĝ⊙s⊙K."""
    group, chunk, column_block = program_tile(num_row_chunks, num_column_blocks)
    local = column_block * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    columns = first_column + local
    sums = tl.zeros((1, BLOCK_N), tl.float32)
    share_sums = tl.zeros((1, BLOCK_N), tl.float32)
    base_sums = tl.zeros((1, BLOCK_N), tl.float32)
    product_sums = tl.zeros((1, BLOCK_N), tl.float32)
    for first_row in range(0, CHUNK, BLOCK_M):
        rows = chunk * CHUNK + first_row + tl.arange(0, BLOCK_M)[:, None]
        K, base, share, _ = kernel_values(
            a_ptr, b_ptr, logs_ptr, alpha_ptr, gamma_ptr, beta_ptr, scale, group, rows, columns,
            num_rows, num_columns, "mixk", H, Q,
        )  # fmt: skip
        dK = _grad_tile(
            grad_ptr, grad_row_stride, grad_column_stride, group, rows, local, num_rows, num_grad_columns
        ) * gate_values(K, tau_ptr, group, WEIGHTING)  # fmt: skip
        # A row out of range has some share, which may even be infinite.
        in_range = rows < num_rows
        share = tl.where(in_range, share, 0.0)
        dK = tl.where(in_range, dK, 0.0)
        weighted = dK * share
        sums += tl.sum(dK, axis=0, keep_dims=True)
        share_sums += tl.sum(weighted, axis=0, keep_dims=True)
        base_sums += tl.sum(share * base, axis=0, keep_dims=True)
        product_sums += tl.sum(weighted * base, axis=0, keep_dims=True)
    mask = local < num_grad_columns
    pointers = partial_ptr + (group.to(tl.int64) * num_row_chunks + chunk) * num_grad_columns + local
    tl.store(pointers, sums, mask=mask)
    tl.store(pointers + partial_stride, share_sums, mask=mask)
    tl.store(pointers + 2 * partial_stride, base_sums, mask=mask)
    tl.store(pointers + 3 * partial_stride, product_sums, mask=mask)


@triton.jit
def _factors_bwd_kernel(
    da_ptr, db_ptr, dparams_ptr, grad_ptr, grad_row_stride, grad_column_stride, sums_ptr, tau_ptr,
    a_ptr, b_ptr, logs_ptr, alpha_ptr, gamma_ptr, beta_ptr, scale, num_rows, num_columns,
    first_column, num_grad_columns, first_row_block, num_row_blocks, num_stripes, tiles_per_stripe,
    KERNEL: tl.constexpr, WEIGHTING: tl.constexpr, WANT_A: tl.constexpr, WANT_B: tl.constexpr,
    WANT_PARAMS: tl.constexpr, H: tl.constexpr, Q: tl.constexpr, Q_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Partial gradients of num_row_blocks row blocks: each program has one block and one stripe of columns.

    da (G, num_row_blocks, H, Q, num_grad_columns), db (G, num_stripes, H, Q, num_row_blocks·BLOCK_M), dparams
    (G, num_row_blocks, num_stripes, 3): every element is written by one program. sums (G, num_grad_columns) is
    mixk's colsum(Ĝ⊙s). Tiles are transposed, (BLOCK_N, BLOCK_M): they are tall, for every row block costs a
    partial da, and a warp should lie along their longer side.
    """
    group, row_block, stripe = program_tile(num_row_blocks, num_stripes)
    group64 = group.to(tl.int64)
    block_rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    rows = first_row_block * BLOCK_M + block_rows
    ranks = tl.arange(0, Q_PADDED)[:, None]
    b_tiles = ()
    db = ()
    row_sums = ()
    for h in tl.static_range(H):
        b_pointers = b_ptr + ((group64 * H + h) * Q + ranks) * num_rows + rows
        b_tiles = b_tiles + (tl.load(b_pointers, mask=(ranks < Q) & (rows < num_rows), other=0.0),)
        db = db + (tl.zeros((Q_PADDED, BLOCK_M), tl.float32),)
        row_sums = row_sums + (tl.zeros((1, BLOCK_M), tl.float32),)
    dparams = (0.0, 0.0, 0.0)
    for tile in range(tiles_per_stripe):
        first_local = (stripe * tiles_per_stripe + tile) * BLOCK_N
        local = first_local + tl.arange(0, BLOCK_N)[:, None]
        K, base, shape, distances = kernel_values(
            a_ptr, b_ptr, logs_ptr, alpha_ptr, gamma_ptr, beta_ptr, scale, group, rows, first_column + local,
            num_rows, num_columns, KERNEL, H, Q,
        )  # fmt: skip
        dK = _grad_tile(
            grad_ptr, grad_row_stride, grad_column_stride, group, rows, local, num_rows, num_grad_columns
        ) * gate_values(K, tau_ptr, group, WEIGHTING)  # fmt: skip
        in_range = (rows < num_rows) & (local < num_grad_columns)
        dK = tl.where(in_range, dK, 0.0)
        if WANT_PARAMS:
            dparams = _add_parameter_terms(dparams, dK, base, shape, in_range, KERNEL)
        if KERNEL == "mixk":
            sums = tl.load(
                sums_ptr + group64 * num_grad_columns + local, mask=local < num_grad_columns, other=0.0
            )
            ratio = tl.load(alpha_ptr + group) / tl.load(gamma_ptr + group)
            dK = tl.where(in_range, dK + ratio * shape * (dK - sums), 0.0)
        if WANT_A or WANT_B:
            flat_local = first_local + tl.arange(0, BLOCK_N)[None, :]
            mask = (ranks < Q) & (flat_local < num_grad_columns)
            new_db = ()
            new_row_sums = ()
            for h in tl.static_range(H):
                P = _pulled_back(dK, base, shape, distances, alpha_ptr, beta_ptr, scale, group, KERNEL, h)
                a_pointers = a_ptr + ((group64 * H + h) * Q + ranks) * num_columns + first_column + flat_local
                a_tile = tl.load(a_pointers, mask=mask, other=0.0)
                if WANT_A:
                    da = _product(b_tiles[h], tl.trans(P))
                    if KERNEL != "linear" and KERNEL != "sigmoid":
                        da = a_tile * tl.sum(P, axis=1)[None, :] - da
                    places = ((group64 * num_row_blocks + row_block) * H + h) * Q + ranks
                    tl.store(da_ptr + places * num_grad_columns + flat_local, da, mask=mask)
                if WANT_B:
                    new_db = new_db + (db[h] + _product(a_tile, P),)
                    new_row_sums = new_row_sums + (row_sums[h] + tl.sum(P, axis=0, keep_dims=True),)
            if WANT_B:
                db = new_db
                row_sums = new_row_sums
    if WANT_B:
        for h in tl.static_range(H):
            db_h = db[h]
            if KERNEL != "linear" and KERNEL != "sigmoid":
                db_h = b_tiles[h] * row_sums[h] - db_h
            places = ((group64 * num_stripes + stripe) * H + h) * Q + ranks
            tl.store(db_ptr + places * (num_row_blocks * BLOCK_M) + block_rows, db_h, mask=ranks < Q)
    if WANT_PARAMS:
        place = ((group64 * num_row_blocks + row_block) * num_stripes + stripe) * 3
        for i in tl.static_range(3):
            tl.store(dparams_ptr + place + i, dparams[i])


@triton.jit
def _add_parameter_terms(dparams, dK, base, shape, in_range, KERNEL: tl.constexpr):
    """Adds a tile's dα, dγ and dβ/α of sigmoid, rbf and exponential."""
    shape = tl.where(in_range, shape, 0.0)
    base = tl.where(in_range, base, 0.0)
    slope = dK * shape
    dalpha = dparams[0] + tl.sum(slope)
    slope = slope * (1.0 - shape) if KERNEL == "sigmoid" else -slope
    return dalpha, dparams[1] + tl.sum(dK), dparams[2] + tl.sum(slope * base)


@triton.jit
def _pulled_back(
    dK, base, shape, distances, alpha_ptr, beta_ptr, scale, group, KERNEL: tl.constexpr, h: tl.constexpr
):  # fmt: skip
    """P with dB = B ⊙ rowsum P − P A for kernels of distances, and dZ with dB = dZ A for kernels of b·a."""
    if KERNEL == "distance" or KERNEL == "mixk":
        P = _divided(scale * (1 - 2 * (h % 2)) * dK, distances[h])
    elif KERNEL == "linear":
        P = dK
    else:
        slope = tl.load(alpha_ptr + group) * tl.load(beta_ptr + group) * dK * shape
        if KERNEL == "sigmoid":
            P = slope * (1.0 - shape)
        elif KERNEL == "rbf":
            P = -2.0 * slope
        else:
            P = _divided(-slope, base)
    return P


@triton.jit
def _divided(numerator, distance):
    """0 where the distance is 0, a subgradient of the norm."""
    return tl.where(distance == 0.0, 0.0, numerator / distance)


@triton.jit
def _product(left, right):
    """fp32 products: TF32 would leave dA and dB three decimal digits."""
    return tl.dot(left, right, input_precision="ieee")
