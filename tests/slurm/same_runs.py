"""Whether two run folders end at the same step with the same weights and losses, bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.support import losses, newest
from tests.training.test_resume import assert_same


def main(one: Path, other: Path) -> None:
    first, second = newest(one), newest(other)
    assert first.step == second.step, f"steps {first.step} and {second.step}"
    assert_same(first.weights, second.weights, "weights")
    assert_same(first.training["optimizer"], second.training["optimizer"], "optimizer")
    assert losses(one) == losses(other)
    assert [step for step, _, _ in losses(one)] == list(range(1, first.step + 1))
    print(f"the same weights, optimizer state and losses after {first.step} steps")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
