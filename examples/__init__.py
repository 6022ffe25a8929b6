"""A small, complete trainer, to read and to copy from: `python -m examples --help`."""
