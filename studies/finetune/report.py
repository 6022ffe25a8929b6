"""Tables and picture of the study of fine-tuning, from the rows that are there."""

from collections.abc import Mapping, Sequence

import numpy as np

from studies.finetune.arms import (
    ADAMW,
    BASES,
    BF16,
    EVERYTHING,
    MUON,
    NORMUON,
    OPTIMIZERS,
    REMAINDER,
)
from studies.finetune.plan import RATES, ROUNDED, SIZES, STEPS, Plan, rows_of
from studies.intervals import Interval, interval
from studies.ledger import Ledger, Row
from studies.options import Options
from studies.pictures import COLORS, panels, save
from studies.tables import markdown

MISSING = "not run"
SHOWN = ("loss", "exact", "held_out_exact", "old_loss")
HEADINGS = ("answer loss", "right answers", "right, held-out templates", "old task's loss")


def write_report(
    options: Options, setup: str, ledger: Ledger, plan: Plan, old: Mapping[str, Sequence[float]]
) -> None:
    """Writes `finetune.md` and `finetune.png` (with `_small` in the small form).

    Args:
      old: the bases' losses on the old task, by optimizer.
    """
    report = Report(ledger, plan)
    machines = sorted({f"{row.machine}; {row.versions}" for row in ledger})
    before = ", ".join(f"{name} {np.mean(losses):.4f}" for name, losses in old.items()) or MISSING
    sections = {
        "The best update size of each optimizer": report.best(),
        "Differences at the best sizes, paired by seed": report.differences(),
        "The record's explanation, step by step": report.recorded(),
        "Everything orthogonalized, plain SGD on norms": report.everything(),
        "Number formats": report.formats(),
    }
    text = [
        "# finetune\n",
        f"Written by `python -m studies finetune`. Setup: {setup}.\n",
        f"Machine: {' | '.join(machines) or MISSING}.\n",
        f"The old task's loss before fine-tuning, nats a byte: {before}. Intervals are 95 %, over"
        f" {plan.seeds} paired seeds.\n",
        *(f"## {heading}\n\n{table}" for heading, table in sections.items()),
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    options.file("finetune", "md").write_text("\n".join(text))
    report.draw(options.file("finetune", "png"))


class Report:
    """What the rows say."""

    def __init__(self, ledger: Ledger, plan: Plan):
        self._ledger, self._plan = ledger, plan

    def best(self) -> str:
        lines = []
        for base, name in enumerate(BASES):
            for arm in OPTIMIZERS:
                size, rows = self._best(arm, base)
                if size is None:
                    lines.append([name, arm, *[MISSING] * 6])
                    continue
                inside = SIZES[0] < size < SIZES[-1]
                written = f"{size:.1e}" + ("" if inside else " (at the end)")
                measured = f"{_mean(rows, 'update_rms'):.1e}" if rows else MISSING
                lines.append([name, arm, written, measured, *_cells(rows)])
        headings = ["base", "optimizer", "peak size asked for", "measured, mean", *HEADINGS]
        return markdown(headings, lines)

    def differences(self) -> str:
        """Between optimizers on each base, and between bases of that difference."""
        lines = []
        for arm in (MUON, NORMUON):
            found = [self._against_adamw(arm, base) for base in range(len(BASES))]
            for name, values in zip(BASES, found, strict=True):
                lines.append([f"{arm} − AdamW, {name} base", *_intervals(values)])
            if all(found):
                first, second = found
                both = {metric: first[metric] - second[metric] for metric in SHOWN}
                lines.append(
                    [f"{arm} − AdamW, {BASES[0]} base − {BASES[1]} base", *_intervals(both)]
                )
        return markdown(["difference", *HEADINGS], lines)

    def recorded(self) -> str:
        lines = []
        for base, name in enumerate(BASES):
            for step in STEPS:
                cells = []
                for rate in RATES:
                    rows = rows_of(self._ledger, self._plan.recorded(step, base, rate))
                    cells.append(
                        f"{100 * _mean(rows, 'exact'):.1f} % ({_mean(rows, 'loss'):.3f})"
                        if rows
                        else MISSING
                    )
                lines.append([name, step.name, *cells])
        text = "Right answers, and in brackets the answer loss.\n\n"
        return text + markdown(["base", "arm", *(f"rate {rate:g}" for rate in RATES)], lines)

    def everything(self) -> str:
        lines = []
        for base, name in enumerate(BASES):
            for size in SIZES:
                pair = [
                    rows_of(self._ledger, self._plan.swept(arm, base, size))
                    for arm in (EVERYTHING, MUON)
                ]
                cells = [
                    f"{_mean(rows, 'loss'):.3f}, {100 * _mean(rows, 'exact'):.1f} %"
                    if rows
                    else MISSING
                    for rows in pair
                ]
                lines.append([name, f"{size:.1e}", *cells])
        text = "Answer loss and right answers, over the sweep's seeds.\n\n"
        return text + markdown(["base", "peak size", EVERYTHING, MUON], lines)

    def formats(self) -> str:
        lines = []
        for arm in OPTIMIZERS:
            for size in ROUNDED:
                plain, lost, kept = (
                    rows_of(self._ledger, self._plan.compared(arm + kind, 0, size))
                    for kind in ("", BF16, REMAINDER)
                )
                cells = [
                    str(interval(_paired(rows, plain)["loss"])) if rows and plain else MISSING
                    for rows in (lost, kept)
                ]
                right = [
                    f"{100 * _mean(rows, 'exact'):.1f} %" if rows else MISSING
                    for rows in (plain, lost, kept)
                ]
                lines.append([arm, f"{size:.0e}", *cells, *right])
        headings = ["optimizer", "peak size", "loss, bf16", "loss, bf16 with remainder"]
        headings += ["right answers, float32", "right, bf16", "right, bf16 with remainder"]
        text = f"{BASES[0]} base; the answer loss as a difference from float32's.\n\n"
        return text + markdown(headings, lines)

    def draw(self, path) -> None:
        figure, axes = panels(3)
        for color, arm in zip(COLORS, OPTIMIZERS, strict=False):
            for base, line in enumerate(("-", "--")):
                swept = [rows_of(self._ledger, self._plan.swept(arm, base, size)) for size in SIZES]
                found = [rows for rows in swept if rows]
                if not found:
                    continue
                sizes = [_mean(rows, "update_rms") for rows in found]
                label = f"{arm}, {BASES[base]} base"
                for each, metric in zip(axes, ("loss", "exact", "old_loss"), strict=True):
                    values = [_mean(rows, metric) for rows in found]
                    each.plot(sizes, values, line, color=color, marker=".", label=label)
        for each, heading in zip(axes, (HEADINGS[0], HEADINGS[1], HEADINGS[3]), strict=True):
            each.set(xscale="log", xlabel="measured update RMS, mean over the run", ylabel=heading)
        if axes[0].lines:
            axes[0].legend(frameon=False, fontsize=8)
        save(figure, path)

    def _best(self, arm: str, base: int) -> tuple[float | None, list[Row]]:
        """The sweep's best size, and the comparison's rows of it."""
        try:
            size = self._plan.best(self._ledger, arm, base)
        except KeyError:
            return None, []
        return size, rows_of(self._ledger, self._plan.compared(arm, base, size))

    def _against_adamw(self, arm: str, base: int) -> dict[str, np.ndarray]:
        rows, others = self._best(arm, base)[1], self._best(ADAMW, base)[1]
        return _paired(rows, others) if rows and others else {}


def _paired(rows: Sequence[Row], others: Sequence[Row]) -> dict[str, np.ndarray]:
    return {metric: _values(rows, metric) - _values(others, metric) for metric in SHOWN}


def _values(rows: Sequence[Row], metric: str) -> np.ndarray:
    return np.array([row.final[metric] for row in rows])


def _mean(rows: Sequence[Row], metric: str) -> float:
    return float(_values(rows, metric).mean())


def _cells(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return [MISSING] * len(SHOWN)
    found = [interval(_values(rows, metric)) for metric in SHOWN]
    return [_plain(metric, each) for metric, each in zip(SHOWN, found, strict=True)]


def _plain(metric: str, found: Interval) -> str:
    if metric.endswith("exact"):
        return f"{100 * found.mean:.1f} ± {100 * found.half:.1f} %"
    return f"{found.mean:.4f} ± {found.half:.4f}"


def _intervals(values: Mapping[str, np.ndarray]) -> list[str]:
    if not values:
        return [MISSING] * len(SHOWN)
    return [
        f"{100 * found.mean:+.1f} ± {100 * found.half:.1f} %"
        if metric.endswith("exact")
        else str(found)
        for metric in SHOWN
        for found in [interval(values[metric])]
    ]
