"""How arrays lie on a mesh, and what travels over it."""
