"""A sharded step on paper: more devices than were measured, at rates that were.

Matrices are placed as the optimizer places them, and those of several shapes are dealt to the devices
as it deals them. A device's time is its own operations, memory traffic and collectives one after the
other, as if none hid another.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.arithmetic import BYTES_A_PARAMETER
from normuon_core.cost import Iteration
from normuon_core.deal import Deal, Uneven, waves
from normuon_core.kernels.geometry import bytes_a_matrix
from normuon_core.placement import Placement, Spread, place
from normuon_core.recipes import find_recipe

Stack = tuple[int, int, int]

LLAMAS: Mapping[str, Sequence[Stack]] = {
    "Llama 3 8B": [
        (64, 4096, 4096),
        (64, 1024, 4096),
        (64, 14336, 4096),
        (32, 4096, 14336),
    ],
    "Llama 3 70B": [
        (160, 8192, 8192),
        (160, 1024, 8192),
        (160, 28672, 8192),
        (80, 8192, 28672),
    ],
}
"""(count, rows, columns), stored (out, in): queries and outputs; keys and values; gate and up; down.

Table 3 of arXiv 2407.21783: 32 layers, model 4096, feed-forward 14336, and 80, 8192, 28672; both have 8
key and value heads of 128. Embeddings and head are AdamW's."""

DEVICES = (64, 1024)

STACK_BYTES, ENTRY_BYTES = 2**30, 2
"""A stack's ceiling by default, and the bytes of an entry in the compute dtype."""

ALL_TO_ALLS = 4
"""Of a stack: matrices and second moments, there and back."""


@dataclass(frozen=True)
class PaperRates:
    """What a device does in a second.

    Attributes:
      products, copies: as in `arithmetic.Rates`. share: of these that a whole step on one device
        reached. within: bytes that a device sends in an all-to-all on one host. start: seconds that
        a small one takes.
      between: bytes that a device sends to other hosts. message: seconds for each message to another
        host. devices_a_host: these three are assumed, not measured.
    """

    products: float
    copies: float
    share: float
    within: float
    start: float
    between: float = 50e9
    message: float = 2e-6
    devices_a_host: int = 8

    def assumptions(self) -> str:
        return (
            f"assumed: {self.devices_a_host} devices a host, {self.between / 1e9:.0f} GB/s a device"
            f" between hosts, {self.message * 1e6:.0f} µs for each message to another host"
        )


