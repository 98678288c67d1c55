"""Opening the weight files of the field. Nothing that a file says is ever executed, whoever wrote it.

Three containers: pickles of ``torch.save`` (zip or the older format; OpenAI's plain state dicts, open_clip, upstream
EgoHOD, AVION), TorchScript archives (OpenAI's releases) and safetensors (open_clip, this project); the first and the
last also in shards with an index. A few bytes of a file cannot take any amount of memory either: what its sizes say is
checked against its length first.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import mmap
import os
import pickle
import re
import reprlib
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from egohod import pickles
from egohod.model.config import IMAGE_STATS
from egohod.model.dual_encoder import Base, DualEncoder
from egohod.model.slowfast import SlowFastTransformer
from egohod.model.vision import ACTIVATIONS, Block
from egohod.model.weight_names import (
    Family,
    Shape,
    WeightsError,
    is_average,
    layout,
    model_names,
    ours,
    shape_of,
    spelling,
    upstreams,
    useless,
    without_wrappers,
)

_STATES = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights", "student")
"""Under which key a checkpoint keeps its weights, the likeliest first; others are looked into after these."""


class HeadClasses(NamedTuple):
    """Which classes a file's classification heads are for."""

    kind: str
    """``model.heads``: joint or parts."""
    keys: tuple[tuple[str, ...], ...]
    """One for each class: its values of ``data.labels.columns``."""


@dataclass
class WeightFile:
    """The weights of a file under our names, with what the file says about itself."""

    source: str
    """File, folder or tag."""
    family: Family
    container: str
    spelling: str
    """How the file spells the blocks: plain or flash."""
    tensors: dict[str, Tensor]
    """As stored, in any floating-point type; the patch embedding as a matrix [D, 3 P P]."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Tensors that no model needs, under the file's own names, with the reason."""
    beside: dict[str, str] = field(default_factory=dict)
    """What else the file holds, described."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Knobs that give the weights their meaning and that no shape tells (``model.activation``, ...). Files of this
    project know them; of upstream's slow-fast files the arrangement is known."""
    heads: HeadClasses | None = None
    """None if it has no heads, or does not record their classes."""
    remarks: list[str] = field(default_factory=list)
    """Which of several state dicts was taken."""

    @property
    def shape(self) -> Shape | None:
        """What the shapes say about the model; None if it is not a whole one."""
        return shape_of(self.tensors)

    @property
    def model_knobs(self) -> dict[str, Any]:
        """Recorded settings of the model as knobs of the section ``model`` (``activation``, ``fast.position``, ...)."""
        knobs = {name.removeprefix("model."): each for name, each in self.settings.items() if name.startswith("model.")}
        if shape := self.shape:
            knobs["embed_dim"] = shape.embed_dim
            knobs |= {"num_frames": shape.num_frames} if shape.num_frames else {}
        return knobs

    def without_heads(self) -> WeightFile:
        """The same without classification heads and the classes that they are for."""
        tensors = {name: value for name, value in self.tensors.items() if not name.startswith("heads.")}
        return dataclasses.replace(self, tensors=tensors, heads=None)


def read_weights(source: str | Path, *, download: bool = False) -> WeightFile:
    """Open a weight file of any family.

    Args:
        source: a local file, the index of a sharded one or the folder with it, or an open_clip tag such as
            ``ViT-B-16:laion2b_s34b_b88k``.
        download: whether open_clip may fetch what a tag names; without it only its local cache is looked at.

    Raises:
        WeightsError: no such file, cut off, damaged, a pickle that asks for more than weights, or a strange model.
    """
    path = Path(source)
    if not path.exists() and _TAG.fullmatch(str(source)):
        path = _find_tag(str(source), download)
    with _in_one_line(str(source)):
        weights = _named(str(source), *_open(path))
        _check_size(weights.tensors, path)
        return weights


