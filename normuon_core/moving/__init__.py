"""Moving a run between frameworks: the common format of its arrays, and the names on either side."""

from normuon_core.moving.derivation import derive_table
from normuon_core.moving.name_table import NameTable
from normuon_core.moving.rule import Rule

__all__ = ["NameTable", "Rule", "derive_table"]
