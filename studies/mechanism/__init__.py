"""What each stage does to updates and weights: `python -m studies mechanism`."""

from studies.mechanism.study import Mechanism

__all__ = ["Mechanism"]
