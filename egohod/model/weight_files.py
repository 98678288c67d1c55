"""Open the weight files of the field, whoever wrote them: nothing that a file says is ever executed.

Three containers: pickles of ``torch.save`` (zip or the older format; OpenAI's plain state dicts, open_clip, upstream
EgoHOD, AVION), TorchScript archives (OpenAI's releases) and safetensors (open_clip, this project); the first and the
last also in shards with an index. A few bytes of a file cannot take any amount of memory either: what its sizes say is
checked against its length first.

The way of a file: :func:`locate` it, :func:`open_weight_file` tells its container by the first bytes and finds the
state dict in it. What the names in there mean is the business of :mod:`egohod.model.checkpoints`.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import pickle
import re
import reprlib
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from egohod import hub, pickles
from egohod.errors import UserError

# What says how to use weights, beside them: files of open_clip, and of transformers and timm.
ABOUT = ("open_clip_config.json", "preprocessor_config.json", "config.json")
# How the index of a sharded file ends: model.safetensors.index.json, pytorch_model.bin.index.json.
INDEX = ".index.json"
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
# Under which names a folder of the Hugging Face Hub has its weights. Those of open_clip first: a timm backbone alone or
# the same model for transformers may be beside them; and safetensors first: nothing needs to be unpickled.
WEIGHT_NAMES = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"),
    *("model.safetensors", "pytorch_model.bin"),
)
# Tensors may share or repeat their numbers, but not without end.
_MORE_BYTES, _TIMES_THE_FILE = 1 << 30, 16
_LONGEST_HEADER = 100 << 20  # the limit of safetensors itself
_MOST_MODULES = 20_000
_MOST_VALUES = 10_000
# Under which key a checkpoint keeps its weights, the likeliest first; others are looked into after these.
_STATE_KEYS = (
    *("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights", "student"),
)
# Names of a running average of weights, such as model_ema, which is taken only if nothing else is there.
AVERAGE = re.compile(r"(^|_)(ema|swa|avg|averaged?|teacher|momentum|target)(_|$)", re.IGNORECASE)
_TAG = re.compile(r"[\w.-]+:[\w.-]+")


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that others may read as any file of this process. Raises :class:`OSError`."""
    # safetensors 0.8 makes files that only their owner may read, whatever the umask is.
    path.touch()
    mode = path.stat().st_mode
    # It refuses views that are not contiguous.
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, path, metadata)
    path.chmod(mode)


class StateDict(NamedTuple):
    """What a weight file holds."""

    container: str
    tensors: dict[str, Tensor]  # under the file's own names
    beside: dict[str, Any]  # what else is in the file: plain values and stand-ins
    metadata: dict[str, str]  # of safetensors
    remarks: list[str]  # which of several state dicts was taken


