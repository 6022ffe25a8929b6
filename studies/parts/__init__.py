"""Which parts of the optimizer matter: `python -m studies parts`."""

from studies.parts.study import Parts

__all__ = ["Parts"]
