"""What the leaves of a model are: names, dtypes, layouts, settings."""
