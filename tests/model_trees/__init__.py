"""Parameter trees of public models, and the role of every leaf: see `record.py`."""
