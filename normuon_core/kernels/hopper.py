"""The product kernel for NVIDIA's Hopper, in Gluon: the bits of `source.product`, in less time.

A program stays on its multiprocessor and takes tile after tile of 128 rows. Its warps share the work:

- One warp loads. It fills a ring of stages in shared memory through the tensor memory accelerator: for
  every 64 columns of `a` two halves of 64 rows and the matching part of `b`, then, behind the last of
  them, the tile's addends in the same ring.
- Two groups of four warps multiply, 64 rows each, with the same part of `b`. They are not kept in step:
  each hands a stage back for itself, so that the epilogue of one runs under the products of the other.
- A finished chunk of 64 x 64 goes through a small buffer to memory, again by the accelerator; a
  symmetric one a second time, transposed in shared memory, to its mirror image's place.

What lies beyond a ragged edge the accelerator reads as zeros and does not write, so any size will do.
No size is a constant: one compilation serves all shapes.

Of a symmetric result the tiles that reach the diagonal or lie below it are computed. A tile of 256
columns that starts on the diagonal has nothing to compute in its right half: such tiles take half the
products, and come last, where they fill the gaps that the others leave.

Terms: the roles of warps, barriers and descriptors are those of the CUDA programming guide's chapters
on asynchronous copies and of Triton's Gluon tutorials.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate

TILE_M = 128
"""Rows of a tile: 64 for each of the two groups of warps that multiply."""

_ROWS: gl.constexpr = gl.constexpr(64)
"""Rows of one group of warps, and the side of the square chunks that leave a tile."""

_DEPTH: gl.constexpr = gl.constexpr(64)
"""Columns of `a` in a stage: 128 bytes, what the accelerator's swizzle spans. A stage of operands then
also has room for one of addends."""

_BAND: gl.constexpr = gl.constexpr(8)
"""Rows of tiles that are worked on together, so that what runs at one time shares its operands."""

_LOADING_REGISTERS: gl.constexpr = gl.constexpr(24)
_MULTIPLYING_REGISTERS: gl.constexpr = gl.constexpr(240)
"""Registers of a thread. The accumulator of a tile of 256 columns takes 128 of them."""

DESCRIPTORS = 6
"""Tensor memory descriptors of a program at the most: of a, b, two addends and, for each group of warps
that multiplies, c."""


@aggregate
class Tiles:
    """How the results are cut into tiles (i, j), and their order.

    Attributes:
      rows, columns: tiles down and across one result.
      WIDTH: a tile's columns over its rows.
      HALVES: whether tiles that need half the products come last.
    """

    count: gl.tensor
    rows: gl.tensor
    columns: gl.tensor
    WIDTH: gl.constexpr
    SYMMETRIC: gl.constexpr
    HALVES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, count, rows, columns, WIDTH, SYMMETRIC, HALVES):
        self.count = count
        self.rows = rows
        self.columns = columns
        self.WIDTH = gl.constexpr(WIDTH)
        self.SYMMETRIC = gl.constexpr(SYMMETRIC)
        self.HALVES = gl.constexpr(HALVES)

    @gluon.jit
    def of_a_matrix(self):
        """How many tiles of one result take all their products."""
        if self.HALVES:
            return self.columns * (self.rows - self.columns)
        elif self.SYMMETRIC:
            above = self.WIDTH * ((self.columns * (self.columns - 1)) // 2)
            return self.columns * self.rows - above
        else:
            return self.columns * self.rows

    @gluon.jit
    def whole(self):
        """How many tiles take all their products."""
        return self.of_a_matrix() * self.count

    @gluon.jit
    def halves(self):
        """How many tiles take half of them."""
        return self.columns * self.count

    @gluon.jit
    def at(self, index):
        """(matrix, i, j) of a tile that takes all its products."""
        tiles = self.of_a_matrix()
        if self.HALVES:
            i, j = _triangular(index % tiles, self.rows - 1, self.WIDTH)
            return index // tiles, i + 1, j
        elif self.SYMMETRIC:
            i, j = _triangular(index % tiles, self.rows, self.WIDTH)
            return index // tiles, i, j
        else:
            i, j = _banded(index % tiles, self.rows, self.columns)
            return index // tiles, i, j

    @gluon.jit
    def half_at(self, index):
        """(matrix, i, j) of a tile whose left half alone is on or below the diagonal."""
        j = index % self.columns
        return index // self.columns, self.WIDTH * j, j


@gluon.jit
def _triangular(index, rows, WIDTH: gl.constexpr):
    """The index-th of the tiles (i, j) with i >= WIDTH j, column by column.

    Column j starts at j rows - WIDTH j (j - 1) / 2; the root of that is rounded and put right.
    """
    b = 2.0 * rows.to(gl.float32) + WIDTH
    root = gl.sqrt(b * b - 8.0 * WIDTH * index.to(gl.float32))
    j = ((b - root) / (2.0 * WIDTH)).to(gl.int32)
    j = gl.where(_column_start(j, rows, WIDTH) > index, j - 1, j)
    j = gl.where(_column_start(j + 1, rows, WIDTH) <= index, j + 1, j)
    return WIDTH * j + index - _column_start(j, rows, WIDTH), j


@gluon.jit
def _column_start(j, rows, WIDTH: gl.constexpr):
    return j * rows - WIDTH * ((j * (j - 1)) // 2)


@gluon.jit
def _banded(index, rows, columns):
    first = (index // (_BAND * columns)) * _BAND
    high = gl.minimum(rows - first, _BAND)
    inside = index % (_BAND * columns)
    return first + inside % high, inside // high


@aggregate
class Ring:
    """Stages of shared memory between the warp that loads and the two groups that multiply.

    A barrier of `full` opens when a stage's bytes have come, one of `empty` when both groups have read
    them. A group's place in the ring is (stage, phase); the phase flips with every round.

    Attributes:
      upper, lower: (STAGES, 64, _DEPTH), rows of `a` for each group.
      b: (STAGES, TILE_N, _DEPTH) if B_TRANSPOSED, else (STAGES, _DEPTH, TILE_N).
    """

    upper: gl.shared_memory_descriptor
    lower: gl.shared_memory_descriptor
    b: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    TILE_N: gl.constexpr
    STAGES: gl.constexpr
    B_TRANSPOSED: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, upper, lower, b, full, empty, TILE_N, STAGES, B_TRANSPOSED):
        self.upper = upper
        self.lower = lower
        self.b = b
        self.full = full
        self.empty = empty
        self.TILE_N = gl.constexpr(TILE_N)
        self.STAGES = gl.constexpr(STAGES)
        self.B_TRANSPOSED = gl.constexpr(B_TRANSPOSED)

    @gluon.jit
    def next(self, stage, phase):
        wraps = stage + 1 == self.STAGES
        return gl.where(wraps, 0, stage + 1), gl.where(wraps, phase ^ 1, phase)

    @gluon.jit
    def before(self, stage):
        # Computed, not carried from turn to turn of a loop: Triton 3.6 takes a variable that starts as
        # another's alias for a constant, and the kernel hangs.
        return gl.where(stage == 0, self.STAGES - 1, stage - 1)

    @gluon.jit
    def rows_of(self, LOWER: gl.constexpr):
        if LOWER:
            return self.lower
        else:
            return self.upper

    @gluon.jit
    def addend(self, stage, LOWER: gl.constexpr, SECOND: gl.constexpr):
        """Where a stage of addends holds one group's first or second chunk of 64 x 64."""
        layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
        dtype: gl.constexpr = self.upper.dtype
        group: gl.constexpr = 1 if LOWER else 0
        if self.TILE_N == 256:
            chunks = self.b.index(stage)._reinterpret(dtype, [4, _ROWS, _ROWS], layout)
            return chunks.index(2 * group + (1 if SECOND else 0))
        elif SECOND:
            return self.b.index(stage)._reinterpret(dtype, [2, _ROWS, _ROWS], layout).index(group)
        else:
            return self.rows_of(LOWER).index(stage)


