"""Opening the weight files of the field. Nothing that a file says is ever executed, whoever wrote it.

Three containers: pickles of ``torch.save`` (zip or the older format; OpenAI's plain state dicts, open_clip, upstream
EgoHOD, AVION), TorchScript archives (OpenAI's releases) and safetensors (open_clip, this project).
"""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor

from egohod.model import inert
from egohod.model.inert import Inert
from egohod.model.weight_names import Family, Shape, WeightsError, layout, ours, shape_of, spelling, useless
from egohod.model.weight_names import without_prefix as _without_prefix

_STATES = ("state_dict", "model", "module")
"""Under which key a checkpoint keeps its weights."""


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

    @property
    def shape(self) -> Shape | None:
        """What the shapes say about the model; None if it is not a whole one."""
        return shape_of(self.tensors)

    @property
    def model_knobs(self) -> dict[str, Any]:
        """What is known of the model, as knobs of the section ``model`` (``activation``, ``fast.position``, ...)."""
        known = {name.removeprefix("model."): each for name, each in self.settings.items() if name.startswith("model.")}
        if shape := self.shape:
            known["embed_dim"] = shape.embed_dim
            known |= {"num_frames": shape.num_frames} if shape.num_frames else {}
        return known

    def without_heads(self) -> WeightFile:
        """The same without classification heads and the classes that they are for."""
        tensors = {name: each for name, each in self.tensors.items() if not name.startswith("heads.")}
        return dataclasses.replace(
            self, tensors=tensors, beside={k: v for k, v in self.beside.items() if k != "classes"}
        )


def read_weights(source: str | Path, *, download: bool = False) -> WeightFile:
    """Open a weight file of any family.

    Args:
        source: a local file, or an open_clip tag such as ``ViT-B-16:laion2b_s34b_b88k``.
        download: whether open_clip may fetch what a tag names; without it only its local cache is looked at.

    Raises:
        WeightsError: no such file, cut off, damaged, a pickle that asks for more than weights, or a strange model.
    """
    path = Path(source)
    if not path.exists() and _TAG.fullmatch(str(source)):
        path = _find_tag(str(source), download)
    if not path.exists():
        raise WeightsError(f"{path}: no such file")
    if not path.is_file():
        raise WeightsError(f"{path}: not a file of weights")
    try:
        container = _container(path)
        if container == "safetensors":
            content, metadata = _read_safetensors(path)
        elif container == "TorchScript archive":
            content, metadata = _read_torchscript(path), {}
        else:
            content, metadata = _read_pickle(path), {}
        return _named(str(source), container, content, metadata)
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from error
    except Exception as error:  # a damaged file can raise anything in its reader
        reason = " ".join(str(error).strip().partition("\n")[0].split()) or type(error).__name__
        raise WeightsError(f"{source}: not a readable weights file ({reason})") from error


def from_tensors(source: str, tensors: Mapping[str, Tensor]) -> WeightFile:
    """The same for weights that are in memory already, such as those of a checkpoint folder of this project."""
    return _named(source, "safetensors", dict(tensors), {})


