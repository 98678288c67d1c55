"""Whether two results.json hold the same numbers: as close as features agree however many processes made them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

TOLERANCE = 1e-3  # per cent


def main(one: Path, other: Path) -> None:
    first, second = (json.loads(path.read_text()) for path in (one, other))
    assert "1 process" in first["device"], first["device"]
    assert "4 process" in second["device"], second["device"]
    assert first["metrics"].keys() == second["metrics"].keys() != set()
    apart = {name: abs(value - second["metrics"][name]) for name, value in first["metrics"].items()}
    assert max(apart.values()) <= TOLERANCE, apart
    print(f"{len(apart)} numbers, at most {max(apart.values()):.1e} per cent apart")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