def read_tensors(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict of any model, names without wrappers such as ``module.``, and remarks on which was taken.

    Raises :class:`WeightsError` as :func:`read_weights` does.
    """
    with _in_one_line(str(path)):
        state, _, remarks = _state_dict(_open(path)[1])
        return {without_wrappers(name): value for name, value in state.items()}, remarks


def _check_size(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that repeat a few numbers to a size that no memory holds: copying them writes them out."""
    folder = path if path.is_dir() else path.parent
    files = [path] if find_index(path) is None and not path.name.endswith(INDEX) else list(folder.iterdir())
    size, wanted = sum(each.stat().st_size for each in files), sum(value.nbytes for value in tensors.values())
    if wanted > _MORE_BYTES + _TIMES_THE_FILE * size:
        raise WeightsError(f"its tensors have {wanted:,} bytes, in {size:,} bytes of file; damaged")


@contextmanager
def _in_one_line(source: str) -> Iterator[None]:
    """Whatever goes wrong within becomes a :class:`WeightsError` that begins with ``source``."""
    try:
        yield
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from error
    except Exception as error:  # a damaged file can raise anything in its reader
        reason = " ".join(str(error).strip().partition("\n")[0].split())[:300] or type(error).__name__
        raise WeightsError(f"{source}: not a readable weights file ({reason})") from error


def from_tensors(source: str, tensors: Mapping[str, Tensor]) -> WeightFile:
    """The same for weights that are in memory already, such as those of a checkpoint folder of this project."""
    return _named(source, "safetensors", dict(tensors), {})


def _named(source: str, container: str, content: Any, metadata: Mapping[str, str]) -> WeightFile:
    """Names, family and the rest of what a file held. Raises :class:`WeightsError` without the file's name."""
    state, beside, remarks = _state_dict(content)
    short, outside, more = model_names(state)
    kind = layout(short.values())
    dropped = useless(short.values())
    tensors: dict[str, Tensor] = {}
    for full, name in short.items():
        if name in dropped:
            continue
        own, value = ours(name, kind), state[full]
        if own in tensors:
            raise WeightsError(f"holds {own} twice, in two spellings")
        if own == "visual.conv1.weight":
            value = value.flatten(1)
        elif own in ("logit_scale", "logit_bias") and value.numel() == 1:
            value = value.reshape(())
        tensors[own] = value
    family = _family(kind, container, tensors, dropped, beside, metadata)
    described = {name: describe(value) for name, value in beside.items()}
    settings = json.loads(metadata.get("settings", "{}"))
    if not isinstance(settings, dict):
        raise WeightsError("its metadata names no settings")
    if family is Family.UPSTREAM and any(".adapter." in name for name in tensors):
        settings = UPSTREAM_ARRANGEMENT | settings
    if family is Family.AVION:
        settings = {"model.image_stats": _avion_image_stats(beside)} | settings
    return WeightFile(
        source,
        family,
        container,
        spelling(short.values()),
        tensors,
        dropped | outside,
        described,
        settings,
        remarks=remarks + more,
    )


def _state_dict(content: Any) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """The state dict somewhere in what a file holds, what is beside it, and which others there are."""
    states = sorted(_state_dicts(content, ()), key=lambda each: _rank(each[0]))
    beside: dict[str, Any] = {}
    if states:
        path, state = states[0]
        for key in path:
            beside |= {str(name): value for name, value in content.items() if name != key}
            content = content[key]
    else:
        inner = [
            content[key] for key in _STATES if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)
        ]
        state = inner[0] if inner else content
    if not isinstance(state, Mapping) or not state:
        raise WeightsError("holds no state dict (a mapping of names to tensors)")
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if str(name).endswith("_extra_state"):
            continue
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise WeightsError(f"holds no state dict (a mapping of names to tensors): '{str(name)[:80]}' is no tensor")
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise WeightsError(f"'{name}' is no plain tensor of numbers")
        tensors[name] = value
    others = [f"'{'.'.join(other)}'" for other, _ in states[1:]]
    return tensors, beside, [f"taken is '{'.'.join(states[0][0])}', not {', '.join(others)}"] if others else []


