"""Matrices of many leaves as stacks, and the plan of which share one."""
