"""Checkpoints that survive kills, full disks and half-written files.

    <run>/checkpoints/
        LAST                          name of the newest complete checkpoint
        step-00000500/
            model.safetensors         weights, readable by anything that reads safetensors
            training.pt               optimizer, loss scaler, progress; loadable with weights_only
            parts/shard-00001-...     with train.sharding (torch.distributed.checkpoint): what each process has of the
                                      optimizer's averages and, beside a moving average, of the weights
            manifest.json             step, metrics, identity of the run, SHA-256 of the files above

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
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from egohod.config import Config
from egohod.data.labels import ClassSpace
from egohod.errors import UserError
from egohod.loss.config import LOSSES
from egohod.model.checkpoints import HeadClasses, WeightFile, checksum, from_tensors, read_weights
from egohod.model.config import stats_name
from egohod.model.dual_encoder import Base, DualEncoder
from egohod.model.weight_files import load_pickle, write_safetensors
from egohod.runtime import UNFINISHED_PREFIX, atomic_write, file_hash, write_text

log = logging.getLogger(__name__)

_NAME = re.compile(r"step-\d{8}")
WEIGHTS, TRAINING, MANIFEST, LAST = "model.safetensors", "training.pt", "manifest.json", "LAST"
PARTS = "parts"

# Settings that always change the trajectory; :func:`identity` adds others where they differ from their defaults.
_IDENTITY = (
    *("model.name", "model.num_frames"),
    *("loss.name", "loss.boxes", "loss.learn_temperature", "train.seed", "train.global_batch_size"),
)
# Settings of how clips are drawn and changed.
_SAMPLING = (
    *("data.crop_scale_min", "data.flip", "data.hard_negatives.share"),
    *("model.patch_dropout", "model.drop_path", "train.mixup", "train.cutmix"),
)
# Settings that earlier releases did not record: a checkpoint without them is resumed with any value.
_RECORDED_LATER = (
    *("loss.margin", "loss.tau", "loss.label_smoothing", "data.train.sha256", "data.train.list_text"),
    *("data.labels.threshold", "data.labels.sentences_sha256", "model.patch_dropout_tubes", *_SAMPLING),
    *(f"data.hard_negatives.{name}" for name in ("group_size", "group_by", "window_seconds")),
)
# Settings of the model that do not change what embeds a clip, so whoever loads it need not have them. Those of the two
# paths are passed on one by one.
_NOT_OF_FEATURES = (
    *("model.fast", "model.heads", "model.drop_path", "model.patch_dropout", "model.patch_dropout_tubes"),
)
# Keys of identities as earlier releases wrote them.
_RENAMED_KEYS = {
    "checksum of the weights that are not trained": "base.sha256",
    "clips in data.train": "data.train.clips",
    "shapes of the weights": "state_dict.shapes_sha256",
    "heads": "model.heads",
    "classes": "data.classes.keys",
    "names of the classes": "data.classes.names",
}
# What holds of checkpoints from before it was written into their manifests.
_IMPLIED = {"model.image_stats": "clip"}


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or not written."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, complete and with the right checksums; its tensors are mapped from the files."""

    path: Path
    step: int
    weights: dict[str, Tensor]
    training: dict[str, Any]
    manifest: dict[str, Any]

    @property
    def parts(self) -> Path | None:
        """The folder of what the processes of a sharded run wrote; None if there is none."""
        return self.path / PARTS if len(_files(self.manifest)) > 2 else None


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, run: Path, *, keep_last: int = 2, keep_best: int = 1, best: str = ""):
        self.folder = run / "checkpoints"
        self._keep_last, self._keep_best, self._best = keep_last, keep_best, best

    def save(
        self,
        step: int,
        weights: dict[str, Tensor],
        training: dict[str, Any],
        *,
        metrics: dict[str, float],
        identity: dict[str, Any],
        base: Base | None = None,
        write_parts: Callable[[], dict[str, str]] | None = None,
    ) -> Path:
        """Write one checkpoint and delete those beyond ``keep_last`` and ``keep_best``.

        With ``base`` the weights that it names are left out. ``identity`` is what a resumed run must agree with
        (geometry, batch size, seed ...). With ``write_parts``, which is called first and gives the checksums of the
        files that it and the other processes have written to :meth:`parts`, :meth:`prepare` was called before. Raises
        :class:`CheckpointError` if it cannot be written; older checkpoints are untouched then.
        """
        final = self.path(step)
        try:
            parts: dict[str, str] = {}
            if write_parts is None:
                self.prepare()
            else:
                # Before anything that may fail: the other processes wait for this one.
                parts = write_parts()
                if missing := [name for name in parts if not (self.parts(step) / name).is_file()]:
                    raise OSError(f"{missing[0]} of another process is not here: is {self.folder} a shared folder?")
            with atomic_write(final, sync=True) as temporary:
                temporary.mkdir()
                write_safetensors(weights, temporary / WEIGHTS)
                # Nested, with numbers and lists, which safetensors has no place for.
                torch.save(training, temporary / TRAINING)
                if parts:
                    self.parts(step).rename(temporary / PARTS)
                manifest = {
                    "format": 1,
                    "step": step,
                    "metrics": metrics,
                    "identity": identity,
                    "sha256": {name: file_hash(temporary / name) for name in (WEIGHTS, TRAINING)}
                    | {f"{PARTS}/{name}": value for name, value in parts.items()},
                    # A checkpoint without one is whole.
                    **({"base": dataclasses.asdict(base)} if base else {}),
                }
                (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
                if final.exists():  # left torn by an earlier crash, or saved twice at the same step
                    self._remove(final)
            write_text(self.folder / LAST, final.name + "\n", sync=True)
        # A full disk is an OSError, safetensors' own error, or of torch.save a RuntimeError; of parts a UserError.
        except (OSError, SafetensorError, RuntimeError, UserError) as error:
            raise CheckpointError(f"{final}: not saved: {_reason(error)}; older checkpoints are untouched") from error
        self._prune(final)
        return final

    def prepare(self) -> None:
        """Make the folder, and remove what a killed process left in it. Raises :class:`OSError`."""
        # Not with its parents: a shared folder that is lost would come back on the disk below its mount point.
        self.folder.mkdir(exist_ok=True)
        # A run folder has one writer at a time, so what is unfinished is what a killed process left.
        for path in self.folder.glob(f"{UNFINISHED_PREFIX}*step-*"):
            shutil.rmtree(path, ignore_errors=True)

    def parts(self, step: int) -> Path:
        """Where the processes of a sharded run write their parts, before they become a part of the checkpoint."""
        return self.folder / f"{UNFINISHED_PREFIX}parts-{self.path(step).name}"

    def rate(self, step: int, metrics: dict[str, float]) -> None:
        """Add the metrics that a checkpoint was saved without. Raises :class:`CheckpointError`."""
        path = self.path(step)
        manifest = read_manifest(path) | {"metrics": metrics}
        try:
            write_text(path / MANIFEST, json.dumps(manifest, indent=1), sync=True)
        except OSError as error:
            raise CheckpointError(f"{path / MANIFEST}: metrics not written: {_reason(error)}") from error
        self._prune(self.steps()[-1])

    def path(self, step: int) -> Path:
        """The folder of the checkpoint of ``step``."""
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[Path]:
        """Checkpoint folders, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name))

    def set_aside_after(self, step: int) -> None:
        """Rename checkpoints of later steps to ``abandoned-*``: a run that went back to ``step`` replaces them."""
        for path in self.steps():
            if int(path.name.removeprefix("step-")) > step:
                log.warning("%s is later than the checkpoint that is resumed: renamed to abandoned-%s", path, path.name)
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

    def would_keep(self, score: float) -> bool:
        """Whether a new checkpoint with this score would be among the ``keep_best`` best; never if it is NaN."""
        best = self._ranked(self._scores())[: self._keep_best]
        # The last of them would make room for a better one, but not for an equal one: the oldest stays.
        least = best[-1][1] if best and len(best) == self._keep_best else float("-inf")
        return self._keep_best > 0 and score > least

    def _prune(self, newest: Path) -> None:
        """Keep ``newest`` and those before it, and the best ones; torn ones do not count, and stay."""
        scores = self._scores()
        best = [path for path, _ in self._ranked(scores)[: self._keep_best]]
        for path in scores.keys() - {newest, *list(scores)[-self._keep_last :], *best}:
            with contextlib.suppress(OSError):  # one checkpoint too many ends no run
                self._remove(path)

    def _scores(self) -> dict[Path, float]:
        """The metric ``best`` of each whole checkpoint, oldest first; minus infinity where it was not measured."""
        scores: dict[Path, float] = {}
        for path in self.steps():
            try:
                manifest = read_manifest(path)
            except CheckpointError:
                continue
            score = manifest["metrics"].get(self._best)
            # Whether the files are there is enough here: to read them would take minutes, and resuming does it.
            if all((path / name).is_file() for name in _files(manifest)):
                scores[path] = float(score) if isinstance(score, (int, float)) else float("-inf")
        return scores

    @staticmethod
    def _ranked(scores: dict[Path, float]) -> list[tuple[Path, float]]:
        # Of equal checkpoints the oldest stays, which a stable sort has in front.
        measured = [(path, score) for path, score in scores.items() if score > float("-inf")]
        return sorted(measured, key=lambda each: -each[1])

    def _remove(self, path: Path) -> None:
        """Delete a checkpoint folder; raises :class:`OSError` if it cannot be renamed."""
        # Renamed first: a process that is killed while it deletes must not leave a part under a checkpoint's name.
        leftover = self.folder / f"{UNFINISHED_PREFIX}{path.name}-old"
        path.rename(leftover)
        shutil.rmtree(leftover, ignore_errors=True)


def copy_to_host(state: Any, memory: dict[tuple[Any, ...], Tensor], _place: tuple[Any, ...] = ()) -> Any:
    """``state`` (nested dicts, lists and tuples) with its tensors copied, so that training may change the originals.

    The copies are in ``memory``, which is filled by the first call and overwritten by the next ones: new pages cost as
    much as copying. Waits for the device.
    """
    if isinstance(state, Tensor):
        copy = memory.get(_place)
        if copy is None or copy.shape != state.shape or copy.dtype != state.dtype:
            copy = memory[_place] = torch.empty(state.shape, dtype=state.dtype)
        return copy.copy_(state)
    if isinstance(state, dict):
        return {key: copy_to_host(value, memory, (*_place, key)) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(copy_to_host(value, memory, (*_place, at)) for at, value in enumerate(state))
    return state


def identity(
    cfg: Config, model: DualEncoder, clips: int, classes: ClassSpace | None, content: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Settings on which a checkpoint and the run that resumes it must agree for the trajectory to be the same.

    ``clips`` is the number of clips of all training sources, ``classes`` are theirs if the model has heads, ``content``
    is a hash of each source's clips by its name. Returns values as JSON has them, by the name of the setting; what is
    left out has its default.
    """
    result: dict[str, Any] = {name: attrgetter(name)(cfg) for name in _IDENTITY}
    # What auto means may change with a later release.
    result |= {"model.activation": model.activation, "model.image_stats": stats_name(model.image_stats)}
    later = ("stem_paths", "slow_every")
    result["model.fast"] = {name: value for name, value in vars(cfg.model.fast).items() if name not in later}
    if model.geometry.slowfast and cfg.model.fast.slow_every > 1:
        result["model.fast.slow_every"] = cfg.model.fast.slow_every
    if cfg.model.text:
        result["model.text"] = cfg.model.text
    if cfg.model.motion_stem:
        result["model.motion_stem"] = cfg.model.motion_stem
        # Without a stem it means nothing, and checkpoints from before it existed must still agree.
        result |= {"model.fast.stem_paths": cfg.model.fast.stem_paths} if model.geometry.slowfast else {}
    # Files may move, as a copy in the folder of each job does; the clips in them and their shares may not change.
    result["data.train.weight"] = {name: source.weight for name, source in cfg.data.train.items()}
    result["data.train.clips"] = clips
    if content is not None:
        result["data.train.sha256"] = dict(content)
    result["data.train.list_text"] = {name: source.list_text for name, source in cfg.data.train.items()}
    # Also where they have their defaults: a checkpoint without them may have been trained with any value.
    result |= {name: attrgetter(name)(cfg) for name in _SAMPLING}
    if (hard := cfg.data.hard_negatives).share > 0:
        result["data.hard_negatives.group_size"] = hard.group_size
        result["data.hard_negatives.group_by"] = list(hard.group_by)
        if "window" in hard.group_by:
            result["data.hard_negatives.window_seconds"] = hard.window_seconds
    if cfg.model.patch_dropout > 0:
        result["model.patch_dropout_tubes"] = cfg.model.patch_dropout_tubes
    # Of every parameter by name: whatever changes the architecture, also by a release of the code, shows here.
    shapes = repr([(name, tuple(value.shape)) for name, value in model.state_dict().items()])
    result["state_dict.shapes_sha256"] = hashlib.sha256(shapes.encode()).hexdigest()[:12]
    # Defaults are left out, so that checkpoints from before a setting existed still agree.
    train = ("ema", "trainable", "last_blocks", "optimizer", "layer_decay", "decay_positions")
    names = [*(f"train.{name}" for name in train), "loss.opposites", "loss.separation", "loss.mask_duplicates"]
    # Settings of the loss that it does not use may change.
    names += ["loss.separation_margin"] if cfg.loss.separation else []
    names += ["model.image_size", "model.backbone", "model.rope_time"]
    if cfg.loss.has_opposites:
        columns = {name: source.opposite_column for name, source in cfg.data.train.items() if source.opposite_column}
        result |= {f"data.train.{name}.opposite_column": column for name, column in columns.items()}
        names += ["loss.opposites_schedule"]
        if cfg.loss.opposites_schedule != "constant":
            names += ["loss.opposites_hold", "loss.opposites_end"]
    kind = LOSSES[cfg.loss.name]
    if kind.has_replacements:
        result["loss.replacements"] = cfg.loss.replacements
    for key, has_effect in (("replacement_column", kind.has_replacements), ("tag_columns", kind.has_tags)):
        values = {name: getattr(source, key) for name, source in cfg.data.train.items() if has_effect}
        result |= {f"data.train.{name}.{key}": value for name, value in values.items() if value}
    for name in names:
        if attrgetter(name)(cfg) != attrgetter(name)(Config()):
            result[name] = attrgetter(name)(cfg)
    if cfg.train.trainable == "lora":
        result["train.lora"] = dict(vars(cfg.train.lora))
    if margin := LOSSES[cfg.loss.name].margin:
        result["loss.margin"] = cfg.loss.margin or margin
    if cfg.loss.name == "sms":
        result["loss.tau"] = cfg.loss.tau
    if cfg.loss.name == "classes":
        result["loss.label_smoothing"] = cfg.loss.label_smoothing
    if cfg.data.labels.target != "narration":
        result["data.labels.target"] = cfg.data.labels.target
    if cfg.data.labels.target == "relevancy":
        result["data.labels.threshold"] = cfg.data.labels.threshold
        if cfg.data.labels.sentences is not None:
            result["data.labels.sentences_sha256"] = file_hash(cfg.data.labels.sentences)[:12]
    if model.base:
        result["base.sha256"] = model.base.sha256
    if classes is not None:
        result |= {"model.heads": cfg.model.heads, "data.labels.columns": list(classes.columns)}
        result |= {"data.classes.keys": [list(key) for key in classes.keys], "data.classes.names": list(classes.names)}
    return result


def require_identity(checkpoint: Checkpoint, current: dict[str, Any]) -> None:
    """Raise :class:`UserError` unless ``checkpoint`` is of a run with the identity ``current``."""
    saved = checkpoint.manifest["identity"]
    # Of both: a setting that only one of them has is as different as another value.
    for key in {**current, **saved}:
        if key not in saved and key in _RECORDED_LATER:
            continue
        if saved.get(key) != current.get(key):
            was, now = (values.get(key, "its default") for values in (saved, current))
            raise UserError(
                f"{checkpoint.path}: was trained with {key}={was}, this run has {now}; "
                "use the same value, or another train.output"
            )


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
    that is elsewhere now; a file of other weights is refused.

    Raises :class:`UserError` as :func:`open_checkpoint` and :func:`egohod.model.checkpoints.read_weights` do.
    """
    # A folder without a manifest may be shards of a released model.
    folder = Path(source)
    if not (folder / MANIFEST).exists() and not CheckpointStore(folder).steps():
        return read_weights(source, download=download)
    checkpoint = open_checkpoint(folder)
    identity, rest = checkpoint.manifest["identity"], checkpoint.manifest.get("base")
    # Copied: the run may still be training and delete this checkpoint, whose pages NFS would then no longer deliver.
    tensors = {name: value.clone() for name, value in checkpoint.weights.items()}
    if rest is not None:
        path = base or rest["path"]
        try:
            base_tensors = open_weights(path, download=download).tensors
        except UserError as error:
            raise CheckpointError(
                f"{checkpoint.path}: holds only what was trained; the rest is in {path}, which cannot be used "
                f"({error}); set model.weights.base to where it is now"
            ) from error
        # A checksum of the tensors, not of the file: the same weights may be saved again, or in another format.
        is_complete = all(name in base_tensors for name in rest["names"])
        if not is_complete or checksum(base_tensors, rest["names"]) != rest["sha256"]:
            raise CheckpointError(
                f"{checkpoint.path}: was trained from other weights than {path} holds now (the checksum differs); "
                "set model.weights.base to the right file"
            )
        tensors = {name: base_tensors[name] for name in rest["names"]} | tensors
    weights = from_tensors(str(checkpoint.path), tensors)
    # What convert_checkpoint.py --inspect shows.
    weights.beside = {name: str(value) for name, value in identity.items()}
    if "data.classes.keys" in identity:
        kind, classes = classes_of(checkpoint)
        weights.heads = HeadClasses(kind, classes.keys)
    weights.settings = {
        name: value
        for name, value in identity.items()
        if name.startswith(("model.", "loss.")) and name not in _NOT_OF_FEATURES
    }
    # A model with one path ignores the settings of the other.
    if weights.slowfast:
        weights.settings |= {f"model.fast.{name}": value for name, value in identity.get("model.fast", {}).items()}
    return weights


def classes_of(source: Path | Checkpoint) -> tuple[str, ClassSpace]:
    """The kind of heads (``model.heads``) of a checkpoint or run folder, and their classes.

    Raises :class:`CheckpointError` if it has none.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    identity = checkpoint.manifest["identity"]
    try:
        # As text throughout: a manifest by another hand may have numbers, and classes are compared as text.
        keys = tuple(tuple(str(value) for value in key) for key in identity["data.classes.keys"])
        names = tuple(str(name) for name in identity["data.classes.names"])
        columns = tuple(str(name) for name in identity["data.labels.columns"])
        kind = str(identity["model.heads"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint.path}: has no classification heads") from error
    if len(names) != len(keys) or not all(len(key) == len(columns) for key in keys):
        raise CheckpointError(
            f"{checkpoint.path}: damaged, its manifest's columns, classes and names of classes do not fit"
        )
    return kind, ClassSpace(columns, keys, names)


def read(path: Path, *, verify: bool = True) -> Checkpoint:
    """Open one checkpoint folder and check it against its manifest.

    The tensors are mapped from the files: they take no memory of their own, processes of one node share them, and they
    hold their file open, so whoever continues with them copies them. Without ``verify`` checksums are not computed: for
    processes that know that another one on their node has done so, and whose reads come from its page cache.

    Raises :class:`CheckpointError` naming the file and what is wrong with it. Nothing in the files is executed.
    """
    manifest = read_manifest(path)
    for name in _files(manifest) if verify else ():
        try:
            # In small pieces. Nobody writes to a checkpoint once it has its name, so what was checked is what is used.
            digest = file_hash(path / name)
        except OSError as error:
            raise CheckpointError(f"{path / name}: {_reason(error)}") from error
        if digest != manifest["sha256"].get(name):
            raise CheckpointError(f"{path / name}: damaged (its checksum is not the manifest's)")
    try:
        weights = load_file(path / WEIGHTS)
        training = load_pickle(path / TRAINING)
    except UserError as error:
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
    # Everything else here sees today's names only.
    renamed = {_RENAMED_KEYS.get(name, name): value for name, value in manifest["identity"].items()}
    # Once [path of the annotations, weight] of each source. What was in that file is not recorded.
    if isinstance(sources := renamed.pop("data.train", None), dict):
        renamed["data.train.weight"] = {
            name: value[-1] if isinstance(value, list) and value else value for name, value in sources.items()
        }
    return manifest | {"identity": _IMPLIED | renamed}


def _files(manifest: Mapping[str, Any]) -> list[str]:
    """Names of the files of a checkpoint, beside its manifest."""
    # By its form: a manifest by another hand must not lead to files elsewhere.
    return [WEIGHTS, TRAINING, *(name for name in manifest["sha256"] if re.fullmatch(rf"{PARTS}/[\w-][\w.-]*", name))]


def _reason(error: BaseException) -> str:
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left" in str(error):
        return "the disk is full"
    return " ".join(str(error).split()) or type(error).__name__