@aggregate
class Epilogue:
    """What becomes of a sum: alpha (a b) + beta d + gamma e + diagonal I."""

    alpha: gl.tensor
    beta: gl.tensor
    gamma: gl.tensor
    diagonal: gl.tensor
    ADDENDS: gl.constexpr
    HAS_DIAGONAL: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, alpha, beta, gamma, diagonal, ADDENDS, HAS_DIAGONAL):
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma
        self.diagonal = diagonal
        self.ADDENDS = gl.constexpr(ADDENDS)
        self.HAS_DIAGONAL = gl.constexpr(HAS_DIAGONAL)

    @gluon.jit
    def of(self, sums, d, e, row, column, layout: gl.constexpr, dtype: gl.constexpr):
        """Of one chunk, (row, column) in units of 64, in float32; rounded once."""
        result = sums * self.alpha
        if self.ADDENDS >= 1:
            result += d.to(gl.float32) * self.beta
        if self.ADDENDS >= 2:
            result += e.to(gl.float32) * self.gamma
        if self.HAS_DIAGONAL:
            rows = row * _ROWS + gl.arange(0, _ROWS, gl.SliceLayout(1, layout))
            columns = column * _ROWS + gl.arange(0, _ROWS, gl.SliceLayout(0, layout))
            on_it = gl.expand_dims(rows, 1) == gl.expand_dims(columns, 0)
            result += gl.where(on_it, self.diagonal, 0.0)
        return result.to(dtype)


