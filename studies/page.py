"""The page of a study: what it was run with and on, then its tables."""

from collections.abc import Iterable, Sequence

from studies.ledger import Row
from studies.options import Options

MISSING = "not run"
"""What a table says where rows are missing."""


def write_page(
    options: Options, study: str, setup: str, rows: Iterable[Row], sections: Sequence[str]
) -> None:
    """Writes the study's Markdown file.

    Args:
      setup: what was trained, in words. rows: those that the sections speak of.
      sections: paragraphs and tables, each of which ends in a new line.
    """
    machines = sorted({f"{row.machine}; {row.versions}" for row in rows})
    head = [
        f"# {study}\n",
        f"Written by `python -m studies {study}`. Setup: {setup}.\n",
        f"Machine: {' | '.join(machines) or MISSING}.\n",
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    options.file(study, "md").write_text("\n".join([*head, *sections]))
