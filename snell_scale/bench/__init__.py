"""Benchmarks of the merge op and of whole training steps, each behind a gate of correctness."""
