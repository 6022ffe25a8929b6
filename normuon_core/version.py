"""The version of the three packages, which are released together; `pyproject.toml` reads it here."""

__version__ = "0.1.0"
