"""`python -m benchmarks.sharded`: a step on a mesh of GPUs against one GPU and Optax's Muon."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import typer
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from benchmarks import machine, mesh_rates, mesh_steps, report, workloads
from benchmarks.arithmetic import Rates, orthogonalization_operations, step_seconds
from benchmarks.collectives import Collective, by_kind, bytes_bound
from benchmarks.mesh_steps import Prepared
from benchmarks.paper_model import DEVICES, LLAMAS, PaperRates, StepOnPaper, step_on_paper
from benchmarks.rows import Row
from benchmarks.timing import interleaved_milliseconds
from benchmarks.workloads import Stack

OURS = "NorMuon, mesh"
APPLY = "NorMuon, mesh, apply"
STACKS = "NorMuon, mesh, stacked leaves, apply"
ALONE = "NorMuon, one device"
PEER = "optax.contrib.muon, mesh"
WORK = "NorMuon, one device's share"
WIRE = "NorMuon's collectives"


class Section(NamedTuple):
    """A table with remarks below it."""

    title: str
    head: Sequence[str]
    lines: Sequence[Sequence[str]]
    remarks: Sequence[str] = ()

    def print_on(self, console: Console) -> None:
        table = Table(*self.head, title=self.title)
        for line in self.lines:
            table.add_row(*line)
        console.print(table)
        for remark in self.remarks:
            console.print(remark, highlight=False)

    def as_markdown(self) -> str:
        lines = [f"## {self.title}", "", "| " + " | ".join(self.head) + " |"]
        lines += ["| --- " * len(self.head) + "|"]
        lines += ["| " + " | ".join(line) + " |" for line in self.lines]
        return "\n".join([*lines, "", *(f"- {remark}" for remark in self.remarks), ""])


class Goal(NamedTuple):
    """A figure, and the bound that it is to keep: from above, or from below."""

    what: str
    value: float
    bound: float
    at_most: bool

    @property
    def met(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound


def main(
    out: Annotated[Path, typer.Option(help="Folder of sharded.json and sharded.md.")] = Path(
        "benchmarks/out"
    ),
    quick: Annotated[bool, typer.Option(help="Tiny matrices, to see that all runs.")] = False,
) -> None:
    """Time a step on all visible devices, count the bytes it sends, and extend it to more on paper.

    All steps are timed by turns in one process; times are medians.
    """
    console = Console(width=None if Console().is_terminal else 150)
    devices = jax.devices()
    if len(devices) < 2:
        console.print(
            f"a mesh needs at least two devices, and JAX sees {len(devices)} {devices[0].device_kind};"
            " without GPUs, JAX_NUM_CPU_DEVICES=2 makes two of the CPU"
        )
        raise typer.Exit(1)
    mesh = mesh_steps.mesh_of(devices)
    about = {**machine.versions(), "devices": f"{len(devices)} x {devices[0].device_kind}"}
    console.print(", ".join(f"{key} {value}" for key, value in about.items()))
    if devices[0].platform != "gpu":
        console.print("no GPU: no time here, and nothing on paper made of it, means a thing")

    model, shapes = workloads.QUICK_MESH if quick else workloads.MESH
    rates = mesh_rates.measure_rates(side=256 if quick else 8192, copied=2**20 if quick else 2**31)
    within, start = mesh_rates.all_to_all_rates(mesh, operand_bytes=2**16 if quick else 2**28)
    rows, found = time_steps(model, shapes, mesh, rates, calls=1 if quick else 3)
    milliseconds = {row.who: row.milliseconds for row in rows if row.milliseconds is not None}
    goals = list(goals_of(rows, found, shapes, mesh.size))
    sections = [
        Section(
            f"A step, fsdp={mesh.size}",
            report.columns(OURS),
            report.lines(rows, OURS),
            list(communication(milliseconds)),
        ),
        collectives_section(found),
        goals_section(goals),
    ]
    paper: list[StepOnPaper] = []
    reached = next(row.share for row in rows if row.who == ALONE)
    if reached is not None:
        on_paper = PaperRates(*rates, share=reached, within=within, start=start)
        paper = [step_on_paper(model, shapes, mesh.size, on_paper)]
        paper += [
            step_on_paper(name, of_model, count, on_paper)
            for name, of_model in LLAMAS.items()
            for count in DEVICES
        ]
        sections += paper_sections(paper, on_paper, milliseconds.get(OURS))
    for section in sections:
        section.print_on(console)

    out.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": about,
        "rates": {**rates._asdict(), "all_to_all": within, "small_all_to_all_seconds": start},
        "rows": [row.as_dict() for row in rows],
        "collectives": {who: by_kind(each) for who, each in found.items()},
        "goals": [{**goal._asdict(), "met": goal.met} for goal in goals],
        "paper": [step.as_dict() for step in paper],
    }
    (out / "sharded.json").write_text(json.dumps(result, indent=1) + "\n")
    head = ["# A step on a mesh", "", *(f"- {key}: {value}" for key, value in about.items()), ""]
    text = "\n".join([*head, *(section.as_markdown() for section in sections)])
    (out / "sharded.md").write_text(text)
    console.print(f"wrote sharded.json and sharded.md into {out}")


def time_steps(
    model: str, shapes: Sequence[Stack], mesh: Mesh, rates: Rates, *, calls: int
) -> tuple[list[Row], dict[str, list[Collective]]]:
    """A row for every step and part of one, and the collectives of those that have any.

    One device is a mesh of one, where the same code runs on whole matrices. Its share are as many of
    them as it orthogonalizes on the mesh: its work there without what moves them.
    """
    first = mesh_steps.mesh_of(list(mesh.devices.flat)[:1])
    share = mesh_steps.share_of(shapes, mesh.size)
    ours, peer = mesh_steps.normuon, mesh_steps.optax_muon
    makers: dict[str, Callable[[], Prepared]] = {
        OURS: lambda: mesh_steps.step(ours, shapes, mesh),
        APPLY: lambda: mesh_steps.step(ours, shapes, mesh, in_place=True),
        STACKS: lambda: mesh_steps.step(
            mesh_steps.normuon_of_stacks, shapes, mesh, stacked=True, in_place=True
        ),
        ALONE: lambda: mesh_steps.step(ours, shapes, first),
        PEER: lambda: mesh_steps.step(peer, shapes, mesh),
        WORK: lambda: mesh_steps.step(ours, share, first),
        WIRE: lambda: mesh_steps.replay(prepared[OURS].collectives, mesh),
    }
    parts: dict[str, int] = dict.fromkeys((OURS, APPLY, STACKS, PEER), mesh.size)
    rows, prepared = [], {}
    for who, make in makers.items():
        row = Row(model, who)
        if who != WIRE:
            work = share if who == WORK else shapes
            row.operations = sum(n * orthogonalization_operations(r, c) for n, r, c in work)
            row.reference = 1e3 * step_seconds(work, rates) / parts.get(who, 1)
        try:
            prepared[who] = make()
        except Exception as error:
            # What does not fit, or what the collectives of a failed step would be, is a line.
            row.failure = (
                f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]:.120}"
            )
        rows.append(row)
    times = interleaved_milliseconds(
        {who: (each.function, each.carry) for who, each in prepared.items()},
        jax.block_until_ready,
        calls=calls,
    )
    for row in rows:
        row.milliseconds = times.get(row.who)
        if row.who in prepared and prepared[row.who].temporary is not None:
            row.more["temporary GiB"] = prepared[row.who].temporary / 2**30
    return rows, {who: each.collectives for who, each in prepared.items() if each.collectives}


def goals_of(
    rows: Sequence[Row],
    found: Mapping[str, Sequence[Collective]],
    shapes: Sequence[Stack],
    devices: int,
) -> Iterator[Goal]:
    """What two devices are to reach on the 1B Llama; figures of steps that failed are left out."""
    times = {row.who: row.milliseconds for row in rows if row.milliseconds is not None}
    if OURS not in times:
        return
    bound = bytes_bound(sum(count * r * c for count, r, c in shapes), devices)
    sent = sum(each.sent for each in found.get(OURS, []))
    yield Goal("bytes sent over the bound", sent / bound, 1.05, True)
    if ALONE in times:
        what = f"{devices} devices over one, times as fast"
        yield Goal(what, times[ALONE] / times[OURS], 0.9 * devices, False)
    if PEER in times:
        yield Goal("over optax.contrib.muon, times as fast", times[PEER] / times[OURS], 6, False)
    temporary = next(row.more.get("temporary GiB") for row in rows if row.who == OURS)
    if temporary is not None:
        yield Goal("temporary memory a device, GiB", temporary, 1.5, True)


def communication(milliseconds: Mapping[str, float]) -> Iterator[str]:
    """Its share of the step, measured in two ways."""
    step = milliseconds.get(OURS)
    if step is None:
        return
    if WIRE in milliseconds:
        yield (
            f"communication is {milliseconds[WIRE] / step:.1%} of the step by its collectives timed"
            " alone, of the same kinds and sizes and one after the other"
        )
    if WORK in milliseconds:
        yield (
            f"being divided takes {1 - milliseconds[WORK] / step:.1%} of the step: its time without that"
            " of the whole matrices that one device orthogonalizes; packing is in it, and what is"
            " hidden behind products is not"
        )


def collectives_section(found: Mapping[str, Sequence[Collective]]) -> Section:
    lines = [
        [
            who,
            kind,
            f"{row['count']:.0f}",
            f"{row['in loops']:.0f}",
            f"{row['runs']:.0f}",
            f"{row['sent'] / 1e6:.3f}",
        ]
        for who, each in found.items()
        for kind, row in by_kind(each).items()
    ]
    head = ["program", "collective", "in the text", "in loops", "a step", "MB sent by a device"]
    return Section("Collectives of the compiled programs", head, lines)


def goals_section(goals: Sequence[Goal]) -> Section:
    lines = [
        [
            goal.what,
            f"{goal.value:.3f}",
            f"{'at most' if goal.at_most else 'at least'} {goal.bound:g}",
            "yes" if goal.met else "no",
        ]
        for goal in goals
    ]
    bound = "the bound: 4 (P/W) (W-1)/W bytes for P entries on W devices, bfloat16 there and back"
    return Section("Goals", ["figure", "value", "goal", "met"], lines, [bound])


def paper_sections(
    paper: Sequence[StepOnPaper], rates: PaperRates, measured: float | None
) -> Iterator[Section]:
    """The steps by what takes their time, and the groups that they are made of."""
    parts = list(paper[0].parts)
    remarks = [
        f"measured: bfloat16 product {rates.products / 1e12:.3g} TFLOP/s, copy"
        f" {rates.copies / 1e12:.3g} TB/s, of which a step on one device reaches {rates.share:.2f};"
        f" all-to-all {rates.within / 1e9:.3g} GB/s sent by a device,"
        f" {rates.start * 1e6:.0f} µs if small",
        rates.assumptions(),
        *(step.limit for step in paper),
    ]
    if measured is not None:
        first = paper[0]
        check = f"{first.model} on {first.devices}: {1e3 * first.seconds:.2f} ms on paper"
        remarks.insert(0, f"{check}, {measured:.2f} ms measured")
    lines = [
        [step.model, str(step.devices), f"{1e3 * step.seconds:.2f}"]
        + [f"{1e3 * step.parts[part]:.2f}" for part in parts]
        + [f"{1e3 * step.undealt:.2f}", f"{step.unevenness:.2f}"]
        for step in paper
    ]
    head = ["model", "devices", "step", *parts, "products undealt", "products over an even share"]
    yield Section("On paper: ms of a step", head, lines, remarks)
    lines = [
        [
            step.model,
            str(step.devices),
            f"{group.spread.count}x{group.spread.rows}x{group.spread.columns}",
            group.placement.strategy,
            str(group.placement.each),
            str(group.placement.padding),
            f"{group.placement.operations / 1e12:.3f}",
            f"{group.placement.bytes_sent / 1e6:.2f}",
            f"{group.message_bytes / 1e3:.1f}",
            f"{1e3 * group.products:.2f}",
            f"{1e3 * (group.wire + group.messages):.2f}",
        ]
        for step in paper
        for group in step.groups
    ]
    head = ["model", "devices", "matrices", "strategy", "each", "padding"]
    head += ["TFLOP a device", "MB sent", "kB a message", "products ms", "communication ms"]
    yield Section("On paper: matrices of one shape", head, lines)


if __name__ == "__main__":
    typer.run(main)
