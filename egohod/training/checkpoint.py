"""Checkpoints that survive kills, full disks and half-written files.

    <run>/checkpoints/
        LAST                          name of the newest complete checkpoint
        step-00000500/
            model.safetensors         weights, readable by anything that reads safetensors
            training.pt               optimizer, loss scaler, progress; loadable with weights_only
            manifest.json             step, metrics, what the run looks like, SHA-256 of the files above

A checkpoint is written under a temporary name, flushed to the disk, then renamed: it is there as a whole or not
at all. ``LAST`` is only a hint for people and scripts; loading goes by the manifests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from egohod.data.labels import ClassSpace
from egohod.errors import UserError
from egohod.model.checkpoints import WeightFile, checksum, from_tensors, load_pickle, read_weights
from egohod.model.dual_encoder import Base
from egohod.model.weight_names import WeightsError

log = logging.getLogger(__name__)

_NAME = re.compile(r"step-\d{8}")
WEIGHTS, TRAINING, MANIFEST, LAST = "model.safetensors", "training.pt", "manifest.json", "LAST"


IMPLIED = {"model.image_stats": "clip"}
"""What holds of checkpoints from before it was written into their manifests."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or not written."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read from disk and found whole."""

    path: Path
    step: int
    weights: dict[str, torch.Tensor]
    training: dict[str, Any]
    manifest: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, run: Path, *, keep_last: int = 2, keep_best: int = 1, best: str = ""):
        self.folder = run / "checkpoints"
        self._keep_last, self._keep_best, self._best = keep_last, keep_best, best

    def save(
        self,
        step: int,
        weights: dict[str, torch.Tensor],
        training: dict[str, Any],
        *,
        metrics: dict[str, float],
        identity: dict[str, Any],
        base: Base | None = None,
    ) -> Path:
        """Write one checkpoint and drop those no longer kept.

        With ``base`` the weights that it names are left out. ``identity`` is what a resumed run must agree with
        (geometry, batch size, seed ...). Raises :class:`CheckpointError` if it cannot be written; older checkpoints
        are untouched then.
        """
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".tmp-step-{step:08d}-{os.getpid()}"
        try:
            # Not with its parents: a shared folder that is lost would come back on the disk below its mount point.
            self.folder.mkdir(exist_ok=True)
            self._clear_leftovers()
            temporary.mkdir()
            save_file({name: value.contiguous() for name, value in weights.items()}, temporary / WEIGHTS)
            torch.save(training, temporary / TRAINING)
            manifest = {
                "format": 1,
                "step": step,
                "metrics": metrics,
                "identity": identity,
                "sha256": {name: _sha256(temporary / name) for name in (WEIGHTS, TRAINING)},
                # A checkpoint without one is whole.
                **({"base": dataclasses.asdict(base)} if base else {}),
            }
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
            for name in (WEIGHTS, TRAINING, MANIFEST):
                _flush(temporary / name)
            _flush(temporary)
            if final.exists():  # left torn by an earlier crash, or saved twice at the same step
                self._remove(final)
            temporary.rename(final)
            _flush(self.folder)
            self._point(final.name)
        except (OSError, SafetensorError, RuntimeError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"{final}: not saved: {_reason(error)}; older checkpoints are untouched") from error
        self._prune(final)
        return final

    def rate(self, step: int, metrics: dict[str, float]) -> None:
        """Add the metrics that a checkpoint was saved without. Raises :class:`CheckpointError`."""
        path = self.folder / f"step-{step:08d}"
        manifest, temporary = read_manifest(path), path / f".{MANIFEST}"
        try:
            temporary.write_text(json.dumps(manifest | {"metrics": metrics}, indent=1))
            _flush(temporary)
            temporary.rename(path / MANIFEST)
            _flush(path)
        except OSError as error:
            raise CheckpointError(f"{path / MANIFEST}: metrics not written: {_reason(error)}") from error
        self._prune(self.steps()[-1])

    def steps(self) -> list[Path]:
        """Checkpoint folders, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name))

    def set_aside_after(self, step: int) -> None:
        """Rename checkpoints of later steps to ``abandoned-*``: a run that went back to ``step`` replaces them."""
        for path in self.steps():
            if int(path.name.removeprefix("step-")) > step:
                log.warning("%s lies after the checkpoint that is resumed: renamed to abandoned-%s", path, path.name)
                target = path.with_name(f"abandoned-{path.name}")
                shutil.rmtree(target, ignore_errors=True)
                path.rename(target)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; a torn one is passed over with a warning."""
        for path in reversed(self.steps()):
            try:
                return read(path)
            except CheckpointError as error:
                log.warning("%s; trying the one before", error)
        return None

    def _point(self, name: str) -> None:
        temporary = self.folder / f".{LAST}-{os.getpid()}"
        temporary.write_text(name + "\n")
        _flush(temporary)
        temporary.rename(self.folder / LAST)

    def _clear_leftovers(self) -> None:
        """Remove what a killed process left half-written (a run folder has one writer at a time)."""
        for path in self.folder.glob(".tmp-step-*"):
            shutil.rmtree(path, ignore_errors=True)

    def _prune(self, newest: Path) -> None:
        """Keep ``newest`` and those before it, and the best ones; what is torn does not count as kept."""
        paths = [path for path in self.steps() if path == newest or _is_whole(path)]
        ranked = sorted(paths, key=lambda path: _metric(path, self._best), reverse=True)
        rated = [path for path in ranked if _metric(path, self._best) > float("-inf")]
        kept = {newest, *paths[-self._keep_last :], *rated[: self._keep_best]}
        for path in paths:
            if path not in kept:
                with contextlib.suppress(OSError):  # one checkpoint too many ends no run
                    self._remove(path)

    def _remove(self, path: Path) -> None:
        """Delete a checkpoint folder; raises :class:`OSError` if it cannot be renamed."""
        # Renamed first: a process that is killed while it deletes must not leave a part under a checkpoint's name.
        leftover = self.folder / f".tmp-{path.name}-{os.getpid()}-old"
        path.rename(leftover)
        shutil.rmtree(leftover, ignore_errors=True)


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint folder, or the newest good checkpoint of a run folder. Raises :class:`CheckpointError`."""
    store = CheckpointStore(path)
    if not store.steps():
        return read(path)
    checkpoint = store.newest()
    if checkpoint is None:
        raise CheckpointError(f"{store.folder}: none of the checkpoints is readable")
    return checkpoint