@contextmanager
def errors_of(source: str) -> Iterator[None]:
    """Turn whatever goes wrong within into a :class:`UserError` of one line that begins with ``source``."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except Exception as error:  # a damaged file can raise anything in its reader
        # The first line is the cause; readers add advice, addresses or a stack trace of C++.
        reason = " ".join(str(error).strip().partition("\n")[0].split())[:300] or type(error).__name__
        raise UserError(f"{source}: not a readable weights file ({reason})") from error


# --------------------------------------------------------------------------------------------------
# Where a file is, and what kind
# --------------------------------------------------------------------------------------------------


def locate(source: str | Path, download: bool = False) -> Path:
    """The path of ``source``: itself, or the file in open_clip's cache if it is a tag such as ``ViT-B-16:openai``.

    Of a repository ``hf-hub:org/name`` it is the file with its weights, or the index of its shards, in the local cache,
    to which it is downloaded: its name says so. Raises :class:`UserError` for an unknown tag and, unless ``download``,
    for one that is not in the local cache; for a repository as :func:`egohod.hub.download`, and without safetensors.
    """
    if str(source).startswith(hub.PREFIX):
        return hub.download(str(source), _files_of_repository)[0]
    path = Path(source)
    if path.exists() or not _TAG.fullmatch(str(source)):
        return path
    from huggingface_hub import constants, try_to_load_from_cache
    from open_clip import pretrained

    model, _, tag = str(source).partition(":")
    entry = pretrained.get_pretrained_cfg(model, tag)
    if not entry:
        tags = pretrained.list_pretrained_tags_by_model(model)
        hint = f"its tags are {', '.join(tags)}" if tags else f"it knows no model '{model}' either"
        raise UserError(f"no such file, and open_clip knows no such tag; {hint}")
    folders = []
    if entry.get("hf_hub"):
        repository, _, name = entry["hf_hub"].rpartition("/")
        stem = (name or "open_clip_pytorch_model.bin").rpartition(".")[0]
        # open_clip itself prefers safetensors, whose name it derives from the pickle's like this.
        for each in (f"{stem.replace('_pytorch', '')}.safetensors", f"{stem}.safetensors", name or f"{stem}.bin"):
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
        raise UserError(
            f"open_clip knows it, but it is not in its local cache ({' or '.join(folders)}), and nothing is "
            "downloaded unless asked: model.weights.download=true, or --download of tools/convert_checkpoint.py"
        )
    if not all(Path(folder).is_absolute() for folder in folders):
        raise UserError("there is no home folder to download it to; set HOME (or HF_HOME) to a folder")
    try:
        return Path(pretrained.download_pretrained(entry))
    except Exception as error:  # the network has many ways to fail
        raise UserError(f"open_clip could not download it: {' '.join(str(error).split())}") from error


def _files_of_repository(names: Sequence[str]) -> list[str]:
    """What to download of a repository: its weights first, and the small files that say what they are."""
    tensors = sorted(name for name in names if name.endswith(".safetensors"))
    # In the order of open_weight_file, of which a repository often has several, each gigabytes large.
    usual = [name for name in WEIGHT_NAMES if name in tensors]
    indices = sorted(name for name in names if name.endswith(f".safetensors{INDEX}"))
    ranked = [*(name for name in usual if name.startswith("open_clip")), *indices, *usual]
    weights = next(iter(ranked or (tensors if len(tensors) == 1 else ())), None)
    if weights is None and tensors:
        raise UserError(f"holds {len(tensors)} files of weights, none of a usual name; download one of {tensors} first")
    if weights is None:
        pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
        hint = f" but the pickle {pickled[0]}, which could run code and is not fetched" if pickled else ""
        raise UserError(f"holds no safetensors{hint}; ask its owner to add model.safetensors")
    stem = weights.removesuffix(f".safetensors{INDEX}")
    shards = [name for name in tensors if stem != weights and name.startswith(f"{stem}-")]
    # What checkpoints.py reads beside weights; another JSON file of a repository may have gigabytes.
    about = [name for name in ABOUT if name in names]
    return [weights, *shards, *dict.fromkeys([*about, *hub.tokenizer_files(names)])]


def open_weight_file(path: Path) -> StateDict:
    """The state dict of a file, of an index of shards, or of a folder with such an index or a file of usual name.

    Raises :class:`UserError` without the file's name, and whatever a reader raises for a damaged file: call it within
    :func:`errors_of`.
    """
    if not path.exists():
        raise UserError("no such file")
    index = path
    if path.is_dir():
        # Of two indices in one folder that of safetensors: nothing needs to be unpickled.
        indices = sorted(path.glob(f"*{INDEX}"), key=lambda each: ("safetensors" in each.name, each.name))
        single = next((path / name for name in WEIGHT_NAMES if (path / name).is_file()), None)
        # open_clip's own file is the whole model where an index beside it is of transformers.
        if single and (not indices or single.name.startswith("open_clip")):
            return open_weight_file(single)
        if not indices:
            files = sorted(file.name for file in path.glob("*") if file.suffix in _SUFFIXES)
            hint = f"; name the file, such as {files[0]}" if files else ""
            if any(path.glob("*.distcp")):  # of torch.distributed.checkpoint, whose metadata is a pickle of its classes
                command = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
                hint = f"; convert it first: {command}"
            raise UserError(f"not a file of weights, and neither a checkpoint nor an index of shards is in it{hint}")
        index = indices[-1]
    if index.name.endswith(INDEX):
        opened = _open_shards(index)
        size = sum(file.stat().st_size for file in index.parent.iterdir())
    else:
        opened = _open_single(path)
        size = path.stat().st_size
    # A tensor may repeat a few numbers to a size that no memory holds: copying it would write them out.
    wanted = sum(value.nbytes for value in opened.tensors.values())
    if wanted > _MORE_BYTES + _TIMES_THE_FILE * size:
        raise UserError(f"its tensors have {wanted:,} bytes, in {size:,} bytes of file; damaged")
    return opened


def _open_single(path: Path) -> StateDict:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
    if not size:
        raise UserError("the file is empty; the download has failed")
    if start.startswith(b"version https://git-lfs"):
        raise UserError("a Git LFS pointer, not the weights; fetch them with: git lfs pull")
    if start.lstrip()[:1] == b"<":
        raise UserError("a web page, not weights; the download went wrong")
    metadata: dict[str, str] = {}
    content: Any
    if start.startswith(b"PK"):
        if not zipfile.is_zipfile(path):
            raise UserError(f"cut off after {size:,} bytes: the download is not complete")
        with zipfile.ZipFile(path) as archive:
            # Only TorchScript archives hold code; torch.save writes zips without it.
            if any(_folder_inside(entry) == "code" for entry in archive.infolist()):
                container, content = "TorchScript archive", _read_torchscript(archive, size)
            else:
                container, content = "pickle (zip)", load_pickle(path, stand_ins())
    elif start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32:
        container, (content, metadata) = "safetensors", _read_safetensors(path)
    else:
        container, content = "pickle (older format)", load_pickle(path, stand_ins())
    tensors, beside, remarks = find_state_dict(content)
    return StateDict(container, tensors, beside, metadata, remarks)


def _open_shards(index: Path) -> StateDict:
    """The tensors that an index names, from files beside it and no others."""
    try:
        by_shard: dict[str, list[str]] = {}
        for name, shard in json.loads(index.read_bytes())["weight_map"].items():
            by_shard.setdefault(shard, []).append(name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index.name} is no index of shards: it needs a weight_map of names to files") from error
    # A path such as ../../etc/passwd must not lead out of the folder.
    strange = [shard for shard in by_shard if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard]
    if strange:
        raise UserError(f"{index.name} names the shard {str(strange[0])[:80]!r}, which is no plain file name")
    absent = sorted(shard for shard in by_shard if not index.with_name(shard).is_file())
    if absent:
        raise UserError(f"{len(absent)} of its {len(by_shard)} shards are not there, such as {absent[0]}")
    tensors: dict[str, Tensor] = {}
    containers = set()
    for shard, names in sorted(by_shard.items()):
        with errors_of(shard):
            opened = _open_single(index.with_name(shard))
            containers.add(opened.container)
            lacking = [name for name in names if name not in opened.tensors]
            if lacking:
                raise UserError(f"lacks {lacking[0]}, which {index.name} says is in it")
            tensors |= {name: opened.tensors[name] for name in names}
    if not tensors:
        raise UserError(f"{index.name} names no tensors")
    return StateDict(containers.pop() if len(containers) == 1 else "shards of several kinds", tensors, {}, {}, [])


def find_state_dict(content: Any) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """The likeliest state dict somewhere in ``content``, what is beside it, and a remark if there were others."""
    # How likely it is the model's (averages last, the usual keys first), where, and what.
    states: list[tuple[tuple[bool, int], tuple[str, ...], Mapping[str, Any]]] = []
    todo: list[tuple[tuple[str, ...], Any]] = [((), content)]
    while todo:  # depth first, in the file's order
        path, value = todo.pop()
        if not isinstance(value, Mapping):
            continue
        # Dotted names are those of a model; an optimizer's state has none.
        if any(isinstance(inner, Tensor) and isinstance(key, str) and "." in key for key, inner in value.items()):
            ranks = [_STATE_KEYS.index(key) for key in path if key in _STATE_KEYS]
            rank = any(AVERAGE.search(key) for key in path), min(ranks, default=len(_STATE_KEYS))
            states.append((rank, path, value))
        elif len(path) < 3:
            todo += [((*path, key), inner) for key, inner in reversed([*value.items()]) if isinstance(key, str)]

    states.sort(key=itemgetter(0))
    beside: dict[str, Any] = {}
    if states:
        for key in states[0][1]:
            beside |= {str(name): value for name, value in content.items() if name != key}
            content = content[key]
    elif isinstance(content, Mapping):
        # No model, such as one without a dotted name, but the message should be about its weights.
        content = next((content[key] for key in _STATE_KEYS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content:
        raise UserError("holds no state dict (a mapping of names to tensors)")
    tensors: dict[str, Tensor] = {}
    for name, value in content.items():
        if str(name).endswith("_extra_state"):
            continue
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise UserError(f"holds no state dict (a mapping of names to tensors): '{str(name)[:80]}' is no tensor")
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise UserError(f"'{name}' is no plain tensor of numbers")
        tensors[name] = value
    others = ", ".join(f"'{'.'.join(path)}'" for _, path, _ in states[1:])
    return tensors, beside, [f"taken is '{'.'.join(states[0][1])}', not {others}"] if others else []


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    size = path.stat().st_size
    # The library's own message for a half download does not say so: compare the sizes before it sees the file.
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _LONGEST_HEADER:
            raise UserError(f"not a safetensors file: its header would have {length:,} bytes; damaged")
        header = file.read(length)
    if len(header) == length:
        entries = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        length += max((entry["data_offsets"][1] for entry in entries), default=0)
    if size < 8 + length:
        raise UserError(f"cut off after {size:,} of {8 + length:,} bytes: the download is not complete")
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


# --------------------------------------------------------------------------------------------------
# Pickles of torch.save
# --------------------------------------------------------------------------------------------------


def load_pickle(source: Path | bytes, allowed: Sequence[Any] = ()) -> Any:
    """What ``torch.save`` wrote, by ``torch.load(weights_only=True)``, after a look at what that would allocate.

    Args:
        source: the file, whose tensors are mapped instead of read, or its content.
        allowed: further classes, as for ``torch.serialization.safe_globals``.

    Raises:
        UserError: refused, or cut off, without the file's name. What else is wrong raises what the readers raise.
    """
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    with ExitStack() as stack:
        file = stack.enter_context(io.BytesIO(source) if isinstance(source, bytes) else source.open("rb"))
        is_zip = file.read(4) == b"PK\x03\x04"
        # Mapped instead of read: an optimizer's state is not even looked at.
        is_mapped = is_zip and isinstance(source, Path)
        try:
            if is_zip:
                with zipfile.ZipFile(file) as archive:
                    _check_archive(archive, size)
                    for entry in archive.infolist():
                        if entry.filename.endswith(".pkl") and _folder_inside(entry) != "code":
                            try:
                                _check_pickle(archive.read(entry))
                            except EOFError as error:  # the archive itself is whole
                                raise UserError(f"damaged: {error}") from error
            else:
                # The older format is five pickles in a row: a number, a version, the system, the content, and the keys
                # of the storages that follow.
                content: bytes | mmap.mmap = b""
                if isinstance(source, bytes):
                    content = source
                elif size:
                    content = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                end = 0
                for _ in range(5):
                    if end < len(content):  # else one of another program, which PyTorch's reader names
                        end = _check_pickle(content, end)
            file.seek(0)
            opened: Any = source if is_mapped else file
            with torch.serialization.safe_globals(list(allowed)):
                return torch.load(opened, map_location="cpu", weights_only=True, mmap=is_mapped or None)
        except pickle.UnpicklingError as error:
            # PyTorch's own text advises to load the file unsafely, so it is not passed on.
            if wanted := re.search(r"GLOBAL ([\w.]+)", str(error)):
                raise _refusal(wanted.group(1)) from error
            raise UserError(
                "refused: not a weights file, or a pickle of something else than plain tensors; nothing in it was run"
            ) from error
        except (EOFError, RuntimeError) as error:
            if isinstance(error, EOFError) or "unexpected EOF" in str(error):
                raise UserError(f"cut off after {size:,} bytes: the download is not complete") from error
            raise


def _refusal(name: str) -> UserError:
    return UserError(
        f"refused: it asks for {name}, which is no part of plain weights and could run code; "
        "nothing was run. Save it as a plain state dict of tensors first"
    )


def _folder_inside(entry: zipfile.ZipInfo) -> str:
    """Name of an archive's entry, or the folder of it, within the one folder that PyTorch puts all entries in."""
    return entry.filename.partition("/")[2].partition("/")[0]