def _named(source: str, container: str, content: Any, metadata: Mapping[str, str]) -> WeightFile:
    """Names, family and the rest of what a file held. Raises :class:`WeightsError` without the file's name."""
    beside: dict[str, Any] = {}
    if isinstance(content, Mapping):
        for key in _STATES:
            if isinstance(content.get(key), Mapping):
                beside = {str(name): value for name, value in content.items() if name != key}
                content = content[key]
                break
    if not isinstance(content, Mapping) or not content:
        raise WeightsError("holds no state dict (a mapping of names to tensors)")
    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise WeightsError(f"holds no state dict (a mapping of names to tensors): '{name}' is no tensor")
    short = _without_prefix(content)
    kind = layout(short.values())
    dropped = useless(short.values())
    tensors: dict[str, Tensor] = {}
    for full, name in short.items():
        if name in dropped:
            continue
        own, value = ours(name, kind), content[full]
        if own in tensors:
            raise WeightsError(f"holds {own} twice, in two spellings")
        if own == "visual.conv1.weight":
            value = value.flatten(1)
        elif own in ("logit_scale", "logit_bias") and value.numel() == 1:
            value = value.reshape(())
        tensors[own] = value
    family = _family(kind, container, tensors, dropped, beside, metadata)
    described = {name: inert.describe(value) for name, value in beside.items()}
    settings = json.loads(metadata.get("settings", "{}"))
    if family is Family.UPSTREAM and any(".adapter." in name for name in tensors):
        settings = UPSTREAM_ARRANGEMENT | settings
    if family is Family.AVION:
        settings = {"model.image_stats": _avion_image_stats(beside)} | settings
    return WeightFile(source, family, container, spelling(short.values()), tensors, dropped, described, settings)


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
            code = any(name.split("/")[1:2] == ["code"] for name in archive.namelist())
        return "TorchScript archive" if code else "pickle (zip)"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32:
        return "safetensors"
    return "pickle (older format)"


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
    if len(header) == length:
        entries = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        length += max((entry["data_offsets"][1] for entry in entries), default=0)
    if size < 8 + length:
        raise WeightsError(f"cut off after {size:,} of {8 + length:,} bytes: the download is not complete")
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(inert.stand_ins()):
            # Mapped instead of read: an optimizer's state is not even looked at.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except pickle.UnpicklingError as error:
        raise WeightsError(_explain(error)) from error
    except (EOFError, RuntimeError) as error:
        if isinstance(error, EOFError) or "unexpected EOF" in str(error):
            raise WeightsError(f"cut off after {path.stat().st_size:,} bytes: the download is not complete") from error
        raise


def _explain(error: pickle.UnpicklingError) -> str:
    """Why a pickle was refused. PyTorch's own text advises to load it unsafely, so it is not passed on."""
    wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
    if wanted:
        return (
            f"refused: it asks for {wanted.group(1)}, which is no part of plain weights and could run code; "
            "nothing was run. Save it as a plain state dict of tensors first"
        )
    return "refused: not a weights file, or a pickle of something else than plain tensors; nothing in it was run"


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
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self._archive, self._root = archive, root
        # Made anew for each file, so that none can leave a mark on what the next one is read with.
        self._module = type("Module", (_Module,), {})

    def find_class(self, module: str, name: str) -> Any:
        """Attribute holders for the archive's own classes, tensors and ordered dictionaries; nothing else."""
        if module.split(".")[0] == "__torch__":
            return self._module
        if module == "torch" and name in self.DTYPES:
            return self.DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *parts: torch._utils._rebuild_tensor_v2(*parts)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list
        raise WeightsError(f"refused: it asks for {module}.{name}, which is no part of plain weights; nothing was run")

    def persistent_load(self, pid: Any) -> Any:
        """A storage: its bytes lie beside the pickle."""
        _, dtype, key, *_ = pid
        content = bytearray(self._archive.read(f"{self._root}/data/{key}"))
        storage = torch.frombuffer(content, dtype=torch.uint8).untyped_storage()
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)


def _read_torchscript(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].split("/")[0]
        return dict(_tensors(_ArchiveUnpickler(archive, root).load(), ""))


def _tensors(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested attribute holders by dotted name."""
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.")


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
        known = f"its tags are {', '.join(tags)}" if tags else f"it knows no model '{model}' either"
        raise WeightsError(f"{source}: no such file, and open_clip knows no such tag; {known}")
    folders = []
    if entry.get("hf_hub"):
        repository, _, name = entry["hf_hub"].rpartition("/")
        stem = (name or "open_clip_pytorch_model.bin").rpartition(".")[0]
        names = [f"{stem.replace('_pytorch', '')}.safetensors", f"{stem}.safetensors", name or f"{stem}.bin"]
        for each in names:
            found = try_to_load_from_cache(repository, each)
            if isinstance(found, str):
                return Path(found)
        folders.append(str(constants.HF_HUB_CACHE))
    if entry.get("url"):
        cached = Path("~/.cache/clip").expanduser() / entry["url"].rpartition("/")[2]
        if cached.is_file():
            return cached
        folders.append(str(cached.parent))
    if not download:
        raise WeightsError(
            f"{source}: open_clip knows it, but it is not in its local cache ({' or '.join(folders)}), and nothing is "
            "downloaded unless asked: model.weights.download=true, or --download of tools/convert_checkpoint.py"
        )
    try:
        return Path(pretrained.download_pretrained(entry))
    except Exception as error:  # the network has many ways to fail
        raise WeightsError(f"{source}: open_clip could not download it: {' '.join(str(error).split())}") from error