def _state_dicts(content: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Mappings with tensors under dotted names, and the keys that lead there."""
    if not isinstance(content, Mapping):
        return
    if any(isinstance(value, Tensor) and isinstance(name, str) and "." in name for name, value in content.items()):
        yield path, content
    elif len(path) < 3:
        for key, value in content.items():
            if isinstance(key, str):
                yield from _state_dicts(value, (*path, key))


def _rank(path: Sequence[str]) -> tuple[bool, int]:
    """State dicts by how likely they are the model's: averages last."""
    places = [_STATES.index(key) for key in path if key in _STATES]
    return any(is_average(key) for key in path), min(places, default=len(_STATES))


def _family(
    kind: str,
    container: str,
    tensors: Mapping[str, Tensor],
    dropped: Mapping[str, str],
    beside: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> Family:
    """Whose file it is. Where names and company leave it open, the likelier one; loading is the same."""
    if metadata.get("family") in set(Family):
        return Family(metadata["family"])
    if kind == "clip":
        half = {value.dtype for name, value in tensors.items() if name.endswith(("projection", "ln_post.weight"))}
        openai = container == "TorchScript archive" or "input_resolution" in dropped or half == _OPENAI_TYPES
        return Family.OPENAI if openai else Family.OPEN_CLIP
    if container == "safetensors" and not dropped:
        return Family.OURS
    if any("slowfast" in name or ".adapter" in name for name in tensors):
        return Family.UPSTREAM
    args = beside.get("args")
    if isinstance(args, Inert) and args.name == "argparse.Namespace" and "pretrain_zoo" in (args.state or {}):
        return Family.AVION
    projection = tensors.get("visual.image_projection")
    return Family.AVION if projection is not None and projection.shape[-1] == AVION_EMBED_DIM else Family.UPSTREAM


def _avion_image_stats(beside: Mapping[str, Any]) -> str:
    """What AVION's training script normalised pixels with: its option ``norm_style``, openai unless it says timm."""
    args = beside.get("args")
    style = (args.state or {}).get("norm_style") if isinstance(args, Inert) else None
    return "imagenet" if style == "timm" else "avion"


_OPENAI_TYPES = {torch.float16, torch.float32}
"""OpenAI's own code holds projections in half precision and norms in single."""

UPSTREAM_ARRANGEMENT = {"model.fast.position": "after", "model.fast.pool": "cls"}
"""Where upstream's motion adapters stand, and what is projected."""

AVION_EMBED_DIM = 256
"""AVION's released models share a space of 256 dimensions, the default of its training script; upstream's have 512."""


# --------------------------------------------------------------------------------------------------
# Containers
# --------------------------------------------------------------------------------------------------

# Tensors may share or repeat their numbers, but not without end.
_MORE_BYTES, _TIMES_THE_FILE = 1 << 30, 16
# The format's own limit is 100 MB.
_LONGEST_HEADER = 100 << 20
_MOST_MODULES = 20_000


def _open(path: Path) -> tuple[str, Any, dict[str, str]]:
    """Container, content and metadata. Raises :class:`WeightsError` without the file's name, and what readers raise."""
    if not path.exists():
        raise WeightsError("no such file")
    index = path if path.is_file() and path.name.endswith(INDEX) else find_index(path)
    if index is not None:
        return _read_shards(index)
    if not path.is_file():
        files = sorted(each.name for each in path.glob("*") if each.suffix in (".safetensors", ".pt", ".pth", ".bin"))
        if any(path.glob("*.distcp")):
            hint = "; convert it first: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
        else:
            hint = f"; name the file, such as {files[0]}" if files else ""
        raise WeightsError(f"not a file of weights, and neither a checkpoint nor an index of shards is in it{hint}")
    container = _container(path)
    if container == "safetensors":
        content, metadata = _read_safetensors(path)
    else:
        metadata = {}
        content = _read_torchscript(path) if container == "TorchScript archive" else load_pickle(path, stand_ins())
    return container, content, metadata


INDEX = ".index.json"
"""How the index of a sharded file ends: ``model.safetensors.index.json``, ``pytorch_model.bin.index.json``."""


def find_index(folder: Path) -> Path | None:
    """The index of the shards in a folder, safetensors before pickles; None if there is none."""
    return max(
        sorted(folder.glob(f"*{INDEX}"), reverse=True), key=lambda each: "safetensors" in each.name, default=None
    )


def _read_shards(index: Path) -> tuple[str, dict[str, Tensor], dict[str, str]]:
    """The tensors that an index names, from files beside it and no others."""
    try:
        places = json.loads(index.read_bytes())["weight_map"]
        by_shard: dict[str, list[str]] = {}
        for name, shard in places.items():
            by_shard.setdefault(shard, []).append(name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{index.name} is no index of shards: it needs a weight_map of names to files") from error
    strange = [shard for shard in by_shard if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard]
    if strange:
        raise WeightsError(f"{index.name} names the shard {str(strange[0])[:80]!r}, which is no plain file name")
    absent = sorted(shard for shard in by_shard if not index.with_name(shard).is_file())
    if absent:
        raise WeightsError(f"{len(absent)} of its {len(by_shard)} shards are not there, such as {absent[0]}")
    tensors: dict[str, Tensor] = {}
    containers = set()
    for shard, names in sorted(by_shard.items()):
        with _in_one_line(shard):
            container, content, _ = _open(index.with_name(shard))
            containers.add(container)
            held, _, _ = _state_dict(content)
            lacking = [name for name in names if name not in held]
            if lacking:
                raise WeightsError(f"lacks {lacking[0]}, which {index.name} says is in it")
            tensors |= {name: held[name] for name in names}
    if not tensors:
        raise WeightsError(f"{index.name} names no tensors")
    return containers.pop() if len(containers) == 1 else "shards of several kinds", tensors, {}


def _container(path: Path) -> str:
    """What kind of file it is. Raises :class:`WeightsError` for what is no weights file, and for cut-off ones."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
    if not size:
        raise WeightsError("the file is empty; the download has failed")
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError("a Git LFS pointer, not the weights; fetch them with: git lfs pull")
    if start.lstrip()[:1] == b"<":
        raise WeightsError("a web page, not weights; the download went wrong")
    if start.startswith(b"PK"):
        if not zipfile.is_zipfile(path):
            raise WeightsError(f"cut off after {size:,} bytes: the download is not complete")
        with zipfile.ZipFile(path) as archive:
            code = any(_inside(each) == "code" for each in archive.infolist())
        return "TorchScript archive" if code else "pickle (zip)"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32:
        return "safetensors"
    return "pickle (older format)"


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _LONGEST_HEADER:
            raise WeightsError(f"not a safetensors file: its header would have {length:,} bytes; damaged")
        header = file.read(length)
    if len(header) == length:
        entries = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        length += max((entry["data_offsets"][1] for entry in entries), default=0)
    if size < 8 + length:
        raise WeightsError(f"cut off after {size:,} of {8 + length:,} bytes: the download is not complete")
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def load_pickle(source: Path | bytes, allowed: Sequence[Any] = ()) -> Any:
    """What ``torch.save`` wrote, by ``torch.load(weights_only=True)``, after a look at what that would allocate.

    Args:
        source: the file, whose tensors are mapped instead of read, or its content.
        allowed: further classes, as for ``torch.serialization.safe_globals``.

    Raises:
        WeightsError: refused, or cut off, without the file's name. What else is wrong raises what the readers raise.
    """
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
        # Mapped instead of read: an optimizer's state is not even looked at.
        is_mapped = is_zip and isinstance(source, Path)
        try:
            if is_zip:
                _check_zip(file, size)
            else:
                _check_older_format(source)
            file.seek(0)
            opened: Any = source if is_mapped else file
            with torch.serialization.safe_globals(list(allowed)):
                return torch.load(opened, map_location="cpu", weights_only=True, mmap=is_mapped or None)
        except pickle.UnpicklingError as error:
            raise WeightsError(_explain(error)) from error
        except (EOFError, RuntimeError) as error:
            if isinstance(error, EOFError) or "unexpected EOF" in str(error):
                raise WeightsError(f"cut off after {size:,} bytes: the download is not complete") from error
            raise


def _inside(entry: zipfile.ZipInfo) -> str:
    """What an archive's entry is, or the folder of it, within the one folder that all entries are in."""
    return entry.filename.partition("/")[2].partition("/")[0]


def _check_archive(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse an archive whose entries are larger than itself, by compression or by sharing their bytes."""
    # PyTorch compresses code, which is not read here, and nothing else.
    declared = sum(each.file_size for each in archive.infolist() if _inside(each) != "code")
    if declared > size:
        raise WeightsError(
            f"its entries say that they hold {declared:,} bytes, in a file of {size:,}; PyTorch writes none like it"
        )


def _check_zip(file: BinaryIO, size: int) -> None:
    with zipfile.ZipFile(file) as archive:
        _check_archive(archive, size)
        for entry in archive.infolist():
            if entry.filename.endswith(".pkl") and _inside(entry) != "code":
                content = archive.read(entry)
                try:
                    scanned = pickles.scan(content)
                except EOFError as error:  # the archive itself is whole
                    raise WeightsError(f"damaged: {error}") from error
                pickles.check_sharing(content)
                _check_calls(scanned, content.count(pickle.REDUCE))


def _check_older_format(source: Path | bytes) -> None:
    """Five pickles in a row: a number, a version, the system, the content, the keys of the storages that follow."""
    with ExitStack() as stack:
        content: bytes | mmap.mmap
        if isinstance(source, bytes):
            content = source
        else:
            file = stack.enter_context(source.open("rb"))
            content = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        end = 0
        for _ in range(5):
            if end == len(content):
                break  # one of another program, which PyTorch's reader names
            begin, scanned = end, pickles.scan(content, end)
            end = scanned.end
            pickles.check_sharing(content[begin:end])
            _check_calls(scanned, content[begin:end].count(pickle.REDUCE))


def _check_calls(scanned: pickles.Scanned, calls: int) -> None:
    """Refuse calls that make memory out of nothing; some are on PyTorch's own list of what is harmless."""
    makers = scanned.names & {"builtins.bytearray", "__builtin__.bytearray"}
    if makers:
        raise WeightsError(_refusal(next(iter(makers))))
    if "_codecs.encode" in scanned.names and calls * scanned.longest > _MORE_BYTES:
        raise WeightsError(f"refused: up to {calls:,} copies of a text of {scanned.longest:,} characters")


def _explain(error: pickle.UnpicklingError) -> str:
    """Why a pickle was refused. PyTorch's own text advises to load it unsafely, so it is not passed on."""
    wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
    if wanted:
        return _refusal(wanted.group(1))
    return "refused: not a weights file, or a pickle of something else than plain tensors; nothing in it was run"


def _refusal(name: str) -> str:
    return (
        f"refused: it asks for {name}, which is no part of plain weights and could run code; "
        "nothing was run. Save it as a plain state dict of tensors first"
    )


class _Module:
    """Stands for any class of a TorchScript archive: it holds attributes and does nothing."""


class _ArchiveUnpickler(pickle.Unpickler):
    """Reads the tensors of a TorchScript archive; ``torch.jit.load`` would run code that the file brings along."""

    DTYPES: ClassVar[dict[str, torch.dtype]] = {
        "FloatStorage": torch.float32,
        "HalfStorage": torch.float16,
        "BFloat16Storage": torch.bfloat16,
        "DoubleStorage": torch.float64,
        "LongStorage": torch.int64,
        "IntStorage": torch.int32,
        "BoolStorage": torch.bool,
    }

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        content = archive.read(f"{root}/data.pkl")
        pickles.scan(content)
        pickles.check_sharing(content)
        super().__init__(io.BytesIO(content))
        self._archive, self._root = archive, root
        self._storages: dict[str, Any] = {}
        # Made anew for each file, so that none can leave a mark on what the next one is read with.
        self._module = type("Module", (_Module,), {})

    def find_class(self, module: str, name: str) -> Any:
        """Attribute holders for the archive's own classes, tensors and ordered dictionaries; nothing else."""
        if module.split(".")[0] == "__torch__":
            return self._module
        if module == "torch" and name in self.DTYPES:
            return self.DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list
        raise WeightsError(f"refused: it asks for {module}.{name}, which is no part of plain weights; nothing was run")

    def persistent_load(self, pid: Any) -> Any:
        """A storage: its bytes lie beside the pickle."""
        _, dtype, key, *_ = pid
        if key not in self._storages:
            content = bytearray(self._archive.read(f"{self._root}/data/{key}"))
            storage = torch.frombuffer(content, dtype=torch.uint8).untyped_storage()
            self._storages[key] = torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)
        return self._storages[key]


def _rebuild(storage: Any, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> Tensor:
    """A view of a storage; PyTorch's function would make a storage larger that is too small for it."""
    last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True)) if all(size) else -1
    if min((offset, *size, *stride)) < 0 or last >= storage._size():
        raise WeightsError("a tensor reaches beyond its numbers; damaged")
    return torch._utils._rebuild_tensor_v2(storage, offset, tuple(size), tuple(stride), False, OrderedDict())


def _read_torchscript(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        _check_archive(archive, path.stat().st_size)
        root = archive.namelist()[0].split("/")[0]
        return dict(_tensors(_ArchiveUnpickler(archive, root).load()))


def _tensors(module: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested attribute holders by dotted name."""
    todo, seen = [("", module)], 0
    while todo:
        prefix, holder = todo.pop()
        seen += 1
        if seen > _MOST_MODULES:  # holders that hold one another
            raise WeightsError(f"more than {_MOST_MODULES:,} modules; damaged")
        for name, value in vars(holder).items():
            if isinstance(value, Tensor):
                yield prefix + name, value
            elif isinstance(value, _Module):
                todo.append((f"{prefix}{name}.", value))


# --------------------------------------------------------------------------------------------------
# Tags of open_clip
# --------------------------------------------------------------------------------------------------

_TAG = re.compile(r"[\w.-]+:[\w.-]+")


def _find_tag(source: str, download: bool) -> Path:
    """The local file that an open_clip tag stands for. Raises :class:`WeightsError`."""
    from huggingface_hub import constants, try_to_load_from_cache
    from open_clip import pretrained

    model, _, tag = source.partition(":")
    entry = pretrained.get_pretrained_cfg(model, tag)
    if not entry:
        tags = pretrained.list_pretrained_tags_by_model(model)
        hint = f"its tags are {', '.join(tags)}" if tags else f"it knows no model '{model}' either"
        raise WeightsError(f"{source}: no such file, and open_clip knows no such tag; {hint}")
    folders = []
    if entry.get("hf_hub"):
        repository, _, name = entry["hf_hub"].rpartition("/")
        stem = (name or "open_clip_pytorch_model.bin").rpartition(".")[0]
        names = [f"{stem.replace('_pytorch', '')}.safetensors", f"{stem}.safetensors", name or f"{stem}.bin"]
        for each in names:
            cached = try_to_load_from_cache(repository, each)
            if isinstance(cached, str):
                return Path(cached)
        folders.append(str(constants.HF_HUB_CACHE))
    if entry.get("url"):
        # Not Path.expanduser, which fails for a user without HOME and without an entry in the list of users.
        cached = Path(os.path.expanduser("~/.cache/clip")) / entry["url"].rpartition("/")[2]
        if cached.is_file():
            return cached
        folders.append(str(cached.parent))
    if not download:
        raise WeightsError(
            f"{source}: open_clip knows it, but it is not in its local cache ({' or '.join(folders)}), and nothing is "
            "downloaded unless asked: model.weights.download=true, or --download of tools/convert_checkpoint.py"
        )
    if not all(Path(folder).is_absolute() for folder in folders):
        raise WeightsError(f"{source}: there is no home folder to download it to; set HOME (or HF_HOME) to a folder")
    try:
        return Path(pretrained.download_pretrained(entry))
    except Exception as error:  # the network has many ways to fail
        raise WeightsError(f"{source}: open_clip could not download it: {' '.join(str(error).split())}") from error


# --------------------------------------------------------------------------------------------------
# Weights that stay in the file they came from
# --------------------------------------------------------------------------------------------------


def base_of(model: nn.Module, content: WeightFile) -> Base | None:
    """What ``model`` keeps of the file it was started from; None if it trains everything."""
    unchanged = [
        name
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
        and name in content.tensors
        and content.tensors[name].shape == parameter.shape
        and bool((content.tensors[name].to(parameter) == parameter).all())
    ]
    # A fixed temperature is not worth a second file.
    if all(content.tensors[name].dim() == 0 for name in unchanged):
        return None
    # Whoever opens the checkpoint may stand in another folder.
    file = Path(content.source)
    return Base(str(file.resolve() if file.exists() else file), tuple(unchanged), checksum(content.tensors, unchanged))


def checksum(tensors: Mapping[str, Tensor], names: Iterable[str]) -> str:
    """SHA-256 of some tensors as float32, whatever type a file holds them in."""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode())
        digest.update(tensors[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------
# Objects beside the weights
# --------------------------------------------------------------------------------------------------

# A checkpoint of another project often carries its configuration and scores: argparse, OmegaConf and NumPy objects.
# None of their classes is imported to read it: each is replaced by a stand-in, which cannot run code whatever the file
# contains. Classes that are not listed are refused.


class Inert:
    """Holds the arguments and the state that a pickle gives an object."""

    name: ClassVar[str] = "object"
    parts: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __setstate__(self, state: Any) -> None:
        self.state = state


_MOST_VALUES = 10_000


def _empty(*_: Any) -> dict[Any, Any]:
    return {}


_OMEGACONF = (
    *("dictconfig.DictConfig", "listconfig.ListConfig", "base.Metadata", "base.ContainerMetadata", "nodes.AnyNode"),
    *("nodes.StringNode", "nodes.IntegerNode", "nodes.FloatNode", "nodes.BooleanNode"),
)
_NUMPY = ("dtype", "ndarray", "core.multiarray.scalar", "core.multiarray._reconstruct")
_NUMPY_2 = ("_core.multiarray.scalar", "_core.multiarray._reconstruct")
_TYPES = ("typing.Any", *(f"builtins.{name}" for name in ("dict", "list", "tuple", "str", "int", "float", "bool")))

ALLOWED = (
    "argparse.Namespace",
    *(f"omegaconf.{name}" for name in _OMEGACONF),
    *(f"numpy.{name}" for name in (*_NUMPY, *_NUMPY_2)),
    *_TYPES,
)
"""Classes and functions that have a stand-in. ``collections.defaultdict`` becomes a plain dict."""


def stand_ins() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """What to hand to ``torch.serialization.safe_globals``; made anew, so that no file can leave a mark on them."""
    return [
        *((type("Inert", (Inert,), {"name": name}), name) for name in ALLOWED),
        (_empty, "collections.defaultdict"),
    ]


def plain(value: Any) -> Any:
    """Stand-ins as plain values: dicts, lists, numbers, text; what has no plain form becomes its name.

    Of values that hold one another, or the same one many times, so much is shown as a person may want to read.
    """
    left = _MOST_VALUES

    def walk(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if depth > 20 or left < 0:
            return "..."
        if isinstance(value, Inert):
            held = _content(value)
            return walk(held, depth + 1) if isinstance(held, (Mapping, list, Inert)) else held
        if isinstance(value, Mapping):
            return {_key(key): walk(inner, depth + 1) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [walk(inner, depth + 1) for inner in value]
        if isinstance(value, Tensor):
            return f"tensor {list(value.shape)}"
        return value if value is None or isinstance(value, (str, int, float, bool)) else type(value).__name__

    return walk(value, 0)


def _key(key: Any) -> Any:
    return key if isinstance(key, (str, int, float)) else type(key).__name__


def _content(value: Inert) -> Any:
    """What a stand-in's object is about."""
    kind = value.name.rpartition(".")[2]
    state = value.state if isinstance(value.state, Mapping) else {}
    if kind == "Namespace":
        return state
    if kind in ("DictConfig", "ListConfig"):
        return state.get("_content")
    if kind.endswith("Node"):
        return state.get("_val")
    if kind == "scalar":
        return _number(value)
    if kind == "_reconstruct":
        shape = value.state[1] if isinstance(value.state, tuple) and len(value.state) > 1 else "?"
        return f"array {reprlib.repr(shape)}"
    return value.name


def _number(scalar: Inert) -> Any:
    """The value of numpy's ``scalar(dtype, bytes)``."""
    match scalar.parts:
        case (Inert(parts=(str(code), *_)), bytes(content)) if re.fullmatch(r"[biuf]\d", code):
            if len(content) == int(code[1]):
                return np.frombuffer(content, dtype=code)[0].item()
    return scalar.name


def describe(value: Any) -> str:
    """What lies beside the weights, in one line."""
    kind = f"{value.name}: " if isinstance(value, Inert) and "numpy" not in value.name else ""
    value = plain(value)
    if isinstance(value, dict):
        shown = [f"{key}={_short(inner)}" for key, inner in islice(value.items(), 12)]
        more = f", ... ({len(value)} in all)" if len(value) > 12 else ""
        return f"{kind}{', '.join(shown)}{more}" if value else f"{kind}empty"
    return f"{kind}{_short(value)}"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{len(value)} values}}"
    if isinstance(value, list) and len(value) > 4:
        return f"[{len(value)} values]"
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


__all__ = ["Family", "WeightFile", "WeightReport", "WeightsError", "load_state", "load_weights", "read_weights"]

log = logging.getLogger(__name__)

PROJECTIONS = ("visual.image_projection", "textual.text_projection", "logit_scale")
"""What the published recipe starts anew from CLIP: both output projections and the temperature."""

TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# --------------------------------------------------------------------------------------------------
# Loading into a model
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """A part that not every model has."""

    name: str
    pattern: str
    only_trains: bool = False
    """Whether it shapes the loss and no feature, so that it may come and go without being asked."""


PARTS = (
    _Part("temporal embedding", r"visual\.temporal_embedding"),
    _Part("spatial branch of the motion adapters", r"visual\..*\.adapter\.conv2d\..*"),
    _Part("motion adapters", r"visual\..*\.adapter\..*"),
    _Part("merge of the two paths", r"slowfast_projection"),
    _Part("offset of the sigmoid loss", r"logit_bias", only_trains=True),
    _Part("classification heads", r"heads\..*", only_trains=True),
    _Part("head of the box loss", r"visual\.box_head\..*", only_trains=True),
)


@dataclass
class WeightReport:
    """What happened to every weight of a file and of the model, under our names."""

    source: str
    family: Family
    taken: list[str] = field(default_factory=list)
    """Copied as they are."""
    resized: dict[str, str] = field(default_factory=dict)
    """Adapted to the model, with both shapes."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Tensors of the file that were not used, with the reason."""
    missing: dict[str, str] = field(default_factory=dict)
    """Parameters of the model that kept their initial values, with the reason."""
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{self.source} ({self.family}): {len(self.taken)} tensors taken over"]
        if self.resized:
            parts.append("resized: " + ", ".join(f"{name} {shapes}" for name, shapes in self.resized.items()))
        parts += [f"not taken over: {text}" for text in _by_reason(self.dropped)]
        parts += [f"kept their initial values: {text}" for text in _by_reason(self.missing)]
        return "; ".join(parts + self.notes)


def _by_reason(names: Mapping[str, str]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for name, reason in names.items():
        reasons.setdefault(reason, []).append(name)
    return [f"{_list(of_reason, 6)} ({reason})" for reason, of_reason in reasons.items()]


def load_weights(
    model: nn.Module, weights: WeightFile, *, adapt: bool = False, projections: str = "auto"
) -> WeightReport:
    """Put the weights of a file into ``model``; they become the model's type. All is checked before anything is copied.

    Args:
        model: any module whose parameters have this project's names.
        weights: what :func:`read_weights` returns.
        adapt: whether to resize the temporal, spatial and text position embeddings (linearly, bicubic, by cutting) to
            the model's, and to start parts that a trained model does not have, such as motion adapters, anew.
        projections: ``keep`` takes over both output projections and the temperature, ``fresh`` leaves the model's, as
            the published recipe does; ``auto`` is fresh for CLIP models and keep for trained video models.

    Raises:
        WeightsError: one line that names tensors, both shapes, and the knob that would help.
    """
    own = model.state_dict()
    report = WeightReport(weights.source, weights.family, dropped=dict(weights.dropped), notes=list(weights.remarks))
    theirs = dict(weights.tensors)
    fresh = starts_projections_anew(weights, projections)
    if fresh:
        for name in PROJECTIONS:
            if theirs.pop(name, None) is not None:
                report.dropped[name] = "model.weights.projections=fresh"
    fitting = _Fitting(own, theirs, report, adapt, weights.family.is_clip, fresh)
    new = fitting.run()
    warning = ""
    for key, here in _meaning(model).items():
        there = weights.settings.get(key, here)
        if there != here and key == "model.image_stats" and weights.family is not Family.OURS:
            # Known by the family alone, and a run may well go on with other statistics.
            warning = f"{weights.family} trains with {key}={there}, here it is {here}"
        elif there != here:
            fitting.complaints.append(f"they were trained with {key}={there}, not {here}")
    if fitting.complaints:
        geometry = getattr(model, "geometry", None)
        here = f"{geometry.name}, {getattr(model, 'num_frames', '?')} frames" if geometry else type(model).__name__
        raise WeightsError(
            f"{weights.source} ({weights.family}): these weights do not fit the model ({here}): "
            f"{'; '.join(fitting.complaints)}"
        )
    if "logit_scale" in new and not own["logit_scale"].isclose(new["logit_scale"].to(own["logit_scale"]), atol=1e-3):
        old_and_new = [f"{(-value.float()).exp().item():.4f}" for value in (own["logit_scale"], new["logit_scale"])]
        report.notes.append("temperature {} gave way to the file's {}".format(*old_and_new))
    with torch.no_grad():
        for name, value in new.items():
            own[name].copy_(value)
    if warning:
        report.notes.append(warning)
        log.warning("%s: %s", weights.source, warning)
    return report


def _meaning(model: nn.Module) -> dict[str, str]:
    """Knobs under which the same weights would be another model without any shape to tell."""
    if not isinstance(model, DualEncoder):
        return {}
    block = model.visual.transformer.resblocks[0]
    assert isinstance(block, Block)
    settings = {
        "model.activation": next(name for name, kind in ACTIVATIONS.items() if isinstance(block.mlp.gelu, kind)),
        "model.image_stats": next(name for name, stats in IMAGE_STATS.items() if stats == model.image_stats),
    }
    if isinstance(model.visual, SlowFastTransformer):
        settings |= {"model.fast.position": model.visual.position, "model.fast.pool": model.visual.pool}
    return settings


def starts_projections_anew(weights: WeightFile, projections: str) -> bool:
    """Whether the model keeps its own projections and temperature. Raises :class:`WeightsError` for a wrong choice."""
    if projections not in ("auto", "fresh", "keep"):
        raise WeightsError(f"projections is '{projections}', but must be auto, fresh or keep")
    return projections == "fresh" or (projections == "auto" and weights.family.is_clip)


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str = "checkpoint") -> WeightReport:
    """Put a complete state dict under our names into ``model``: :func:`load_weights` without any adapting."""
    return load_weights(model, WeightFile(source, Family.OURS, "memory", "plain", dict(state)))


def upstream_state(weights: WeightFile) -> dict[str, Tensor]:
    """The weights under upstream's names, as its released configs save them (flash spelling, matrix ``conv1``).

    Left out is what upstream has no name for: parts that shape the loss alone.
    """
    unknown = [part.pattern for part in PARTS if part.only_trains]
    return {
        upstreams(name): value
        for name, value in weights.tensors.items()
        if not any(re.fullmatch(pattern, name) for pattern in unknown)
    }


class _Fitting:
    """Compares what a file holds with what a model wants."""

    def __init__(
        self,
        own: Mapping[str, Tensor],
        theirs: dict[str, Tensor],
        report: WeightReport,
        adapt: bool,
        is_clip: bool,
        fresh: bool,
    ) -> None:
        self._own, self._theirs, self._report = own, theirs, report
        self._adapt, self._is_clip, self._fresh = adapt, is_clip, fresh
        self.complaints: list[str] = []

    def run(self) -> dict[str, Tensor]:
        """What is to be copied, by name; ``complaints`` and the report say the rest."""
        self._drop_parts()
        self._leave_parts()
        self._complain("it has unknown tensors", [name for name in self._theirs if name not in self._own])
        absent = [name for name in self._own if name not in self._theirs and name not in self._report.missing]
        self._complain("it lacks", absent)
        new, shapes = {}, []
        for name, value in self._theirs.items():
            if name not in self._own:
                continue
            wanted = self._own[name]
            if value.dtype not in TYPES:
                shapes.append(f"{name} holds {str(value.dtype).removeprefix('torch.')}, no floating-point numbers")
            elif value.shape == wanted.shape:
                new[name] = value
                self._report.taken.append(name)
            else:
                resized, reason = self._resize(name, value, wanted)
                there_and_here = f"{name} is {list(value.shape)} there and {list(wanted.shape)} here"
                if resized is None:
                    shapes.append(f"{there_and_here}{reason}")
                else:
                    new[name] = resized
                    self._report.resized[name] = f"{list(value.shape)} -> {list(wanted.shape)}"
        broken = [name for name, value in new.items() if not value.isfinite().all()]
        self._complain("it holds numbers that are not finite in", broken)
        if shapes:
            self.complaints.insert(0, "; ".join(shapes[:3]) + _more(shapes, 3))
        return new

    def _drop_parts(self) -> None:
        """Whole parts that the file has and the model has not."""
        for part in PARTS:
            there = [name for name in self._theirs if re.fullmatch(part.pattern, name)]
            if there and not any(re.fullmatch(part.pattern, name) for name in self._own):
                if part.only_trains or self._adapt:
                    for name in there:
                        del self._theirs[name]
                        self._report.dropped[name] = f"the model has no {part.name}"
                else:
                    self._ask(f"it has a part that the model has not, {part.name} ({_list(there)})", "leaves it out")
                    for name in there:
                        del self._theirs[name]

    def _leave_parts(self) -> None:
        """Whole parts that the model has and the file has not; half a part is not excused."""
        if self._fresh:
            self._report.missing |= {name: "started anew" for name in PROJECTIONS if name in self._own}
        for part in PARTS:
            here = [name for name in self._own if re.fullmatch(part.pattern, name) and name not in self._report.missing]
            if not here or any(re.fullmatch(part.pattern, name) for name in self._theirs):
                continue
            if not (part.only_trains or self._is_clip or self._adapt):
                self._ask(f"it lacks the {part.name} ({_list(here)})", "starts them anew")
            self._report.missing |= dict.fromkeys(here, f"the file has no {part.name}")

    def _resize(self, name: str, value: Tensor, wanted: Tensor) -> tuple[Tensor | None, str]:
        """``value`` in the shape of ``wanted``; or None and what would help."""
        if name in PROJECTIONS:
            cure = ", or model.weights.projections=fresh starts it anew"
            if value.dim() == 2 and value.shape[0] == wanted.shape[0]:
                return None, f" (model.embed_dim={value.shape[1]} builds the model of the file{cure})"
            return None, ""
        if name.startswith("heads."):
            return None, " (a head for other classes: train it on data with the same ones)"
        resize = _RESIZERS.get(name)
        if resize is None or value.dim() != 2 or value.shape[1] != wanted.shape[1] or 0 in value.shape:
            return None, ""
        if name == "visual.positional_embedding" and not (_is_square(len(value) - 1) and _is_square(len(wanted) - 1)):
            return None, " (one of them is no square of patches and CLS, so it cannot be adapted)"
        if not self._adapt:
            return None, " (model.weights.adapt=true resizes it)"
        return resize(value.float(), wanted), ""

    def _ask(self, what: str, effect: str) -> None:
        self.complaints.append(f"{what}; model.weights.adapt=true {effect}")

    def _complain(self, what: str, names: list[str]) -> None:
        if names:
            self.complaints.append(f"{what} {_list(names)}")


def _resize_frames(value: Tensor, wanted: Tensor) -> Tensor:
    """[T, D] -> [T', D], linearly, as the model itself does for clips of another length."""
    return F.interpolate(value.T[None], size=len(wanted), mode="linear", align_corners=False)[0].T


def _resize_grid(value: Tensor, wanted: Tensor) -> Tensor:
    """[1 + S S, D] -> [1 + S' S', D], bicubic; CLS stays."""
    side = round((len(wanted) - 1) ** 0.5)
    return resample_abs_pos_embed(value[None], [side, side])[0]


def _resize_text(value: Tensor, wanted: Tensor) -> Tensor:
    """[L, D] -> [L', D]: the first positions keep their meaning, further ones their initial values."""
    first = value[: len(wanted)].to(wanted)
    return torch.cat((first, wanted[len(first) :]))


_RESIZERS = {
    "visual.temporal_embedding": _resize_frames,
    "visual.positional_embedding": _resize_grid,
    "textual.positional_embedding": _resize_text,
}


def _is_square(number: int) -> bool:
    return number > 0 and round(number**0.5) ** 2 == number


def _list(names: list[str], shown: int = 3) -> str:
    return f"{', '.join(names[:shown])}{_more(names, shown)}"


def _more(names: list[str], shown: int) -> str:
    return f" and {len(names) - shown} more" if len(names) > shown else ""