@dataclass(frozen=True)
class GroupOnPaper:
    """The matrices of one shape.

    Attributes:
      spread, placement: as the optimizer has them. stacks: one after the other.
      message_bytes: of one device to another in one all-to-all.
      products, wire, messages: seconds on the device that has most.
    """

    spread: Spread
    placement: Placement
    stacks: int
    message_bytes: float
    products: float
    wire: float
    messages: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class StepOnPaper:
    """A step of a model.

    Attributes:
      even: seconds of products if these were shared evenly.
      spared: seconds of products that the busiest device is spared by the deal: without it the first
        owner has the most of every shape.
      memory: seconds of its traffic.
    """

    model: str
    devices: int
    groups: list[GroupOnPaper]
    even: float
    spared: float
    memory: float

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by what takes them, on the device that has most to do."""
        return {
            "products": self.undealt - self.spared,
            "memory": self.memory,
            "wire": sum(group.wire for group in self.groups),
            "messages": sum(group.messages for group in self.groups),
        }

    @property
    def undealt(self) -> float:
        """Seconds of products on a device that has the most of every shape."""
        return sum(group.products for group in self.groups)

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def unevenness(self) -> float:
        """The products of the device that has most over an even share of all."""
        return self.parts["products"] / self.even

    @property
    def limit(self) -> str:
        """What takes most of the step, in one sentence."""
        name, most = max(self.parts.items(), key=lambda part: part[1])
        reason = self._products if name == "products" else self._others[name]
        return f"{self.model} on {self.devices}: {most / self.seconds:.0%} of the step is {reason}."

    @property
    def _products(self) -> str:
        over = f"{self.unevenness:.2f} times an even share"
        matrices = sum(group.spread.count for group in self.groups)
        if matrices < self.devices:
            return (
                f"whole matrices, {matrices} in all: the busiest device orthogonalizes the longest of"
                f" them, {over} of the products, and more devices would not be faster"
            )
        if self.unevenness > 1.1:
            return f"products, {over}: some devices have a matrix more than others"
        return "products, evenly shared: more devices would be faster"

    @property
    def _others(self) -> Mapping[str, str]:
        smallest = min(group.message_bytes for group in self.groups)
        return {
            "memory": "traffic of each device's own memory: more devices would be faster",
            "wire": "bytes on the wire, at the rate of the slowest link",
            "messages": f"the number of messages, {smallest / 1e3:.0f} kB the smallest",
        }

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "devices": self.devices,
            "milliseconds": 1e3 * self.seconds,
            "milliseconds by part": {name: 1e3 * part for name, part in self.parts.items()},
            "products without the deal, milliseconds": 1e3 * self.undealt,
            "unevenness": self.unevenness,
            "limit": self.limit,
            "groups": [group.as_dict() for group in self.groups],
        }


def step_on_paper(
    model: str, shapes: Sequence[Stack], devices: int, rates: PaperRates
) -> StepOnPaper:
    """Every matrix float32, divided along its rows over all devices; the recipe "normuon" on GPUs."""
    rate = rates.products * rates.share
    groups = [_group(Spread(*shape, row_parts=devices), devices, rates) for shape in shapes]
    alone = sum(_placed(Spread(*shape)).operations for shape in shapes)
    parameters = sum(count * rows * columns for count, rows, columns in shapes)
    memory = BYTES_A_PARAMETER * parameters / devices / (rates.copies * rates.share)
    return StepOnPaper(
        model, devices, groups, alone / devices / rate, _spared(groups, devices) / rate, memory
    )


def _spared(groups: Sequence[GroupOnPaper], devices: int) -> float:
    """Operations of the busiest device that the deal of the groups' last stacks saves it."""
    stacks = [_last_stack(group) for group in groups if group.placement.strategy == "owners"]
    uneven = [stack for stack in stacks if not stack.deal.is_even]
    return sum(
        sum(uneven[i].longest for i in wave.members) - wave.busiest
        for wave in waves(uneven, devices=devices, ceiling=STACK_BYTES)
    )


def _last_stack(group: GroupOnPaper) -> Uneven:
    """The only stack of a group that its owners may not divide evenly; every device is an owner."""
    placement, spread = group.placement, group.spread
    each = placement.each // group.stacks
    deal = Deal(spread.count - (placement.each - each) * placement.owners, placement.owners)
    waiting = ENTRY_BYTES * deal.each * spread.rows * spread.columns
    return Uneven(deal, placement.time_a_matrix, waiting, np.arange(placement.owners))


def _placed(spread: Spread) -> Placement:
    steps = len(find_recipe("normuon").polar.coefficients)
    return place(spread, Iteration(steps), may_stay=True)


def _group(spread: Spread, devices: int, rates: PaperRates) -> GroupOnPaper:
    placement = _placed(spread)
    assert placement.dtype is not None
    matrix_bytes = bytes_a_matrix((spread.short, spread.long), placement.dtype)
    stacks = math.ceil(placement.each / max(1, STACK_BYTES // matrix_bytes))
    outside = max(0, devices - rates.devices_a_host)
    # To every other device as much: both ways at once, the slower one counts.
    each_peer = placement.bytes_sent / max(1, devices - 1)
    wire = max(
        (devices - 1 - outside) * each_peer / rates.within, outside * each_peer / rates.between
    )
    return GroupOnPaper(
        spread,
        placement,
        stacks,
        message_bytes=each_peer / (2 * stacks),
        products=placement.operations / (rates.products * rates.share),
        wire=wire,
        messages=ALL_TO_ALLS * stacks * (rates.start + outside * rates.message)
        if devices > 1
        else 0.0,
    )