def _check_archive(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse an archive whose entries are larger than itself, by compression or by sharing their bytes."""
    # PyTorch compresses code, which is not read here, and nothing else.
    declared = sum(entry.file_size for entry in archive.infolist() if _folder_inside(entry) != "code")
    if declared > size:
        raise UserError(
            f"its entries say that they hold {declared:,} bytes, in a file of {size:,}; PyTorch writes none like it"
        )


def _check_pickle(content: bytes | mmap.mmap, start: int = 0) -> int:
    """Refuse a pickle that would make memory out of nothing; the position after its end."""
    scanned = pickles.scan(content, start)
    body = content[start : scanned.end]
    pickles.check_sharing(body)
    # Both of these are on PyTorch's own list of what is harmless.
    makers = scanned.names & {"builtins.bytearray", "__builtin__.bytearray"}
    if makers:
        raise _refusal(next(iter(makers)))
    calls = body.count(pickle.REDUCE)
    if "_codecs.encode" in scanned.names and calls * scanned.longest > _MORE_BYTES:
        raise UserError(f"refused: up to {calls:,} copies of a text of {scanned.longest:,} characters")
    return scanned.end


# --------------------------------------------------------------------------------------------------
# TorchScript archives
# --------------------------------------------------------------------------------------------------


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
        _check_pickle(content)
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
        raise _refusal(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        """A storage, whose bytes are beside the pickle; tensors that share it share its memory here too."""
        _, dtype, key, *_ = pid
        if key not in self._storages:
            # Writable, as PyTorch wants the memory of tensors to be.
            content = bytearray(self._archive.read(f"{self._root}/data/{key}"))
            storage = torch.frombuffer(content, dtype=torch.uint8).untyped_storage()
            self._storages[key] = torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)
        return self._storages[key]


def _rebuild(storage: Any, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> Tensor:
    """A view of a storage; PyTorch's function would make a storage larger that is too small for it."""
    last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True)) if all(size) else -1
    if min((offset, *size, *stride)) < 0 or last >= storage._size():
        raise UserError("a tensor reaches beyond its numbers; damaged")
    return torch._utils._rebuild_tensor_v2(storage, offset, tuple(size), tuple(stride), False, OrderedDict())


