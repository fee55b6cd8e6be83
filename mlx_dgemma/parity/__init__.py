"""Sameness with the reference: `record` a run of transformers, `check` that this package repeats it."""
