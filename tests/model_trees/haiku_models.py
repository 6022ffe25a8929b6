"""Models in Haiku."""

MODELS = []
