"""Held-out evaluation: runner (which benchmarks) -> embed (features) -> tasks and metrics -> results -> report."""
