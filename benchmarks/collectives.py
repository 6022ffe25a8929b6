"""The collectives of a compiled program, and what a device sends in them, read from its HLO text."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

SENT = {
    "all-to-all": lambda n: (n - 1) / n,
    "all-gather": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1 if n > 1 else 0,
}
"""Bytes that one of n devices sends over those of its operand; the reductions by a ring."""

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\((?:[^()]|\([^()]*\))*\))?(?: \{([^}]*)\})?")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: of `SENT`. devices: how many make it together.
      operand_bytes: of one device's operands.
      in_loop: whether it stands within a while loop. runs: how often it is made; a loop whose number
        of rounds the compiler does not know counts as one round.
    """

    kind: str
    devices: int
    operand_bytes: int
    in_loop: bool = False
    runs: int = 1

    @property
    def sent(self) -> float:
        """Bytes by one device, in all runs."""
        return self.runs * SENT[self.kind](self.devices) * self.operand_bytes


@dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    rest: str


def collectives(hlo: str, devices: int) -> list[Collective]:
    """All that the program makes from its entry on, asynchronous ones once.

    Args:
      hlo: `jax.stages.Compiled.as_text()`. devices: of the program, for collectives of all of them.

    Raises:
      ValueError: a notation of groups of devices that is not known.
    """
    computations, entry = _computations(hlo)
    # Names are unique in a module.
    shapes = {each.name: each.shape for body in computations.values() for each in body}
    return list(_made(entry, computations, shapes, devices, in_loop=False, runs=1))


def bytes_bound(entries: int, devices: int) -> float:
    """What a device sends at least: its part of the matrices in bfloat16, to their owners and back.

    4 (P/W) (W-1)/W for P entries on W devices.
    """
    return 4 * entries / devices * (devices - 1) / devices


def by_kind(found: Iterable[Collective]) -> dict[str, dict[str, float]]:
    """For each kind: "count" in the text, "in loops" of these, "runs", and "sent", bytes by a device."""
    result: dict[str, dict[str, float]] = defaultdict(
        lambda: {"count": 0, "in loops": 0, "runs": 0, "sent": 0.0}
    )
    for each in found:
        row = result[each.kind]
        row["count"] += 1
        row["in loops"] += each.in_loop
        row["runs"] += each.runs
        row["sent"] += each.sent
    return dict(sorted(result.items()))


def _computations(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Each computation's instructions, and the name of the entry."""
    found: dict[str, list[_Instruction]] = {}
    entry, body = "", []
    for line in hlo.splitlines():
        if head := _COMPUTATION.match(line):
            body = found[head[1]] = []
            entry = head[1] if line.startswith("ENTRY") else entry
        elif instruction := _INSTRUCTION.match(line):
            body.append(_Instruction(*instruction.groups()))
    if not entry:
        raise ValueError("no ENTRY computation: this is no text of a compiled program.")
    return found, entry


def _made(
    computation: str,
    computations: Mapping[str, list[_Instruction]],
    shapes: Mapping[str, str],
    devices: int,
    *,
    in_loop: bool,
    runs: int,
) -> Iterator[Collective]:
    for each in computations[computation]:
        # The end of what another instruction has begun and names again.
        if each.opcode.endswith(("-done", "-update")):
            continue
        kind = each.opcode.removesuffix("-start")
        if kind in SENT:
            operands = re.findall(r"%([\w.\-]+)", each.rest.split(")")[0])
            size = sum(_bytes_of(shapes[name]) for name in operands)
            yield Collective(kind, _group_size(each.rest, devices), size, in_loop, runs)
            continue
        loop = each.opcode == "while"
        trips = _TRIPS.search(each.rest) if loop else None
        for called in re.findall(r"%([\w.\-]+)", each.rest):
            if called in computations:
                yield from _made(
                    called,
                    computations,
                    shapes,
                    devices,
                    in_loop=in_loop or loop,
                    runs=runs * (int(trips[1]) if trips else 1),
                )


def _bytes_of(shape: str) -> int:
    """Of an array, or of all arrays of a tuple."""
    total = 0
    for name, bits, sides in _ARRAY.findall(shape):
        entries = math.prod(int(side) for side in sides.split(",") if side)
        total += entries * (8 if name == "pred" else int(bits)) // 8
    return total


def _group_size(rest: str, devices: int) -> int:
    _, given, groups = rest.partition("replica_groups=")
    if not given or groups.startswith("{}"):
        return devices
    if listed := re.match(r"\{\{([\d,]+)\}", groups):
        return len(listed[1].split(","))
    if counted := re.match(r"\[(\d+),(\d+)\]<=", groups):
        return int(counted[2])
    if mesh := _MESH.match(groups):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        # 'axis':(before)size is a part of an axis.
        named = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2] or mesh[1])
        return math.prod(int(part or sizes[name]) for name, part in named)
    raise ValueError(f"replica_groups={groups[:40]}: an unknown notation of groups of devices.")
