"""Engines: where a run's tensors live and how its step is taken. One file each."""
