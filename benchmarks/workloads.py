"""What is timed: stacks of matrices, and the matrices of two models."""

from collections.abc import Iterator, Sequence

from normuon_core import MatrixLayout

Stack = tuple[int, int, int]
"""(count, rows, columns) of matrices."""

OUT_IN = MatrixLayout(reduction_axis=-1, output_axis=-2)
RATE = 0.02
DECAY = 0.1
"""Layout, learning rate and weight decay of every step."""

SHAPES = [
    (12, 768, 3072),
    (48, 768, 768),
    (24, 1024, 4096),
    (16, 2048, 2048),
    (16, 2048, 8192),
    (4, 4096, 4096),
    (4, 4096, 14336),
    (1, 8192, 8192),
]
"""Of orthogonalizations."""

NEAR_SQUARE = [
    *((48, 768, 768), (48, 768, 960), (48, 768, 1152), (24, 768, 1536)),
    *((16, 2048, 2048), (16, 2048, 2304), (16, 2048, 2560), (16, 2048, 4096)),
    *((4, 4096, 4096), (4, 4096, 4608), (4, 4096, 5120)),
]
"""Where the two forms of the iteration take about as long."""

FOR_POLYNOMIALS = [(12, 768, 3072), (32, 1024, 1024), (16, 2048, 8192)]
"""Of sets of polynomials: wide and square, small and large."""

MODELS = {
    "GPT-2 124M": [(48, 768, 768), (12, 3072, 768), (12, 768, 3072)],
    "1B Llama": [(32, 2048, 2048), (32, 512, 2048), (32, 8192, 2048), (16, 2048, 8192)],
}
"""The same of whole steps; every matrix is a leaf of its own, float32, stored (out, in)."""

MESH = ("1B Llama", MODELS["1B Llama"])
QUICK_MESH = ("tiny", [(2, 32, 64), (2, 64, 32)])
"""The matrices of steps on meshes."""

QUICK_SHAPES = [(2, 24, 64), (2, 32, 32)]
QUICK_MODELS = {"tiny": [(2, 24, 16), (1, 16, 40)]}

LAYERS = 128
LAYER = [(256, 256), (64, 256), (1024, 256), (256, 1024)]
"""For the time of compilation: layers that are not stacked, each of four matrices."""


def matrix_sizes(shapes: Sequence[Stack]) -> Iterator[tuple[int, int]]:
    """(rows, columns) of every matrix."""
    for count, rows, columns in shapes:
        yield from [(rows, columns)] * count