def _read_torchscript(archive: zipfile.ZipFile, size: int) -> dict[str, Tensor]:
    """The tensors of the archive's nested modules by dotted name."""
    _check_archive(archive, size)
    tensors = {}
    todo, seen = [("", _ArchiveUnpickler(archive, archive.namelist()[0].split("/")[0]).load())], 0
    while todo:
        prefix, holder = todo.pop()
        seen += 1
        if seen > _MOST_MODULES:  # holders that hold one another
            raise UserError(f"more than {_MOST_MODULES:,} modules; damaged")
        for name, value in vars(holder).items():
            if isinstance(value, Tensor):
                tensors[prefix + name] = value
            elif isinstance(value, _Module):
                todo.append((f"{prefix}{name}.", value))
    return tensors


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

    def content(self) -> Any:
        """The value of the object that it stands for, or the name of the object's class."""
        kind = self.name.rpartition(".")[2]
        state = self.state if isinstance(self.state, Mapping) else {}
        if kind == "Namespace":
            return state
        if kind in ("DictConfig", "ListConfig"):
            return state.get("_content")
        if kind.endswith("Node"):
            return state.get("_val")
        if kind == "_reconstruct":
            shape = self.state[1] if isinstance(self.state, tuple) and len(self.state) > 1 else "?"
            return f"array {reprlib.repr(shape)}"
        match self.parts:  # of NumPy's scalar(dtype, bytes); the type's code may be any text
            case (Inert(parts=(str(code), *_)), bytes(data)) if kind == "scalar" and re.fullmatch(r"[biuf]\d", code):
                if len(data) == int(code[1]):
                    return np.frombuffer(data, dtype=code)[0].item()
        return self.name


