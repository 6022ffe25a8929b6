"""Results kept by GPU: those of several stand side by side, and a run replaces only its own parts."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.race import Race
from benchmarks.ratios import Measured
from benchmarks.rows import Row


@dataclass
class Part:
    """One table of results.

    Attributes:
      title: of the table. base: what its times are divided by, in words. machine: versions, rates and
        the state of the GPU. rows: the table. ratios: of contestants in one race. order: of the turns
        of every round, by race. clocks: (least, median, largest) while they ran, by race.
    """

    title: str
    base: str
    machine: dict[str, str | float]
    rows: list[Row]
    ratios: list[Measured]
    order: dict[str, list[list[str]]]
    clocks: dict[str, dict[str, Sequence[float]]]

    @classmethod
    def of(
        cls,
        title: str,
        base: str,
        machine: dict[str, str | float],
        races: Sequence[Race],
        ratios: Sequence[Measured],
    ) -> "Part":
        return cls(
            title,
            base,
            machine,
            [row for race in races for row in race.rows],
            list(ratios),
            {race.name: race.order for race in races if race.order},
            {race.name: dict(race.clocks) for race in races if race.clocks},
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "base": self.base,
            "machine": self.machine,
            "rows": [row.as_dict() for row in self.rows],
            "ratios": [each.as_dict() for each in self.ratios],
            "order": {
                name: [" | ".join(turns) for turns in each] for name, each in self.order.items()
            },
            "clocks": self.clocks,
        }

    @classmethod
    def from_dict(cls, title: str, found: dict[str, Any]) -> "Part":
        return cls(
            title,
            found["base"],
            found["machine"],
            [Row.from_dict(each) for each in found["rows"]],
            [
                Measured(**{**each, "quartiles": tuple(each["quartiles"])})
                for each in found["ratios"]
            ],
            {name: [turns.split(" | ") for turns in each] for name, each in found["order"].items()},
            found["clocks"],
        )


Card = dict[str, Part]
"""The parts measured on one GPU, by title."""


def file_of(folder: Path, device: str) -> Path:
    """As folder/cards/nvidia-h100-80gb-hbm3.json."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return folder / "cards" / f"{name}.json"


def load(folder: Path) -> dict[str, Card]:
    """Every GPU's results in the folder, by its name."""
    found = {}
    for path in sorted((folder / "cards").glob("*.json")):
        result = json.loads(path.read_text())
        found[result["device"]] = {
            title: Part.from_dict(title, part) for title, part in result["parts"].items()
        }
    return found


def save(folder: Path, device: str, card: Card) -> None:
    """Writes one GPU's file."""
    path = file_of(folder, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = {title: part.as_dict() for title, part in card.items()}
    path.write_text(json.dumps({"device": device, "parts": parts}, indent=1) + "\n")
