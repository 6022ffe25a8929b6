"""Table and picture of the study of spheres, from the rows that are there."""

import statistics
from collections.abc import Sequence

import numpy as np

from studies.intervals import Interval, interval
from studies.ledger import Row
from studies.options import Options
from studies.page import MISSING, write_page
from studies.pictures import COLORS, panels, save
from studies.sphere.arms import FROZEN, GEODESIC, ORDER, PROJECTION, RETRACTION, SWEPT
from studies.sphere.plan import LAZY, NEVER, PUBLISHED, Comparisons
from studies.tables import markdown
from studies.trial import Trial, written

PAIRS = (
    (GEODESIC, PROJECTION),
    (RETRACTION, PROJECTION),
    ("geodesic, angle = rate", PROJECTION),
    ("hyperball (MuonH)", PROJECTION),
    ("+ second moment", PROJECTION),
    ("hyperball (NorMuonH)", "hyperball (MuonH)"),
    ("+ cautious decay", PROJECTION),
    ("+ both", PROJECTION),
    ("cubic, equal RMS", "Polar Express, equal RMS"),
    ("Adam", PROJECTION),
    (FROZEN, PROJECTION),
)
"""Differences that are tabled: (arm, what it is compared with)."""

DRAWN = 9
"""So many of them; the last two are larger by far."""


def write_report(options: Options, plan: Comparisons) -> None:
    """Writes `sphere.md` and `sphere.png` (with `_small` in the small form)."""
    report = Report(plan)
    write_page(options, "sphere", f"nGPT, {plan.size.setup}", plan.lab.ledger, report.sections())
    report.draw(options.file("sphere", "png"))


class Report:
    """What the rows say."""

    def __init__(self, plan: Comparisons):
        self._plan, self._ledger = plan, plan.lab.ledger
        self.finals = {arm: self._rows(plan.finals(arm)) for arm in ORDER}

    def sections(self) -> list[str]:
        """Paragraphs and tables."""
        size = self._plan.size
        return [
            f"Losses are nats a byte on held-out text; intervals are 95 %, over {size.seeds} paired"
            " seeds. Drift is the mean distance of the matrices' slices from norm 1.\n",
            self._arms(),
            "## Differences of the final loss\n",
            "Each arm with the values that its own tuning found.\n",
            self._differences(),
            "With the values that were found for projection:\n",
            self._at_projections_values(),
            "## Lazy projection\n",
            self._lazy(),
            "## A rule without a tangent\n",
            "With projection's values; u is the direction of ascent.\n",
            self._published(),
            "## Rates\n",
            f"Final loss, mean of {size.tuning_seeds} seeds of tuning.\n",
            self._sweeps(),
        ]

    def draw(self, path) -> None:
        figure, (left, right) = panels(2)
        for color, arm in zip(COLORS, SWEPT, strict=False):
            if found := self._swept(arm):
                left.plot(list(found), list(found.values()), marker="o", color=color, label=arm)
        left.set(xscale="log", xlabel="peak rate", ylabel="held-out loss, nats a byte")
        if left.lines:
            left.legend(frameon=False)
        pairs = [pair for pair in PAIRS[:DRAWN] if self._difference(*pair)]
        for place, pair in enumerate(reversed(pairs)):
            found = self._difference(*pair)
            assert found is not None
            right.errorbar(found.mean, place, xerr=found.half, fmt="o", color=COLORS[0])
        right.axvline(0.0, color="0.7", linewidth=1)
        right.set_yticks(range(len(pairs)), [f"{a} −\n{b}" for a, b in reversed(pairs)])
        right.set(xlabel="difference of the final loss")
        save(figure, path)

    def _rows(self, trials: Sequence[Trial]) -> list[Row]:
        """In their order; none unless all are there."""
        if not all(trial in self._ledger for trial in trials):
            return []
        return [self._ledger[trial] for trial in trials]

    def _arms(self) -> str:
        headings = ["arm", "final loss", "drift", "ms a step"]
        headings += ["rate", "Adam beside", "decay", "trials", "best inside"]
        return markdown(headings, [self._arm(arm) for arm in ORDER])

    def _arm(self, arm: str) -> list[str]:
        found = self._plan.tuning.so_far(arm)
        names = ("rate", "adam_rate", "decay")
        tuned = [written(found.values[n]) if n in found.values else "" for n in names]
        tuned += [str(len(found.losses)), "yes" if found.inside else "no"]
        rows = self.finals[arm]
        if not rows:
            return [arm, *[MISSING] * 3, *tuned]
        loss = interval([row.final["loss"] for row in rows])
        steps = self._plan.size.setup.steps
        return [
            arm,
            f"{loss.mean:.4f} ± {loss.half:.4f}",
            _drift(rows),
            f"{statistics.median(1e3 * row.seconds / steps for row in rows):.2f}",
            *tuned,
        ]

    def _difference(self, arm: str, other: str) -> Interval | None:
        return _difference(self.finals[arm], self.finals[other])

    def _differences(self) -> str:
        lines = [_line(f"{a} − {b}", self._difference(a, b)) for a, b in PAIRS]
        return markdown(["pair", "difference", "says"], lines)

    def _at_projections_values(self) -> str:
        lines = []
        for arm in (GEODESIC, RETRACTION):
            rows = self._rows(self._plan.at_projections_values(arm))
            lines.append(_line(f"{arm} − {PROJECTION}", _difference(rows, self.finals[PROJECTION])))
        return markdown(["pair", "difference", "says"], lines)

    def _lazy(self) -> str:
        lines = []
        for every in LAZY[1:]:
            rows = self._rows(self._plan.lazy(every))
            line = _line(str(every), _difference(rows, self.finals[PROJECTION]))
            lines.append([*line, _drift(rows)])
        return markdown(["steps between", "difference to 1", "says", "drift"], lines)

    def _published(self) -> str:
        lines = []
        for arm, every in PUBLISHED:
            rows = self._rows(self._plan.by_the_published_rule(arm, every))
            name = f"{arm}, {'never projected' if every == NEVER else f'projected every {every}'}"
            line = _line(name, _difference(rows, self.finals[PROJECTION]))
            lines.append([*line, _drift(rows)])
        return markdown(["rule", f"difference to {PROJECTION}", "says", "drift"], lines)

    def _sweeps(self) -> str:
        found = {arm: self._swept(arm) for arm in SWEPT}
        rates = sorted({rate for own in found.values() for rate in own})
        if not rates:
            return MISSING + "\n"
        lines = [
            [arm, *(f"{own[rate]:.4f}" if rate in own else "" for rate in rates)]
            for arm, own in found.items()
        ]
        return markdown(["arm", *map(written, rates)], lines)

    def _swept(self, arm: str) -> dict[float, float]:
        return {
            rate: float(np.mean([self._ledger[trial].final["loss"] for trial in trials]))
            for rate, trials in self._plan.swept(arm).items()
        }


def _difference(rows: Sequence[Row], others: Sequence[Row]) -> Interval | None:
    """Paired by seed; None where one of the two was not run."""
    if not rows or not others:
        return None
    paired = zip(rows, others, strict=True)
    return interval([row.final["loss"] - other.final["loss"] for row, other in paired])


def _line(name: str, found: Interval | None) -> list[str]:
    if found is None:
        return [name, MISSING, ""]
    if not found.excludes_zero:
        return [name, str(found), "no difference seen"]
    return [name, str(found), "lower" if found.mean < 0 else "higher"]


def _drift(rows: Sequence[Row]) -> str:
    return f"{statistics.fmean(row.final['drift'] for row in rows):.1e}" if rows else MISSING
