"""Linear and k-nearest-neighbour probes: how well the features of a frozen model separate classes.

    python tools/extract_features.py ... --output features/train      (and features/test; docs/evaluation.md)
    python tools/probe.py --train features/train --test features/test

The class of a clip is its text in the index. Prints top-1 and mean class accuracy of both probes on the test clips;
weight decay and k are chosen on a tenth of the training clips, never on the test clips.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from _common import run_tool, tool_parser

from egohod import cli
from egohod.errors import UserError
from egohod.evaluation.features import INDEX_SHARED, Features, read_features, read_index
from egohod.evaluation.tasks import knn_probe, linear_probe

log = logging.getLogger("probe")


def classes(train: Features, test: Features) -> tuple[np.ndarray, np.ndarray, int]:
    """Class numbers of both, from their texts.

    Raises :class:`UserError` for a single class, or a test class that training lacks.
    """
    # Sorted: the numbers must not depend on the order of the videos.
    names = sorted(set(train.texts))
    if len(names) < 2:
        raise UserError(f"all training clips are of one class, '{names[0]}'; a probe needs at least two")
    number = {name: i for i, name in enumerate(names)}
    # A class without training clips could never be right: more likely the folders do not belong together.
    if unknown := [text for text in test.texts if text not in number]:
        raise UserError(f"class '{unknown[0]}' has test clips, but no training clip")
    return np.array([number[t] for t in train.texts]), np.array([number[t] for t in test.texts]), len(names)


def _features(folder: Path) -> Features:
    """The features of a folder. Raises :class:`UserError` if one is not finite."""
    features, missing = read_features(folder)
    if missing:
        log.warning("%s: %d videos have no features yet, and are left out", folder, missing)
    # A single NaN would make the linear probe's weights NaN, and every accuracy chance.
    if len(wrong := np.flatnonzero(~np.isfinite(features.features).all(axis=1))):
        raise UserError(f"{folder}: the features of {features.videos[wrong[0]]} are not finite")
    return features


def main(arguments: Sequence[str]) -> int:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    learn = "features of tools/extract_features.py to learn from"
    add("--train", type=Path, required=True, metavar="FOLDER", help=learn)
    add("--test", type=Path, required=True, metavar="FOLDER", help="features to classify")
    add("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    train, test = (_features(folder) for folder in (args.train, args.test))
    # Distances between the features of two models, or of two protocols, mean nothing.
    first, second = read_index(args.train), read_index(args.test)
    if differ := [name for name in INDEX_SHARED if first.get(name) != second.get(name)]:
        raise UserError(f"{args.train} and {args.test} hold features of another {' and '.join(differ)}")
    train_labels, test_labels, count = classes(train, test)
    train_features, test_features = torch.from_numpy(train.features), torch.from_numpy(test.features)
    print(f"{len(train_features):,} training clips, {len(test_features):,} test clips, {count} classes")
    # k-NN measures distances alone; the linear probe may weigh dimensions, so that it is mostly higher.
    for name, probe in (("linear", linear_probe), ("k-NN", knn_probe)):
        start = time.monotonic()
        result = probe(train_features, torch.from_numpy(train_labels), test_features, count, seed=args.seed)
        right = (result.classes.numpy() == test_labels).astype(float)
        # Of classes that have test clips; the others have no accuracy.
        mean = np.mean([right[test_labels == c].mean() for c in np.unique(test_labels)])
        took = f"({result.chosen}; {time.monotonic() - start:.1f} s)"
        print(f"{name:<7} top-1 {100 * right.mean():.2f}, mean class {100 * mean:.2f}  {took}")
    return cli.DONE


if __name__ == "__main__":
    run_tool(main)
