"""Why fine-tuning by Muon fails, where it does: `python -m studies finetune`."""

from studies.finetune.study import Finetune

__all__ = ["Finetune"]