@aggregate
class Sources:
    """Where the warp that loads finds a tile's operands and addends: descriptors of the arrays.

    Attributes:
      BOX_N: columns of `b` that are fetched at one time.
    """

    a: tma.tensor_descriptor
    b: tma.tensor_descriptor
    d: tma.tensor_descriptor
    e: tma.tensor_descriptor
    ADDENDS: gl.constexpr
    BOX_N: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, a, b, d, e, ADDENDS, BOX_N):
        self.a = a
        self.b = b
        self.d = d
        self.e = e
        self.ADDENDS = gl.constexpr(ADDENDS)
        self.BOX_N = gl.constexpr(BOX_N)


@gluon.jit
def _load_tile(ring, sources, stage, phase, tile, k, HALF: gl.constexpr):
    """Fills the ring with one tile's operands and addends; returns the next place in it."""
    matrix, i, j = tile
    BOX_N: gl.constexpr = sources.BOX_N
    ADDENDS: gl.constexpr = sources.ADDENDS
    columns: gl.constexpr = BOX_N if HALF else ring.TILE_N
    row = i * (2 * _ROWS)
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    for start in range(0, k, _DEPTH):
        mbarrier.wait(ring.empty.index(stage), phase)
        bar = ring.full.index(stage)
        mbarrier.expect(bar, (2 * _ROWS + columns) * _DEPTH * 2)
        upper = ring.upper.index(stage).reshape([1, _ROWS, _DEPTH])
        lower = ring.lower.index(stage).reshape([1, _ROWS, _DEPTH])
        tma.async_copy_global_to_shared(sources.a, [matrix, row, start], bar, upper)
        tma.async_copy_global_to_shared(sources.a, [matrix, row + _ROWS, start], bar, lower)
        if ring.B_TRANSPOSED:
            boxes = ring.b.index(stage)._reinterpret(
                ring.b.dtype, [ring.TILE_N // BOX_N, BOX_N, _DEPTH], layout
            )
            for n in gl.static_range(columns // BOX_N):
                box = boxes.index(n).reshape([1, BOX_N, _DEPTH])
                column = j * ring.TILE_N + n * BOX_N
                tma.async_copy_global_to_shared(sources.b, [matrix, column, start], bar, box)
        else:
            box = ring.b.index(stage).reshape([1, _DEPTH, ring.TILE_N])
            column = j * ring.TILE_N
            tma.async_copy_global_to_shared(sources.b, [matrix, start, column], bar, box)
        stage, phase = ring.next(stage, phase)
    if ADDENDS > 0:
        # A stage holds two chunks of each group: of one addend side by side, or one of each addend.
        step: gl.constexpr = 2 * _ROWS if ADDENDS == 1 else _ROWS
        for n in gl.static_range(columns // step):
            mbarrier.wait(ring.empty.index(stage), phase)
            bar = ring.full.index(stage)
            mbarrier.expect(bar, 4 * _ROWS * _ROWS * 2)
            column = j * ring.TILE_N + n * step
            for group in gl.static_range(2):
                first = ring.addend(stage, group == 1, False).reshape([1, _ROWS, _ROWS])
                second = ring.addend(stage, group == 1, True).reshape([1, _ROWS, _ROWS])
                own = row + group * _ROWS
                tma.async_copy_global_to_shared(sources.d, [matrix, own, column], bar, first)
                if ADDENDS == 1:
                    beside = [matrix, own, column + _ROWS]
                    tma.async_copy_global_to_shared(sources.d, beside, bar, second)
                else:
                    tma.async_copy_global_to_shared(sources.e, [matrix, own, column], bar, second)
            stage, phase = ring.next(stage, phase)
    return stage, phase


@gluon.jit
def _load(ring, tiles, arrays, sizes, pitches, ADDENDS: gl.constexpr):
    """The warp that loads. It sets up its own descriptors while the others have to wait anyway."""
    a, b, d, e = arrays
    m, n, k = sizes
    pitch_a, pitch_b, pitch_c = pitches
    BOX_N: gl.constexpr = 128 if tiles.HALVES else ring.TILE_N
    tiles_of_a = _descriptor(a, tiles.count, m, k, pitch_a, [1, _ROWS, _DEPTH])
    if ring.B_TRANSPOSED:
        tiles_of_b = _descriptor(b, tiles.count, n, k, pitch_b, [1, BOX_N, _DEPTH])
    else:
        tiles_of_b = _descriptor(b, tiles.count, k, n, pitch_b, [1, _DEPTH, ring.TILE_N])
    tiles_of_d = tiles_of_a
    tiles_of_e = tiles_of_a
    if ADDENDS >= 1:
        tiles_of_d = _descriptor(d, tiles.count, m, n, pitch_c, [1, _ROWS, _ROWS])
    if ADDENDS >= 2:
        tiles_of_e = _descriptor(e, tiles.count, m, n, pitch_c, [1, _ROWS, _ROWS])
    sources = Sources(tiles_of_a, tiles_of_b, tiles_of_d, tiles_of_e, ADDENDS, BOX_N)
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    index = gl.program_id(0)
    whole = tiles.whole()
    while index < whole:
        stage, phase = _load_tile(ring, sources, stage, phase, tiles.at(index), k, False)
        index += gl.num_programs(0)
    if tiles.HALVES:
        index -= whole
        while index < tiles.halves():
            stage, phase = _load_tile(ring, sources, stage, phase, tiles.half_at(index), k, True)
            index += gl.num_programs(0)


@gluon.jit
def _descriptor(array, count, rows, columns, pitch, BOX: gl.constexpr):
    """Of a stack (count, rows, columns) with rows a pitch apart, to be moved by boxes."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=3)
    return tma.make_tensor_descriptor(
        array, [count, rows, columns], [rows * pitch, pitch, 1], BOX, layout
    )


@gluon.jit
def _multiply_tile(ring, sums, stage, phase, k, N: gl.constexpr, LOWER: gl.constexpr):
    """(64 rows of a times N columns of b, the next place). One product is always under way."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    rows = ring.rows_of(LOWER)
    for start in range(0, k, _DEPTH):
        mbarrier.wait(ring.full.index(stage), phase)
        columns = ring.b.index(stage)
        if ring.B_TRANSPOSED:
            if N != ring.TILE_N:
                boxes = columns._reinterpret(ring.b.dtype, [ring.TILE_N // N, N, _DEPTH], layout)
                columns = boxes.index(0)
            columns = columns.permute((1, 0))
        sums = warpgroup_mma(rows.index(stage), columns, sums, is_async=True, use_acc=start > 0)
        sums = warpgroup_mma_wait(1, deps=(sums,))
        mbarrier.arrive(ring.empty.index(ring.before(stage)), count=1, pred=start > 0)
        stage, phase = ring.next(stage, phase)
    sums = warpgroup_mma_wait(0, deps=(sums,))
    mbarrier.arrive(ring.empty.index(ring.before(stage)), count=1)
    return sums, stage, phase


@aggregate
class Results:
    """The way of one group's chunks to memory.

    Attributes:
      buffers: (SLOTS, 64, 64), used in turn. c: descriptor of the results.
    """

    buffers: gl.shared_memory_descriptor
    c: tma.tensor_descriptor
    SYMMETRIC: gl.constexpr
    LOWER: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, buffers, c, SYMMETRIC, LOWER):
        self.buffers = buffers
        self.c = c
        self.SYMMETRIC = gl.constexpr(SYMMETRIC)
        self.LOWER = gl.constexpr(LOWER)

    @gluon.jit
    def store(self, chunk, matrix, row, column, turn: gl.constexpr, layout: gl.constexpr):
        """Writes one chunk, (row, column) in units of 64, and of a symmetric result its mirror image.

        turn: the place of the chunk among its tile's.
        """
        SLOTS: gl.constexpr = self.buffers.shape[0]
        at = [matrix, row * _ROWS, column * _ROWS]
        if self.SYMMETRIC:
            # A chunk above the diagonal is its mirror image's to write.
            if row >= column:
                own = self.buffers.index((2 * turn) % SLOTS)
                mirror = self.buffers.index((2 * turn + 1) % SLOTS)
                tma.store_wait(SLOTS - 2)
                if row == column:
                    # The lower triangle decides, so that the result is symmetric to the bit.
                    own.store(chunk)
                    turned = own.permute((1, 0)).load(layout)
                    i = gl.expand_dims(gl.arange(0, _ROWS, gl.SliceLayout(1, layout)), 1)
                    j = gl.expand_dims(gl.arange(0, _ROWS, gl.SliceLayout(0, layout)), 0)
                    chunk = gl.where(i >= j, chunk, turned)
                own.store(chunk)
                mirror.permute((1, 0)).store(chunk)
                fence_async_shared()
                across = [matrix, column * _ROWS, row * _ROWS]
                tma.async_copy_shared_to_global(self.c, at, own.reshape([1, _ROWS, _ROWS]))
                tma.async_copy_shared_to_global(self.c, across, mirror.reshape([1, _ROWS, _ROWS]))
        else:
            own = self.buffers.index(turn % SLOTS)
            tma.store_wait(SLOTS - 1)
            own.store(chunk)
            fence_async_shared()
            tma.async_copy_shared_to_global(self.c, at, own.reshape([1, _ROWS, _ROWS]))


@gluon.jit
def _take_addends(ring, stage, phase, LOWER: gl.constexpr, layout: gl.constexpr):
    """(first chunk, second chunk, the next place): read at once, and the stage handed back."""
    mbarrier.wait(ring.full.index(stage), phase)
    first = ring.addend(stage, LOWER, False).load(layout)
    second = ring.addend(stage, LOWER, True).load(layout)
    fence_async_shared()
    mbarrier.arrive(ring.empty.index(stage), count=1)
    stage, phase = ring.next(stage, phase)
    return first, second, stage, phase


@gluon.jit
def _finish(sums, ring, epilogue, results, stage, phase, matrix, row, column, turn: gl.constexpr):
    """The epilogue of two neighbouring chunks, (64, 128) sums; returns the next place in the ring."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    dtype: gl.constexpr = ring.upper.dtype
    LOWER: gl.constexpr = results.LOWER
    left, right = _split(sums, layout)
    left_d = left
    left_e = left
    right_d = right
    right_e = right
    if epilogue.ADDENDS == 1:
        left_d, right_d, stage, phase = _take_addends(ring, stage, phase, LOWER, layout)
    elif epilogue.ADDENDS == 2:
        left_d, left_e, stage, phase = _take_addends(ring, stage, phase, LOWER, layout)
    chunk = epilogue.of(left, left_d, left_e, row, column, layout, dtype)
    results.store(chunk, matrix, row, column, turn, layout)
    if epilogue.ADDENDS == 2:
        right_d, right_e, stage, phase = _take_addends(ring, stage, phase, LOWER, layout)
    chunk = epilogue.of(right, right_d, right_e, row, column + 1, layout, dtype)
    results.store(chunk, matrix, row, column + 1, turn + 1, layout)
    return stage, phase


@gluon.jit
def _split(x, layout: gl.constexpr):
    """The left and the right half."""
    half: gl.constexpr = x.shape[1] // 2
    left, right = x.reshape(x.shape[0], 2, half).permute(0, 2, 1).split()
    return gl.convert_layout(left, layout, True), gl.convert_layout(right, layout, True)


@gluon.jit
def _multiply(ring, tiles, epilogue, buffers, c, sizes, pitch_c, LOWER: gl.constexpr):
    """A group of warps that multiplies: the upper or the lower 64 rows of every tile."""
    m, n, k = sizes
    whole: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ring.TILE_N, 16])
    half: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    blocks: gl.constexpr = ring.TILE_N // _ROWS
    group: gl.constexpr = 1 if LOWER else 0
    tiles_of_c = _descriptor(c, tiles.count, m, n, pitch_c, [1, _ROWS, _ROWS])
    out = Results(buffers, tiles_of_c, tiles.SYMMETRIC, LOWER)
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    index = gl.program_id(0)
    last = tiles.whole()
    while index < last:
        matrix, i, j = tiles.at(index)
        row, column = 2 * i + group, blocks * j
        sums = gl.zeros((_ROWS, ring.TILE_N), gl.float32, whole)
        sums, stage, phase = _multiply_tile(ring, sums, stage, phase, k, ring.TILE_N, LOWER)
        if ring.TILE_N == 256:
            near, far = _split(sums, half)
            stage, phase = _finish(near, ring, epilogue, out, stage, phase, matrix, row, column, 0)
            column += 2
            stage, phase = _finish(far, ring, epilogue, out, stage, phase, matrix, row, column, 2)
        else:
            stage, phase = _finish(sums, ring, epilogue, out, stage, phase, matrix, row, column, 0)
        index += gl.num_programs(0)
    if tiles.HALVES:
        # A loop of its own: as a branch of the other one it would take the registers of both sums, and
        # ptxas would serialise the products (its warning C7511).
        index -= last
        while index < tiles.halves():
            matrix, i, j = tiles.half_at(index)
            row, column = 2 * i + group, blocks * j
            sums = gl.zeros((_ROWS, 128), gl.float32, half)
            sums, stage, phase = _multiply_tile(ring, sums, stage, phase, k, 128, LOWER)
            stage, phase = _finish(sums, ring, epilogue, out, stage, phase, matrix, row, column, 0)
            index += gl.num_programs(0)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["count", "m", "n", "k", "pitch_a", "pitch_b", "pitch_c"])
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
    m,
    n,
    k,
    pitch_a,
    pitch_b,
    pitch_c,
    c,
    B_TRANSPOSED: gl.constexpr,
    SYMMETRIC: gl.constexpr,
    ADDENDS: gl.constexpr,
    HAS_DIAGONAL: gl.constexpr,
    TILE_N: gl.constexpr,
    STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """c = alpha a b + beta d + gamma e + diagonal I, for each of `count` matrices, as `source.product`.

    Float16 or bfloat16, four warps. The grid is a program for each multiprocessor, or fewer.

    a: (count, m, k). b: (count, k, n), or (count, n, k) if B_TRANSPOSED. c, d, e: (count, m, n). Rows
    are a pitch apart. TILE_N: 128 or 256. STAGES: of the ring. SLOTS: buffers of 64 x 64 through which
    each group's results leave.
    """
    HALVES: gl.constexpr = SYMMETRIC and TILE_N == 256
    gl.static_assert(B_TRANSPOSED or not SYMMETRIC, "a symmetric product reads b by rows")
    dtype: gl.constexpr = a.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    if B_TRANSPOSED:
        columns = gl.allocate_shared_memory(dtype, [STAGES, TILE_N, _DEPTH], layout)
    else:
        columns = gl.allocate_shared_memory(dtype, [STAGES, _DEPTH, TILE_N], layout)
    upper = gl.allocate_shared_memory(dtype, [STAGES, _ROWS, _DEPTH], layout)
    lower = gl.allocate_shared_memory(dtype, [STAGES, _ROWS, _DEPTH], layout)
    upper_out = gl.allocate_shared_memory(dtype, [SLOTS, _ROWS, _ROWS], layout)
    lower_out = gl.allocate_shared_memory(dtype, [SLOTS, _ROWS, _ROWS], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    ring = Ring(upper, lower, columns, full, empty, TILE_N, STAGES, B_TRANSPOSED)
    width: gl.constexpr = TILE_N // (2 * _ROWS)
    rows = (gl.to_tensor(m) + (2 * _ROWS - 1)) // (2 * _ROWS)
    across = (gl.to_tensor(n) + (TILE_N - 1)) // TILE_N
    tiles = Tiles(gl.to_tensor(count), rows, across, width, SYMMETRIC, HALVES)
    epilogue = Epilogue(
        gl.to_tensor(alpha),
        gl.to_tensor(beta),
        gl.to_tensor(gamma),
        gl.to_tensor(diagonal),
        ADDENDS,
        HAS_DIAGONAL,
    )
    sizes = (m, n, k)
    gl.warp_specialize(
        [
            (_multiply, (ring, tiles, epilogue, upper_out, c, sizes, pitch_c, False)),
            (_multiply, (ring, tiles, epilogue, lower_out, c, sizes, pitch_c, True)),
            (_load, (ring, tiles, (a, b, d, e), sizes, (pitch_a, pitch_b, pitch_c), ADDENDS)),
        ],
        [4, 1],
        [_MULTIPLYING_REGISTERS, _LOADING_REGISTERS],
    )