def open_weights(source: str | Path, *, download: bool = False, base: str | None = None) -> WeightFile:
    """The weights of a file of any family, a folder of its shards, or a run or checkpoint folder of this project.

    A checkpoint that holds only what was trained is completed from the file it was started from, or from ``base`` if
    that lies elsewhere now; a file of other weights is refused.

    Raises :class:`UserError` as :func:`open_checkpoint` and :func:`egohod.model.checkpoints.read_weights` do.
    """
    if not _holds_checkpoints(Path(source)):
        return read_weights(source, download=download)
    checkpoint = open_checkpoint(Path(source))
    weights = from_tensors(str(checkpoint.path), {**_of_base(checkpoint, download, base), **checkpoint.weights})
    identity = IMPLIED | checkpoint.manifest["identity"]
    weights.beside = {name: str(value) for name, value in identity.items()}
    # Of a model with one path, the knobs of the other say nothing.
    fast = identity.get("model.fast", {}) if weights.shape and weights.shape.slowfast else {}
    weights.settings = {
        **{name: value for name, value in identity.items() if name.startswith(("model.", "loss."))},
        **{f"model.fast.{name}": value for name, value in fast.items()},
    }
    weights.settings.pop("model.fast", None)
    return weights


def _holds_checkpoints(folder: Path) -> bool:
    return (folder / MANIFEST).exists() or bool(CheckpointStore(folder).steps())


