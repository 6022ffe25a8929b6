"""What every study is told."""

import dataclasses
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Options:
    """Where results go, and how long a study may take."""

    small: bool = False
    """The form for two CPU cores: shows that it runs, and decides nothing."""
    out: Path = RESULTS
    """Folder of rows, table and picture; rows that are there are not run again."""
    minutes: float | None = None
    """Stop between two trials before that many minutes have passed; the next call goes on."""

    def file(self, name: str, kind: str) -> Path:
        """A result of this form of a study."""
        return self.out / f"{name}{'_small' if self.small else ''}.{kind}"
