"""Whether all processes of a run execute the same code with the same configuration."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path
from typing import Any

import torch
import yaml

from egohod.config import Config, to_yaml
from egohod.distributed import Distributed, host_name
from egohod.errors import UserError

# Where files lie may differ from node to node.
_OF_A_NODE = (".root", ".cache")


def require_agreement(cfg: Config, dist: Distributed) -> None:
    """Raise the same :class:`UserError` on every process unless all agree; it names the nodes and what differs."""
    mine = {"the code of egohod": source_hash(), "Python": platform.python_version(), "torch": torch.__version__}
    mine |= _flat(yaml.safe_load(to_yaml(cfg)))
    told = dist.gather_objects((host_name(), mine))
    problems = []
    for name in dict.fromkeys(name for _, values in told for name in values):
        hosts: dict[str, list[str]] = {}
        for rank, (host, values) in enumerate(told):
            hosts.setdefault(str(values.get(name, "not there")), []).append(f"{host} (rank {rank})")
        if len(hosts) > 1 and not name.endswith(_OF_A_NODE):
            said = "; ".join(f"{value} on {_few(places)}" for value, places in hosts.items())
            problems.append(f"the processes of this run disagree on {name}: {said}")
    if problems:
        raise UserError(*problems)


def source_hash(package: Path = Path(__file__).parents[1]) -> str:
    """A fingerprint of the package's files, for code that is not in a git checkout too."""
    content = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return content.hexdigest()[:12]


def _few(places: list[str], shown: int = 3) -> str:
    more = f" and {len(places) - shown} more" if len(places) > shown else ""
    return ", ".join(places[:shown]) + more


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    parts = (_flat(each, f"{prefix}.{key}".lstrip(".")) for key, each in tree.items())
    return {name: value for part in parts for name, value in part.items()}
