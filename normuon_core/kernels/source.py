"""The Triton kernels: one source for PyTorch and JAX, which therefore run the same arithmetic.

Every product and every elementwise operation of a step is here, so that both frameworks make the same
update bit for bit. What that takes: sums run in a fixed order of two levels, without atomics; nothing
depends on how many matrices a launch covers; and launches switch the contraction of a * b + c into one
rounding off, because two compilers need not agree on where to contract.

Matrices come in a stack (count, short, long), laid out with the shorter side first, rows `pitch`
elements apart (a multiple of 16 bytes, as the tensor memory accelerator requires). A weight is
reached where it lies, through its strides: `squares`, `row_squares` and `feed` read gradient and
momentum there, and `finish` writes the update there, so that no weight is copied or transposed to enter
a stack.

One launch covers LEAVES weights that lie alike, `count` matrices of each from `leaf_start` on: what is
per weight comes as a tuple (gs, ms, ...), and a program picks its own. Small models have many weights,
and without that a launch would take longer than its work.

Kernels whose name starts with `_` are called by others. An output that is written in part, such as a
stack that grows weight by weight, comes a second time as the input `..._in`, which is not read; so do
momentum, second moment and the stack of `set_norm`, which are read there and overwritten. The launches
with all their arguments are in `launches.py`.
"""

import triton
import triton.language as tl

from normuon_core.polar_iteration import BEFORE_SQUARING

TILE = 64
"""Side of the square tile that the elementwise kernels work on, so that a weight stored long side
first is read and transposed in whole cache lines."""

RATES = 5
"""Length of a row of rates: mu, the step counted from 1, beta2, the decay rate, the learning rate."""

_SIDE: tl.constexpr = tl.constexpr(TILE)
_RATES: tl.constexpr = tl.constexpr(RATES)
_BEFORE_SQUARING: tl.constexpr = tl.constexpr(BEFORE_SQUARING)


@triton.jit
def _power(base, exponent):
    """base ** exponent for an integer exponent, by squaring: the same bits wherever it runs."""
    result = base * 0.0 + 1.0
    while exponent > 0:
        result = tl.where(exponent % 2 == 1, result * base, result)
        base = base * base
        exponent = exponent // 2
    return result


@triton.jit
def _direction(g, m, rates, RULE: tl.constexpr, NESTEROV: tl.constexpr):
    """Stage 1: (u, the new m), all float32."""
    if RULE == "none":
        u = g
    else:
        mu = tl.load(rates)
        if RULE == "heavy_ball":
            m = mu * m + g
            u = g + mu * m if NESTEROV else m
        else:
            m = m + (1.0 - mu) * (g - m)
            if RULE == "lerp":
                u = g + mu * (m - g) if NESTEROV else m
            else:
                tl.static_assert(RULE == "bias_corrected", "unknown momentum rule")
                step = tl.load(rates + 1).to(tl.int32)
                now = 1.0 - _power(mu, step)
                if NESTEROV:
                    ahead = 1.0 - _power(mu, step + 1)
                    u = tl.math.div_rn(mu * m, ahead + m * 0.0)
                    u += tl.math.div_rn((1.0 - mu) * g, now + g * 0.0)
                else:
                    u = tl.math.div_rn(m, now + m * 0.0)
    return u, m


@triton.jit
def _of_leaf(arrays, leaf, LEAVES: tl.constexpr):
    """The array of one of the weights that a launch covers."""
    own = arrays[0]
    for other in tl.static_range(1, LEAVES):
        own = tl.where(leaf == other, arrays[other], own)
    return own