def stand_ins() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """What to hand to ``torch.serialization.safe_globals``; made anew, so that no file can leave a mark on them."""
    names = (
        *("argparse.Namespace", "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),
        *("omegaconf.base.Metadata", "omegaconf.base.ContainerMetadata"),
        *(f"omegaconf.nodes.{name}Node" for name in ("Any", "String", "Integer", "Float", "Boolean")),
        *("numpy.dtype", "numpy.ndarray"),
        # NumPy 2 renamed its modules; files of both are read.
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
        "typing.Any",
        *(f"builtins.{name}" for name in ("dict", "list", "tuple", "str", "int", "float", "bool")),
    )
    # A defaultdict has a factory, which is a callable of the file's choice: a plain dict takes its place.
    return [
        *((type("Inert", (Inert,), {"name": name}), name) for name in names),
        (lambda *_: {}, "collections.defaultdict"),
    ]


def describe(value: Any) -> str:
    """One line about what a file holds beside its weights."""
    kind = f"{value.name}: " if isinstance(value, Inert) and "numpy" not in value.name else ""
    content = _plain(value, iter(range(_MOST_VALUES)))
    texts = []
    entries = content.items() if isinstance(content, dict) else [("", content)]
    for key, inner in islice(entries, 12):
        # Of what is nested the size is enough: a person wants to recognise a file, not to read its configuration.
        if isinstance(inner, dict):
            text = f"{{{len(inner)} values}}"
        elif isinstance(inner, list) and len(inner) > 4:
            text = f"[{len(inner)} values]"
        else:
            text = " ".join(str(inner).split())
            text = text if len(text) <= 60 else f"{text[:57]}..."
        texts.append(f"{key}={text}" if isinstance(content, dict) else text)
    more = f", ... ({len(entries)} in all)" if len(entries) > 12 else ""
    return f"{kind}{', '.join(texts) or 'empty'}{more}"


def _plain(value: Any, left: Iterator[int], depth: int = 0) -> Any:
    """Stand-ins as plain values: dicts, lists, numbers, text; what has no plain form becomes its name."""
    # Values may hold one another, or the same one many times: no more is shown than a person may want to read.
    if depth > 20 or next(left, None) is None:
        return "..."
    if isinstance(value, Inert):
        content = value.content()
        return _plain(content, left, depth + 1) if isinstance(content, (Mapping, list, Inert)) else content
    if isinstance(value, Mapping):
        return {
            key if isinstance(key, (str, int, float)) else type(key).__name__: _plain(inner, left, depth + 1)
            for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_plain(inner, left, depth + 1) for inner in value]
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)}"
    return value if value is None or isinstance(value, (str, int, float, bool)) else type(value).__name__