def classes_of(path: Path) -> tuple[str, ClassSpace]:
    """The kind of heads (``model.heads``) of a checkpoint or run folder, and their classes.

    Raises :class:`CheckpointError` if it has none.
    """
    identity = open_checkpoint(path).manifest["identity"]
    try:
        keys = tuple(tuple(str(value) for value in key) for key in identity["classes"])
        names = tuple(str(name) for name in identity["names of the classes"])
        columns = tuple(str(name) for name in identity["data.labels.columns"])
        heads = str(identity["heads"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: has no classification heads") from error
    if len(names) != len(keys) or not all(len(key) == len(columns) for key in keys):
        raise CheckpointError(f"{path}: damaged, its manifest's columns, classes and names of classes do not fit")
    return heads, ClassSpace(columns, keys, names)


def _of_base(checkpoint: Checkpoint, download: bool, elsewhere: str | None) -> dict[str, torch.Tensor]:
    """What a checkpoint leaves in the file it was started from. Raises :class:`CheckpointError`."""
    said = checkpoint.manifest.get("base")
    if said is None:
        return {}
    where = elsewhere or said["path"]
    try:
        tensors = open_weights(where, download=download).tensors
    except UserError as error:
        raise CheckpointError(
            f"{checkpoint.path}: holds only what was trained; the rest is in {where}, which cannot be used ({error}); "
            "model.weights.base tells where it lies now"
        ) from error
    if not all(name in tensors for name in said["names"]) or checksum(tensors, said["names"]) != said["sha256"]:
        raise CheckpointError(
            f"{checkpoint.path}: was trained from other weights than {where} holds now (the checksum differs); "
            "model.weights.base names the right file"
        )
    return {name: tensors[name] for name in said["names"]}


def read(path: Path) -> Checkpoint:
    """Read one checkpoint folder and check it against its manifest.

    Raises :class:`CheckpointError` naming the file and what is wrong with it. Nothing in the files is executed.
    """
    manifest = read_manifest(path)
    content = {}
    for name in (WEIGHTS, TRAINING):
        try:
            # Read once, into memory: what is checked is what is used, even if the file changes afterwards.
            content[name] = (path / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path / name}: {_reason(error)}") from error
        if hashlib.sha256(content[name]).hexdigest() != manifest["sha256"].get(name):
            raise CheckpointError(f"{path / name}: damaged (its checksum is not the manifest's)")
    try:
        weights = load(content[WEIGHTS])
        training = load_pickle(content[TRAINING])
    except WeightsError as error:
        raise CheckpointError(f"{path / TRAINING}: {error}") from error
    except Exception as error:  # a damaged file can raise anything in its reader
        raise CheckpointError(f"{path}: {_reason(error)}") from error
    if not isinstance(training, dict):
        raise CheckpointError(f"{path / TRAINING}: not the training state of this project")
    return Checkpoint(path, int(manifest["step"]), weights, training, manifest)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder. Raises :class:`CheckpointError`."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder")
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / MANIFEST}: {_reason(error)}; is this a checkpoint folder?") from error
    kinds = {"step": int, "sha256": dict, "identity": dict, "metrics": dict}
    if not isinstance(manifest, dict) or not all(isinstance(manifest.get(key), kind) for key, kind in kinds.items()):
        raise CheckpointError(f"{path / MANIFEST}: not a manifest of this project")
    return manifest


def _metric(path: Path, name: str) -> float:
    try:
        return float(read_manifest(path)["metrics"][name])
    except (CheckpointError, KeyError, TypeError, ValueError):
        return float("-inf")


def _is_whole(path: Path) -> bool:
    """Whether the manifest and the files it names are there at all; reading checks their content."""
    try:
        return read_manifest(path) is not None and all((path / name).is_file() for name in (WEIGHTS, TRAINING))
    except CheckpointError:
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Make sure that a file, or a folder's list of names, survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: BaseException) -> str:
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left" in str(error):
        return "the disk is full"
    return " ".join(str(error).split()) or type(error).__name__
