"""Probes on features whose classes are known."""

from __future__ import annotations

import pytest
import torch

from egohod.evaluation.probes import knn_probe, linear_probe


def clusters(count: int, classes: int, width: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, width, generator=generator)
    labels = torch.arange(count) % classes
    return centres[labels] + noise * torch.randn(count, width, generator=generator), labels


@pytest.mark.parametrize("probe", [linear_probe, knn_probe])
def test_probes_tell_clusters_apart(probe: object) -> None:
    features, labels = clusters(300, 5, 16, 0.5)
    found = probe(features[:200], labels[:200], features[200:], 5)  # type: ignore[operator]
    assert (found.classes == labels[200:]).float().mean() > 0.95


def test_the_linear_probe_reads_what_neighbours_cannot() -> None:
    """The class stands in one direction of small spread; all others are noise."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(600, 32, generator=generator)
    labels = (features[:, 0] > 0).long()
    features[:, 0] *= 0.2
    right = {
        name: (probe(features[:400], labels[:400], features[400:], 2).classes == labels[400:]).float().mean()
        for name, probe in (("linear", linear_probe), ("knn", knn_probe))
    }
    assert right["linear"] > 0.9 > right["knn"]
