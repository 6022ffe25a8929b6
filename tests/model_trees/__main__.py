"""`python -m tests.model_trees [NAME ...]` prints what the routing makes of the recorded models.

One line a model: leaves, how many it asks about, how many it gets wrong. With names, the leaves of
those models that are asked about or wrong as well.
"""

import sys

from .fixtures import Fixture, read_all
from .verdicts import Verdict, judge


def counted(verdicts: list[Verdict]) -> tuple[int, int, int]:
    """Leaves, asked, wrong."""
    outcomes = [verdict.outcome for verdict in verdicts]
    return len(outcomes), outcomes.count("asked"), outcomes.count("wrong")


def table(judged: dict[str, list[Verdict]], conventions: dict[str, str]) -> str:
    rows = [("model", "leaves", "asked", "wrong", "convention")]
    rows += [(name, *counted(verdicts), conventions[name]) for name, verdicts in judged.items()]
    leaves, asked, wrong = counted([v for verdicts in judged.values() for v in verdicts])
    rows.append(("all", leaves, asked, wrong, f"{asked / leaves:.1%} asked about"))
    width = max(len(row[0]) for row in rows)
    return "\n".join(
        f"{name:{width}}  {leaves:>6}  {asked:>5}  {wrong:>5}  {convention}"
        for name, leaves, asked, wrong, convention in rows
    )


def report(fixtures: list[Fixture]) -> str:
    judged = {fixture.name: judge(fixture) for fixture in fixtures}
    return table(judged, {fixture.name: fixture.convention for fixture in fixtures})


def main(names: list[str]) -> None:
    fixtures = read_all()
    print(report(fixtures))
    for fixture in fixtures:
        if fixture.name not in names:
            continue
        print(f"\n{fixture.name}")
        for verdict in judge(fixture):
            if verdict.outcome != "right":
                role = verdict.role
                true = role.adamw or f"{role.reduction_axis} -> {role.output_axis}"
                doubt = " (doubt)" if role.doubt else ""
                print(
                    f"  {verdict.outcome}: {verdict.name} {verdict.shape} is {true}{doubt};"
                    f" routed {verdict.routed}"
                )


if __name__ == "__main__":
    main(sys.argv[1:])
