"""Probes on features whose classes are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from egohod.evaluation.features import INDEX_FORMAT, file_of, open_index, write_video
from egohod.evaluation.tasks import knn_probe, linear_probe
from tests.support import Command


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


def features(folder: Path, weights: str, values: np.ndarray, texts: list[str], videos: int = 1) -> Path:
    """As tools/extract_features.py leaves them; of several videos only the first has been embedded yet."""
    folder.mkdir()
    names = {f"v{i}": file_of(f"v{i}") for i in range(videos)}
    protocol = {"frames": 4, "size": 32, "crop": "centre"}
    index = {"format": INDEX_FORMAT, "weights": weights, "protocol": protocol, "root": "videos", "videos": names}
    open_index(folder, index | {"layout": "auto", "chunk_seconds": 15.0})
    times = np.arange(len(texts), dtype=float)
    write_video(folder, "v0", values.astype(np.float32), times, times + 1, texts, "these")
    return folder


def test_the_program_compares_like_with_like(tmp_path: Path, inside: Command) -> None:
    values, labels = clusters(60, 3, 8, 0.1)
    known, texts = values.numpy(), [f"class {int(label)}" for label in labels]
    train = features(tmp_path / "train", "a", known[:40], texts[:40], videos=2)
    test = features(tmp_path / "test", "a", known[40:], texts[40:])
    done = inside("probe.py", "--train", train, "--test", test)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "40 training clips, 20 test clips, 3 classes"
    assert done.stdout.count("top-1 100.00, mean class 100.00") == 2
    assert "train: 1 videos have no features yet" in done.stderr
    other = features(tmp_path / "other", "b", known[40:], texts[40:])
    broken = features(tmp_path / "broken", "a", known[40:] * np.nan, texts[40:])
    strange = features(tmp_path / "strange", "a", known[40:], ["class 9"] * 20)
    for folder, said in (
        (other, "hold features of another weights"),
        (broken, "broken: the features of v0 are not finite"),
        (strange, "class 'class 9' has test clips, but no training clip"),
    ):
        done = inside("probe.py", "--train", train, "--test", folder)
        assert done.returncode == 2, done.stdout
        assert said in done.stderr
