"""The iteration of a stack by the product kernel."""

from collections.abc import Sequence
from dataclasses import dataclass

from normuon_core.cost import Form
from normuon_core.kernels import launches
from normuon_core.kernels.geometry import Geometry
from normuon_core.kernels.launches import Launcher
from normuon_core.kernels.pieces import Array
from normuon_core.kernels.tiles import has_gluon, product_configuration
from normuon_core.polar_iteration import iterate, range_scales
from normuon_core.polynomials import Coefficients


@dataclass(frozen=True)
class Device:
    """What launches need to know of a GPU.

    Attributes:
      interpreted: whether Triton's interpreter runs the kernels in its place.
    """

    architecture: str
    multiprocessors: int
    interpreted: bool = False

    @property
    def takes_hopper_kernels(self) -> bool:
        """Whether kernels that are written for this architecture alone run here."""
        return self.architecture == "sm90" and not self.interpreted and has_gluon()


@dataclass(frozen=True)
class KernelProducts:
    """`Products` from the product kernel, on a stack that is wide: (count, short, long)."""

    launch: Launcher
    device: Device
    count: int
    short: int
    long: int
    dtype: str

    def gram(self, x, *, alpha):
        return self._product(x, x, (self.short, self.short, self.long), alpha=alpha, turned=True)

    def multiply(self, s, t, *, alpha, addends=(), diagonal=0.0):
        sides = (self.short, self.short, self.short)
        # t is symmetric: read by rows, as s is.
        return self._product(
            s, t, sides, alpha=alpha, addends=addends, diagonal=diagonal, turned=True
        )

    def apply(self, s, x, *, alpha, addend=0.0):
        sides = (self.short, self.long, self.short)
        addends = [(x, addend)] if addend else []
        return self._product(s, x, sides, alpha=alpha, addends=addends, symmetric=False)

    def _product(
        self,
        a,
        b,
        sides,
        *,
        alpha,
        addends: Sequence[tuple[Array, float]] = (),
        diagonal=0.0,
        turned=False,
        symmetric=True,
    ):
        launch = launches.product(
            self.count,
            *sides,
            dtype=self.dtype,
            configuration=product_configuration(
                *sides,
                dtype=self.dtype,
                symmetric=symmetric,
                architecture=self.device.architecture,
                hopper=self.device.takes_hopper_kernels,
            ),
            multiprocessors=self.device.multiprocessors,
            b_transposed=turned,
            symmetric=symmetric,
            addends=len(addends),
            has_diagonal=diagonal != 0.0,
        )
        arrays = [array for array, _ in addends] + [a] * (2 - len(addends))
        factors = [factor for _, factor in addends] + [0.0] * (2 - len(addends))
        (result,) = self.launch(launch, [a, b, *arrays, alpha, *factors, diagonal, self.count])
        return result


def iterate_stack(
    launch: Launcher,
    device: Device,
    x,
    coefficients: Coefficients,
    *,
    geometry: Geometry,
    count: int,
    form: Form,
    dtype: str,
):
    """The iteration on a stack of whole matrices, (count, short, padded long), normalised and scaled."""
    check_products(device, dtype, geometry.whole)
    short, long = geometry.whole
    return iterate(
        x,
        coefficients,
        KernelProducts(launch, device, count, short, long, dtype),
        algorithm=form,
        short=short,
        scales=range_scales(short, long, dtype),
    )


def check_products(device: Device, dtype: str, sides: tuple[int, int]) -> None:
    """Raises a ValueError for bfloat16 under Triton's interpreter, which multiplies the bit patterns."""
    if device.interpreted and dtype == "bfloat16":
        raise ValueError(
            f"matrices of {sides[0]} x {sides[1]} are multiplied in bfloat16 here, which Triton's"
            " interpreter (TRITON_INTERPRET=1) computes wrongly; give compute_dtype float32 or float16,"
            " or run the kernels on a CUDA device."
        )
