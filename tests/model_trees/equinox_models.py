"""Models in Equinox."""

MODELS = []