@triton.jit
def _first(
    matrix,
    BATCH_STRIDE: tl.constexpr,
    OFFSET: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_STRIDE: tl.constexpr,
):
    """Where in a weight its matrix begins: SPLITS of them are in one entry of the batch."""
    place = (matrix // SPLITS).to(tl.int64) * BATCH_STRIDE + OFFSET
    return place + (matrix % SPLITS).to(tl.int64) * SPLIT_STRIDE


@triton.jit
def _tile(index, SHORT: tl.constexpr, LONG: tl.constexpr):
    """(row and column indices, whether they are inside) of one tile of a (SHORT, LONG) matrix."""
    across: tl.constexpr = (LONG + _SIDE - 1) // _SIDE
    i = (index // across) * _SIDE + tl.arange(0, _SIDE)[:, None]
    j = (index % across) * _SIDE + tl.arange(0, _SIDE)[None, :]
    return i, j, (i < SHORT) & (j < LONG)


@triton.jit(do_not_specialize=["leaf_start", "count"])
def squares(
    gs,
    ms,
    rates,
    leaf_start,
    count,
    partials,
    LEAVES: tl.constexpr,
    SHORT: tl.constexpr,
    LONG: tl.constexpr,
    BATCH_STRIDE: tl.constexpr,
    SHORT_STRIDE: tl.constexpr,
    LONG_STRIDE: tl.constexpr,
    OFFSET: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_STRIDE: tl.constexpr,
    MATRICES_A_RATE: tl.constexpr,
    RULE: tl.constexpr,
    NESTEROV: tl.constexpr,
    SHORT_PARTS: tl.constexpr,
    SHORT_CELL: tl.constexpr,
    SHORT_CUTS: tl.constexpr,
    LONG_PARTS: tl.constexpr,
    LONG_CELL: tl.constexpr,
    LONG_CUTS: tl.constexpr,
):
    """partials[matrix, i, j] = the sum of (BEFORE_SQUARING u)^2 over one rectangular part of the
    matrix.

    A side is divided into equal cells, each of them into CUTS parts, the last one of which may be short.
    gs, ms: the weights' gradients and momenta. partials: (matrices of the launch, SHORT_PARTS,
    LONG_PARTS) float32.
    """
    matrix = tl.program_id(0) // (SHORT_PARTS * LONG_PARTS)
    part = tl.program_id(0) % (SHORT_PARTS * LONG_PARTS)
    g = _of_leaf(gs, matrix // count, LEAVES)
    m = _of_leaf(ms, matrix // count, LEAVES)
    in_leaf = leaf_start + matrix % count
    rates += _RATES * (in_leaf // MATRICES_A_RATE)
    start = _first(in_leaf, BATCH_STRIDE, OFFSET, SPLITS, SPLIT_STRIDE)
    short_start, short_stop = _part(part // LONG_PARTS, SHORT_CELL, SHORT_CUTS)
    long_start, long_stop = _part(part % LONG_PARTS, LONG_CELL, LONG_CUTS)
    down: tl.constexpr = ((SHORT_CELL + SHORT_CUTS - 1) // SHORT_CUTS + _SIDE - 1) // _SIDE
    across: tl.constexpr = ((LONG_CELL + LONG_CUTS - 1) // LONG_CUTS + _SIDE - 1) // _SIDE
    total = tl.zeros((_SIDE, _SIDE), tl.float32)
    for row in range(down):
        for column in range(across):
            i = short_start + row * _SIDE + tl.arange(0, _SIDE)[:, None]
            j = long_start + column * _SIDE + tl.arange(0, _SIDE)[None, :]
            inside = (i < short_stop) & (j < long_stop)
            place = start + i.to(tl.int64) * SHORT_STRIDE + j.to(tl.int64) * LONG_STRIDE
            gradient = tl.load(g + place, mask=inside, other=0.0).to(tl.float32)
            if RULE == "none":
                momentum = gradient
            else:
                momentum = tl.load(m + place, mask=inside, other=0.0).to(tl.float32)
            u, _ = _direction(gradient, momentum, rates, RULE, NESTEROV)
            u *= _BEFORE_SQUARING
            total += u * u
    sum_of_part = tl.sum(tl.sum(total, axis=1), axis=0)
    tl.store(partials + matrix * (SHORT_PARTS * LONG_PARTS) + part, sum_of_part)


@triton.jit
def _part(index, CELL: tl.constexpr, CUTS: tl.constexpr):
    """(first index, one after the last) of one part of a side."""
    width: tl.constexpr = (CELL + CUTS - 1) // CUTS
    cell = index // CUTS
    start = cell * CELL + (index % CUTS) * width
    return start, tl.minimum(start + width, (cell + 1) * CELL)


@triton.jit(do_not_specialize=["leaf_start", "count"])
def row_squares(
    gs,
    ms,
    rates,
    leaf_start,
    count,
    partials,
    LEAVES: tl.constexpr,
    SHORT: tl.constexpr,
    LONG: tl.constexpr,
    BATCH_STRIDE: tl.constexpr,
    SHORT_STRIDE: tl.constexpr,
    LONG_STRIDE: tl.constexpr,
    OFFSET: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_STRIDE: tl.constexpr,
    MATRICES_A_RATE: tl.constexpr,
    RULE: tl.constexpr,
    NESTEROV: tl.constexpr,
    ROWS_ON_SHORT: tl.constexpr,
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    CELL: tl.constexpr,
    CUTS: tl.constexpr,
):
    """partials[matrix, part, row] = the sum of (BEFORE_SQUARING u)^2 over one part of an output
    neuron's inputs.

    The inputs are divided into parts as `squares` divides that side. gs, ms: the weights' gradients and
    momenta. partials: (matrices of the launch, PARTS, rows) float32.
    """
    matrix = tl.program_id(0) // (BLOCKS * PARTS)
    block = (tl.program_id(0) // PARTS) % BLOCKS
    part = tl.program_id(0) % PARTS
    g = _of_leaf(gs, matrix // count, LEAVES)
    m = _of_leaf(ms, matrix // count, LEAVES)
    in_leaf = leaf_start + matrix % count
    rates += _RATES * (in_leaf // MATRICES_A_RATE)
    first = _first(in_leaf, BATCH_STRIDE, OFFSET, SPLITS, SPLIT_STRIDE)
    start, stop = _part(part, CELL, CUTS)
    across: tl.constexpr = ((CELL + CUTS - 1) // CUTS + _SIDE - 1) // _SIDE
    rows: tl.constexpr = SHORT if ROWS_ON_SHORT else LONG
    row = block * _SIDE + tl.arange(0, _SIDE)
    total = tl.zeros((_SIDE, _SIDE), tl.float32)
    for step in range(across):
        entry = start + step * _SIDE + tl.arange(0, _SIDE)
        if ROWS_ON_SHORT:
            i, j = row[:, None], entry[None, :]
            inside = (i < rows) & (j < stop)
        else:
            i, j = entry[:, None], row[None, :]
            inside = (i < stop) & (j < rows)
        place = first + i.to(tl.int64) * SHORT_STRIDE + j.to(tl.int64) * LONG_STRIDE
        gradient = tl.load(g + place, mask=inside, other=0.0).to(tl.float32)
        if RULE == "none":
            momentum = gradient
        else:
            momentum = tl.load(m + place, mask=inside, other=0.0).to(tl.float32)
        u, _ = _direction(gradient, momentum, rates, RULE, NESTEROV)
        u *= _BEFORE_SQUARING
        total += u * u
    if ROWS_ON_SHORT:
        of_rows = tl.sum(total, axis=1)
    else:
        of_rows = tl.sum(total, axis=0)
    tl.store(partials + (matrix * PARTS + part) * rows + row, of_rows, mask=row < rows)


@triton.jit
def row_factors(
    partials,
    eps,
    factors,
    squares_after,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """factors[matrix, row] = (|u| / sqrt(rows)) / max(|u_row|, eps), and the squared norm of
    BEFORE_SQUARING u after they have multiplied it.

    partials: from `row_squares`. factors: (matrices, ROWS) float32. squares_after: (matrices,) float32,
    one for `feed` in the place of what `squares` makes.
    """
    matrix = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for block in range(BLOCKS):
        total += _row_squares(partials, matrix, block, ROWS, PARTS, BLOCK)
    mean = tl.sum(total, axis=0)
    norm = tl.math.sqrt_rn(tl.math.div_rn(mean, mean * 0.0 + ROWS))
    eps *= _BEFORE_SQUARING
    total = tl.zeros((BLOCK,), tl.float32)
    for block in range(BLOCKS):
        own = _row_squares(partials, matrix, block, ROWS, PARTS, BLOCK)
        root = tl.math.sqrt_rn(own)
        # Not tl.maximum, which drops a NaN.
        factor = tl.math.div_rn(norm + root * 0.0, tl.where(root < eps, eps, root))
        row = block * BLOCK + tl.arange(0, BLOCK)
        tl.store(factors + matrix.to(tl.int64) * ROWS + row, factor, mask=row < ROWS)
        total += tl.where(row < ROWS, factor * factor * own, 0.0)
    tl.store(squares_after + matrix, tl.sum(total, axis=0))


@triton.jit
def _row_squares(
    partials,
    matrix,
    block,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The squared norms of one block of rows, from those of their parts."""
    row = block * BLOCK + tl.arange(0, BLOCK)
    own = tl.zeros((BLOCK,), tl.float32)
    for part in range(PARTS):
        place = (matrix.to(tl.int64) * PARTS + part) * ROWS + row
        own += tl.load(partials + place, mask=row < ROWS, other=0.0)
    return own


@triton.jit(do_not_specialize=["leaf_start", "count", "stack_start"])
def feed(
    gs,
    ms,
    rates,
    partials,
    leaf_start,
    count,
    stack_start,
    norm_scale,
    eps,
    x_scale,
    factors,
    x_in,
    x,
    ms_out,
    LEAVES: tl.constexpr,
    SHORT: tl.constexpr,
    LONG: tl.constexpr,
    PITCH: tl.constexpr,
    BATCH_STRIDE: tl.constexpr,
    SHORT_STRIDE: tl.constexpr,
    LONG_STRIDE: tl.constexpr,
    OFFSET: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_STRIDE: tl.constexpr,
    MATRICES_A_RATE: tl.constexpr,
    RULE: tl.constexpr,
    NESTEROV: tl.constexpr,
    EPS_RULE: tl.constexpr,
    EQUILIBRATED: tl.constexpr,
    ROWS_ON_SHORT: tl.constexpr,
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_PADDED: tl.constexpr,
):
    """m <- the new momentum; x = u / max(norm_scale |u|, eps), or u / (norm_scale |u| + eps), times
    x_scale, rounded once.

    gs, ms, ms_out: the weights'. partials: from `squares`, (matrices of the launch, PARTS), of all
    devices that have a part of the matrix. x: the stack, in the compute dtype. EQUILIBRATED: u is first
    multiplied row by row by factors, which like the partials are from `row_factors`.
    """
    matrix = tl.program_id(0) // TILES
    g = _of_leaf(gs, matrix // count, LEAVES)
    m = _of_leaf(ms, matrix // count, LEAVES)
    m_out = _of_leaf(ms_out, matrix // count, LEAVES)
    in_leaf = leaf_start + matrix % count
    rates += _RATES * (in_leaf // MATRICES_A_RATE)
    place_in_stack = (stack_start + matrix).to(tl.int64)
    part = tl.arange(0, PARTS_PADDED)
    parts = tl.load(partials + matrix * PARTS + part, mask=part < PARTS, other=0.0)
    norm = norm_scale * tl.math.sqrt_rn(tl.sum(parts, axis=0))
    # A finite matrix over an overflowed norm would be a silent zero.
    norm = tl.where(norm == float("inf"), float("nan"), norm)
    # As the partial sums, u and eps are `BEFORE_SQUARING` times what they stand for.
    eps *= _BEFORE_SQUARING
    if EPS_RULE == "max":
        # Not tl.maximum, which drops a NaN.
        divisor = tl.where(norm < eps, eps, norm)
    else:
        divisor = norm + eps

    i, j, inside = _tile(tl.program_id(0) % TILES, SHORT, LONG)
    place = _first(in_leaf, BATCH_STRIDE, OFFSET, SPLITS, SPLIT_STRIDE)
    place = place + i.to(tl.int64) * SHORT_STRIDE + j.to(tl.int64) * LONG_STRIDE
    gradient = tl.load(g + place, mask=inside, other=0.0).to(tl.float32)
    if RULE == "none":
        momentum = gradient
    else:
        momentum = tl.load(m + place, mask=inside, other=0.0).to(tl.float32)
    u, momentum = _direction(gradient, momentum, rates, RULE, NESTEROV)
    if RULE != "none":
        tl.store(m_out + place, momentum.to(m_out.dtype.element_ty), mask=inside)
    u *= _BEFORE_SQUARING
    if EQUILIBRATED:
        if ROWS_ON_SHORT:
            own = factors + matrix.to(tl.int64) * SHORT + i
            u *= tl.load(own, mask=i < SHORT, other=0.0)
        else:
            own = factors + matrix.to(tl.int64) * LONG + j
            u *= tl.load(own, mask=j < LONG, other=0.0)
    normalized = tl.math.div_rn(u, divisor + u * 0.0) * x_scale
    place = place_in_stack * (SHORT * PITCH) + i * PITCH + j
    tl.store(x + place, normalized.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _triangular_tile(index, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The index-th of the tiles (i, j) with i >= WIDTH j, column by column.

    ROWS tiles down; a tile is WIDTH times as wide as it is high. Column j starts at
    j ROWS - WIDTH j (j - 1) / 2; the root of that is rounded and put right.
    """
    b: tl.constexpr = 2.0 * ROWS + WIDTH
    root = tl.sqrt(b * b - 8.0 * WIDTH * index.to(tl.float32))
    j = ((b - root) / (2.0 * WIDTH)).to(tl.int32)
    j = tl.where(j * ROWS - WIDTH * ((j * (j - 1)) // 2) > index, j - 1, j)
    j = tl.where((j + 1) * ROWS - WIDTH * (((j + 1) * j) // 2) <= index, j + 1, j)
    return WIDTH * j + index - (j * ROWS - WIDTH * ((j * (j - 1)) // 2)), j


@triton.jit
def _grouped_tile(index, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The index-th tile, eight rows at a time, so that what runs together shares its operands."""
    first = (index // (8 * COLUMNS)) * 8
    rows = min(ROWS - first, 8)
    inside = index % (8 * COLUMNS)
    return first + inside % rows, inside // rows


@triton.jit
def _finish_product(
    accumulated,
    d,
    e,
    c,
    alpha,
    beta,
    gamma,
    diagonal,
    matrix,
    i,
    j,
    M: tl.constexpr,
    N: tl.constexpr,
    PITCH: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ADDENDS: tl.constexpr,
    HAS_DIAGONAL: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """The epilogue on tile (i, j) of c, in float32, rounded once; a symmetric one is mirrored."""
    rows = i * TILE_M + tl.arange(0, TILE_M)[:, None]
    columns = j * TILE_N + tl.arange(0, TILE_N)[None, :]
    whole: tl.constexpr = (M % TILE_M == 0) and (N % TILE_N == 0)
    inside = (rows < M) & (columns < N)
    place = matrix * (M * PITCH) + (rows * PITCH + columns)
    result = accumulated * alpha
    if ADDENDS >= 1:
        if whole:
            addend = tl.load(d + place)
        else:
            addend = tl.load(d + place, mask=inside, other=0.0)
        result += addend.to(tl.float32) * beta
    if ADDENDS >= 2:
        if whole:
            addend = tl.load(e + place)
        else:
            addend = tl.load(e + place, mask=inside, other=0.0)
        result += addend.to(tl.float32) * gamma
    if HAS_DIAGONAL:
        result += tl.where(rows == columns, diagonal, 0.0)
    tile = result.to(c.dtype.element_ty)
    if not SYMMETRIC:
        _store_tile(c, tile, matrix, i, j, M, N, PITCH, TILE_M, TILE_N)
    elif i == j:
        lower = tl.arange(0, TILE_M)[:, None] >= tl.arange(0, TILE_N)[None, :]
        _store_tile(
            c, tl.where(lower, tile, tl.trans(tile)), matrix, i, j, M, N, PITCH, TILE_M, TILE_N
        )
    elif i > j:
        # A tile above the diagonal is its mirror image's to write.
        _store_tile(c, tile, matrix, i, j, M, N, PITCH, TILE_M, TILE_N)
        _store_tile(c, tl.trans(tile), matrix, j, i, M, N, PITCH, TILE_N, TILE_M)


@triton.jit
def _store_tile(
    c,
    tile,
    matrix,
    i,
    j,
    M: tl.constexpr,
    N: tl.constexpr,
    PITCH: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):
    rows = i * TILE_M + tl.arange(0, TILE_M)[:, None]
    columns = j * TILE_N + tl.arange(0, TILE_N)[None, :]
    place = matrix * (M * PITCH) + (rows * PITCH + columns)
    if (M % TILE_M == 0) and (N % TILE_N == 0):
        tl.store(c + place, tile)
    else:
        tl.store(c + place, tile, mask=(rows < M) & (columns < N))


@triton.jit(do_not_specialize=["count"])
def product(
    a,
    b,
    d,
    e,
    alpha,
    beta,
    gamma,
    diagonal,
    count,
    c,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PITCH_A: tl.constexpr,
    PITCH_B: tl.constexpr,
    PITCH_C: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    ADDENDS: tl.constexpr,
    HAS_DIAGONAL: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """c = alpha a b + beta d + gamma e + diagonal I, for each of `count` matrices.

    Accumulated in float32, with the epilogue in float32 and one rounding. SYMMETRIC says that the
    result is known to be symmetric (a and b may differ): half of the tiles are computed, each stored
    once and mirrored once. A program takes tile after tile, so that few of them set up the tensor
    memory accelerator's descriptors, which also fill what lies beyond a ragged edge with zeros.

    a: (count, M, K). b: (count, K, N), or (count, N, K) if B_TRANSPOSED. c, d, e: (count, M, N).
    ADDENDS of d and e, in this order, are read. TILE_N is TILE_M or, if SYMMETRIC, twice that.
    """
    rows: tl.constexpr = (M + TILE_M - 1) // TILE_M
    columns: tl.constexpr = (N + TILE_N - 1) // TILE_N
    # A symmetric tile may be two square ones side by side.
    width: tl.constexpr = TILE_N // TILE_M if SYMMETRIC else 1
    part: tl.constexpr = TILE_N // width
    triangle: tl.constexpr = columns * rows - width * ((columns * (columns - 1)) // 2)
    tiles: tl.constexpr = triangle if SYMMETRIC else rows * columns
    a_tiles = tl.make_tensor_descriptor(
        a,
        shape=[count, M, K],
        strides=[M * PITCH_A, PITCH_A, 1],
        block_shape=[1, TILE_M, TILE_K],
    )
    if B_TRANSPOSED:
        b_tiles = tl.make_tensor_descriptor(
            b,
            shape=[count, N, K],
            strides=[N * PITCH_B, PITCH_B, 1],
            block_shape=[1, TILE_N, TILE_K],
        )
    else:
        b_tiles = tl.make_tensor_descriptor(
            b,
            shape=[count, K, N],
            strides=[K * PITCH_B, PITCH_B, 1],
            block_shape=[1, TILE_K, TILE_N],
        )
    index = tl.program_id(0)
    while index < tiles * count:
        matrix = index // tiles
        if SYMMETRIC:
            i, j = _triangular_tile(index % tiles, rows, width)
        else:
            i, j = _grouped_tile(index % tiles, rows, columns)
        accumulated = tl.zeros((TILE_M, TILE_N), tl.float32)
        for k in range(0, K, TILE_K):
            left = a_tiles.load([matrix, i * TILE_M, k]).reshape(TILE_M, TILE_K)
            if B_TRANSPOSED:
                right = b_tiles.load([matrix, j * TILE_N, k]).reshape(TILE_N, TILE_K).T
            else:
                right = b_tiles.load([matrix, k, j * TILE_N]).reshape(TILE_K, TILE_N)
            accumulated = tl.dot(left, right, accumulated, input_precision="ieee")
        wide = matrix.to(tl.int64)
        if width == 1:
            _finish_product(
                accumulated, d, e, c, alpha, beta, gamma, diagonal, wide, i, j,
                M, N, PITCH_C, SYMMETRIC, ADDENDS, HAS_DIAGONAL, TILE_M, part,
            )  # fmt: skip
        else:
            halves = accumulated.reshape(TILE_M, 2, part).permute(0, 2, 1)
            left_half, right_half = halves.split()
            _finish_product(
                left_half, d, e, c, alpha, beta, gamma, diagonal, wide, i, 2 * j,
                M, N, PITCH_C, SYMMETRIC, ADDENDS, HAS_DIAGONAL, TILE_M, part,
            )  # fmt: skip
            _finish_product(
                right_half, d, e, c, alpha, beta, gamma, diagonal, wide, i, 2 * j + 1,
                M, N, PITCH_C, SYMMETRIC, ADDENDS, HAS_DIAGONAL, TILE_M, part,
            )  # fmt: skip
        index += tl.num_programs(0)


@triton.jit(do_not_specialize=["stack_start"])
def neuron_squares(
    v,
    stack_start,
    partials,
    SHORT: tl.constexpr,
    LONG: tl.constexpr,
    PITCH: tl.constexpr,
    NEURONS_ON_SHORT: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICES: tl.constexpr,
    SLICE: tl.constexpr,
):
    """partials[matrix, slice, neuron] = the sum of v^2 over one slice of the neuron's inputs.

    v: the stack. partials: (matrices of the launch, SLICES, neurons) float32.
    """
    block = tl.program_id(0) % BLOCKS
    part = (tl.program_id(0) // BLOCKS) % SLICES
    matrix = tl.program_id(0) // (BLOCKS * SLICES)
    start = v + (stack_start + matrix).to(tl.int64) * (SHORT * PITCH)
    neuron = block * BLOCK + tl.arange(0, BLOCK)
    entry = part * SLICE + tl.arange(0, SLICE)
    if NEURONS_ON_SHORT:
        inside = (neuron[:, None] < SHORT) & (entry[None, :] < LONG)
        value = tl.load(start + neuron[:, None] * PITCH + entry[None, :], mask=inside, other=0.0)
        value = value.to(tl.float32)
        total = tl.sum(value * value, axis=1)
        neurons: tl.constexpr = SHORT
    else:
        inside = (entry[:, None] < SHORT) & (neuron[None, :] < LONG)
        value = tl.load(start + entry[:, None] * PITCH + neuron[None, :], mask=inside, other=0.0)
        value = value.to(tl.float32)
        total = tl.sum(value * value, axis=0)
        neurons: tl.constexpr = LONG
    place = (matrix.to(tl.int64) * SLICES + part) * neurons + neuron
    tl.store(partials + place, total, mask=neuron < neurons)


@triton.jit
def set_norm(
    v_in,
    sums,
    eps,
    v,
    SHORT: tl.constexpr,
    LONG: tl.constexpr,
    PITCH: tl.constexpr,
    INPUTS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_PADDED: tl.constexpr,
):
    """v <- v sqrt(SHORT) / max(|v|, eps), in float32 and rounded once.

    v_in, v: the stack. sums: from `statistics`, of q over blocks of neurons with INPUTS entries each.
    """
    matrix = tl.program_id(0) // TILES
    i, j, inside = _tile(tl.program_id(0) % TILES, SHORT, LONG)
    block = tl.arange(0, BLOCKS_PADDED)
    own = tl.load(sums + matrix * (BLOCKS * 2) + block * 2, mask=block < BLOCKS, other=0.0)
    norm = tl.math.sqrt_rn(INPUTS * tl.sum(own, axis=0))
    target = tl.math.sqrt_rn(norm * 0.0 + SHORT)
    factor = tl.math.div_rn(target, tl.where(norm < eps, eps, norm))
    place = matrix.to(tl.int64) * (SHORT * PITCH) + i * PITCH + j
    value = tl.load(v_in + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(v + place, (value * factor).to(v.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["leaf_start", "count", "first"])
def statistics(
    partials,
    second_moments,
    rates,
    eps,
    leaf_start,
    count,
    first,
    new_second_moments,
    factors,
    sums,
    LEAVES: tl.constexpr,
    NEURONS: tl.constexpr,
    INPUTS: tl.constexpr,
    MATRICES_A_RATE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EPS_RULE: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stage 3's statistics of the weights' matrices: q, s <- s + (1 - beta2)(q - s), and t(s).

    partials: from `neuron_squares`, whose matrix `first` is this launch's. second_moments: (batch,
    NEURONS) float32, the weights'. For the matrices of this launch, factors: (matrices, NEURONS)
    float32, t for each neuron; sums: (matrices, BLOCKS, 2) float32, of q and q t^2 over one block of
    neurons. Not NORMALIZE: the sum of q alone, for the norm.
    """
    matrix = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    neuron = block * BLOCK + tl.arange(0, BLOCK)
    inside = neuron < NEURONS
    q = tl.zeros((BLOCK,), tl.float32)
    for part in range(SLICES):
        place = ((first + matrix).to(tl.int64) * SLICES + part) * NEURONS + neuron
        q += tl.load(partials + place, mask=inside, other=0.0)
    q = tl.math.div_rn(q, q * 0.0 + INPUTS)
    place = sums + (matrix * BLOCKS + block) * 2
    tl.store(place, tl.sum(q, axis=0))
    if NORMALIZE:
        second_moment = _of_leaf(second_moments, matrix // count, LEAVES)
        new_second_moment = _of_leaf(new_second_moments, matrix // count, LEAVES)
        in_leaf = leaf_start + matrix % count
        beta2 = tl.load(rates + _RATES * (in_leaf // MATRICES_A_RATE) + 2)
        s = in_leaf.to(tl.int64) * NEURONS + neuron
        old = tl.load(second_moment + s, mask=inside, other=0.0)
        new = old + (1.0 - beta2) * (q - old)
        tl.store(new_second_moment + s, new, mask=inside)
        if EPS_RULE == "max":
            root = tl.math.sqrt_rn(tl.where(new < eps, eps, new))
        else:
            tl.static_assert(EPS_RULE == "add", "unknown eps_rule")
            root = tl.math.sqrt_rn(new) + eps
        t = tl.math.div_rn(root * 0.0 + 1.0, root)
        tl.store(factors + matrix.to(tl.int64) * NEURONS + neuron, t, mask=inside)
        tl.store(place + 1, tl.sum(tl.where(inside, q * t * t, 0.0), axis=0))


@triton.jit(do_not_specialize=["leaf_start", "count", "stack_start"])
def finish(
    v,
    ps,
    rates,
    scales_of_leaves,
    decays_of_leaves,
    factors,
    sums,
    rescale_eps,
    rms_floor,
    leaf_start,
    count,
    stack_start,
    results_in,
    results,
    LEAVES: tl.constexpr,
    ADD: tl.constexpr,
    SHORT: tl.constexpr,
    LONG: tl.constexpr,
    PITCH: tl.constexpr,
    BATCH_STRIDE: tl.constexpr,
    SHORT_STRIDE: tl.constexpr,
    LONG_STRIDE: tl.constexpr,
    OFFSET: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_STRIDE: tl.constexpr,
    MATRICES_A_RATE: tl.constexpr,
    NEURONS_ON_SHORT: tl.constexpr,
    INPUTS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    RESCALE: tl.constexpr,
    RMS: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    DECAY_INSIDE_SCALE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_PADDED: tl.constexpr,
):
    """The rest of stage 3, then stages 4 to 6: the update, or with ADD the parameter after it.

    v: the stack. ps, results: the weights' parameters and what becomes of each, in the parameter's
    dtype; with ADD the update is rounded to it first, and then the sum, as if it were added later.
    scales, decays: (batch,) float32, what multiplies each matrix and its decay. factors, sums: from
    `statistics`.
    """
    matrix = tl.program_id(0) // TILES
    p = _of_leaf(ps, matrix // count, LEAVES)
    result = _of_leaf(results, matrix // count, LEAVES)
    scales = _of_leaf(scales_of_leaves, matrix // count, LEAVES)
    decays = _of_leaf(decays_of_leaves, matrix // count, LEAVES)
    in_leaf = leaf_start + matrix % count
    rates += _RATES * (in_leaf // MATRICES_A_RATE)
    place_in_stack = (stack_start + matrix).to(tl.int64)
    i, j, inside = _tile(tl.program_id(0) % TILES, SHORT, LONG)
    place = place_in_stack * (SHORT * PITCH) + i * PITCH + j
    direction = tl.load(v + place, mask=inside, other=0.0)
    scale = tl.load(scales + in_leaf)
    decay_rate = tl.load(rates + 3) * tl.load(decays + in_leaf)
    rate = tl.load(rates + 4)

    ratio = rate * 0.0 + 1.0
    norm = ratio
    if NORMALIZE or RMS:
        block = tl.arange(0, BLOCKS_PADDED)
        sums += matrix * (BLOCKS * 2) + block * 2
        sum_q = tl.sum(tl.load(sums, mask=block < BLOCKS, other=0.0), axis=0)
        norm = tl.math.sqrt_rn(INPUTS * sum_q)
    if NORMALIZE:
        sum_scaled = tl.sum(tl.load(sums + 1, mask=block < BLOCKS, other=0.0), axis=0)
        scaled = tl.math.sqrt_rn(INPUTS * sum_scaled)
        if RESCALE == "max":
            ratio = tl.math.div_rn(norm, tl.where(scaled < rescale_eps, rescale_eps, scaled))
        elif RESCALE == "add":
            ratio = tl.math.div_rn(norm, scaled + rescale_eps)
        else:
            tl.static_assert(RESCALE is None, "unknown rescale")
        norm = scaled * ratio
        if NEURONS_ON_SHORT:
            t = tl.load(factors + matrix.to(tl.int64) * SHORT + i, mask=i < SHORT, other=0.0)
        else:
            t = tl.load(factors + matrix.to(tl.int64) * LONG + j, mask=j < LONG, other=0.0)
        direction = (direction.to(tl.float32) * (t * ratio)).to(direction.dtype)
    if RMS:
        scale = tl.math.div_rn(scale, tl.where(norm < rms_floor, rms_floor, norm))

    update = direction.to(tl.float32)
    place = _first(in_leaf, BATCH_STRIDE, OFFSET, SPLITS, SPLIT_STRIDE)
    place = place + i.to(tl.int64) * SHORT_STRIDE + j.to(tl.int64) * LONG_STRIDE
    weight = tl.load(p + place, mask=inside, other=0.0).to(tl.float32)
    decay = decay_rate * weight
    if CAUTIOUS:
        # Not the sign of the product, which can underflow to zero, and zero counts as agreement.
        against = ((update > 0) & (weight < 0)) | ((update < 0) & (weight > 0))
        decay = tl.where(against, 0.0, decay)
    if DECAY_INSIDE_SCALE:
        update = (update + decay) * scale
    else:
        update = update * scale + decay
    change = (update * -rate).to(result.dtype.element_ty)
    if ADD:
        change = (weight + change.to(tl.float32)).to(result.dtype.element_ty)
    tl.store(result + place, change, mask=inside)
