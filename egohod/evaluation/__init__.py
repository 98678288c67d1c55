"""Held-out evaluation: features once per clip, metrics, three evaluators, and benchmarks as thin readers onto them."""
