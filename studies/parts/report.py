"""Table and picture of the study of parts, from the rows that are there."""

import statistics
from collections.abc import Sequence

import numpy as np

from studies.crossing import steps_to
from studies.intervals import Interval, interval
from studies.ledger import Ledger, Row
from studies.options import Options
from studies.page import MISSING, write_page
from studies.parts.arms import ADAMW, ORDER
from studies.pictures import COLORS, panels, save
from studies.pretraining import Pretraining
from studies.tables import markdown
from studies.trial import Trial, written
from studies.tuning import Tuning

PAIRS = (
    *((arm, ADAMW) for arm in ORDER[1:3]),
    *((arm, "Muon") for arm in ORDER[2:6]),
    *((arm, "all") for arm in ORDER[6:]),
)
"""Differences that are tabled: (arm, what it is compared with)."""


def write_report(
    options: Options, setup: Pretraining, ledger: Ledger, tuning: Tuning, *, seeds: Sequence[int]
) -> None:
    """Writes `parts.md` and `parts.png` (with `_small` in the small form)."""
    report = Report(setup, ledger, tuning, seeds)
    write_page(options, "parts", str(setup), report.rows, report.sections())
    if report.finished:
        report.draw(options.file("parts", "png"))


class Report:
    """What the rows say."""

    def __init__(self, setup: Pretraining, ledger: Ledger, tuning: Tuning, seeds: Sequence[int]):
        self._setup, self._ledger, self._tuning, self._seeds = setup, ledger, tuning, seeds
        self.finals = {arm: self._rows(arm, setup.evaluations) for arm in ORDER}

    @property
    def finished(self) -> list[str]:
        """Arms whose comparison has been run."""
        return [arm for arm in ORDER if self.finals[arm]]

    @property
    def rows(self) -> list[Row]:
        """Of the comparison."""
        return [row for own in self.finals.values() for row in own]

    def sections(self) -> list[str]:
        """Paragraphs and tables."""
        return [
            f"Losses are nats a byte on held-out text; intervals are 95 %, over {len(self._seeds)}"
            " paired seeds.\n",
            self._arms(),
            "## Differences of the final loss\n",
            self._differences(),
            "## Shorter runs, each with its own decay\n",
            self._shorter(),
        ]

    def draw(self, path) -> None:
        figure, (left, right) = panels(2)
        for color, arm in zip(COLORS, [ADAMW, "Muon", "all"], strict=False):
            if rows := self.finals[arm]:
                mean = np.mean([row.curves["loss"] for row in rows], axis=0)
                steps = self._setup.every * np.arange(1, len(mean) + 1)
                start = len(mean) // 5
                left.plot(steps[start:], mean[start:], color=color, label=arm)
        left.set(xlabel="step", ylabel="held-out loss, nats a byte")
        left.legend(frameon=False)
        arms = [arm for arm in self.finished if arm != ADAMW and self.finals[ADAMW]]
        for place, arm in enumerate(reversed(arms)):
            ratio = self._ratio(arm)
            if ratio is not None:
                right.errorbar(ratio.mean, place, xerr=ratio.half, fmt="o", color=COLORS[0])
        right.set_yticks(range(len(arms)), list(reversed(arms)))
        right.set(xlabel="steps to AdamW's final loss, over AdamW's")
        save(figure, path)

    def _rows(self, arm: str, evaluations: int) -> list[Row]:
        """One a seed, in their order; none unless all are there."""
        values = self._tuning.so_far(arm).values
        trials = [Trial(arm, values, seed, evaluations) for seed in self._seeds]
        if not all(trial in self._ledger for trial in trials):
            return []
        return [self._ledger[trial] for trial in trials]

    def _arms(self) -> str:
        headings = ["arm", "final loss", "steps to AdamW's", "ms a step", "time to AdamW's"]
        headings += ["rate", "AdamW beside", "decay", "trials", "best inside"]
        return markdown(headings, [self._arm(arm) for arm in ORDER])

    def _arm(self, arm: str) -> list[str]:
        found = self._tuning.so_far(arm)
        tuned = [written(found.values[name]) for name in ("rate", "adam_rate", "decay")]
        tuned += [str(len(found.losses)), "yes" if found.inside else "no"]
        rows = self.finals[arm]
        if not rows:
            return [arm, *[MISSING] * 4, *tuned]
        loss = interval([row.final["loss"] for row in rows])
        ratio, time = self._ratio(arm), self._milliseconds(rows)
        adamw = self.finals[ADAMW]
        if ratio is None:
            reached, costs = "not in every seed" if adamw else MISSING, MISSING
        else:
            reached = f"{100 * ratio.mean:.1f} ± {100 * ratio.half:.1f} %"
            costs = f"{100 * ratio.mean * time / self._milliseconds(adamw):.0f} %"
        return [arm, f"{loss.mean:.4f} ± {loss.half:.4f}", reached, f"{time:.2f}", costs, *tuned]

    def _milliseconds(self, rows: Sequence[Row]) -> float:
        """Of a step of all lanes side by side, evaluations included."""
        each = [1e3 * r.seconds / (r.trial.evaluations * self._setup.every) for r in rows]
        return statistics.median(each)

    def _ratio(self, arm: str) -> Interval | None:
        """Steps to AdamW's final loss of the same seed, over AdamW's steps; None: not in every seed."""
        adamw, rows = self.finals[ADAMW], self.finals[arm]
        if not adamw or not rows:
            return None
        every, steps = self._setup.every, self._setup.steps
        reached = [
            steps_to(row.curves["loss"], other.final["loss"], every=every)
            for row, other in zip(rows, adamw, strict=True)
        ]
        if any(value is None for value in reached):
            return None
        return interval([value / steps for value in reached if value is not None])

    def _differences(self) -> str:
        lines = []
        for arm, other in PAIRS:
            ones, others = self.finals[arm], self.finals[other]
            if ones and others:
                paired = zip(ones, others, strict=True)
                found = interval([a.final["loss"] - b.final["loss"] for a, b in paired])
                lines.append([f"{arm} − {other}", str(found), _verdict(found)])
            else:
                lines.append([f"{arm} − {other}", MISSING, ""])
        return markdown(["pair", "difference", "says"], lines)

    def _shorter(self) -> str:
        """What an arm comes to with fewer steps, against AdamW with all of them."""
        adamw = self.finals[ADAMW]
        trials = [row.trial for row in self._ledger]
        lengths = sorted({(ORDER.index(trial.arm), trial.evaluations) for trial in trials})
        lines = []
        for place, length in lengths:
            if length == self._setup.evaluations:
                continue
            arm = ORDER[place]
            rows = self._rows(arm, length)
            if rows and adamw:
                paired = zip(rows, adamw, strict=True)
                found = interval([a.final["loss"] - b.final["loss"] for a, b in paired])
                share = f"{100 * length / self._setup.evaluations:.0f} %"
                lines.append([arm, share, str(found), _verdict(found)])
        if not lines:
            return MISSING + "\n"
        return markdown(["arm", "of AdamW's steps", "final loss − AdamW's", "says"], lines)


def _verdict(found: Interval) -> str:
    if not found.excludes_zero:
        return "no difference seen"
    return "lower" if found.mean < 0 else "higher"
