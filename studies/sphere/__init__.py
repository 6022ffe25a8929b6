"""The study of spheres: how weights of constant norm should move, and whether it matters."""

from studies.sphere.study import Sphere

__all__ = ["Sphere"]
