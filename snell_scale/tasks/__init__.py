"""Tasks: what is computed from a model and a batch, and how it is measured."""
