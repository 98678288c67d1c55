"""Reading weights: OpenAI's CLIP files and state dicts of this project. Nothing a file says is ever executed."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from egohod.config import UserError
from egohod.model.egovideo import DualEncoder

TEXT_KEYS = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
"""How names of OpenAI's text tower begin; ours carry ``textual.`` in front."""

NOT_TAKEN_OVER = ("visual.image_projection", "textual.text_projection", "logit_scale")
"""The published recipe starts both output projections and the temperature anew."""

NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")
"""Numbers that OpenAI stores among the weights."""


class WeightsError(UserError):
    """Weights that cannot be used: unreadable, hostile or of another geometry."""


@dataclass
class WeightReport:
    """What happened to the weights of a file."""

    source: str
    loaded: int
    fresh: list[str] = field(default_factory=list)
    """Parameters of the model that kept their initial values."""
    dropped: list[str] = field(default_factory=list)
    """Tensors of the file that the model has no use for."""

    def __str__(self) -> str:
        text = f"{self.source}: {self.loaded} tensors loaded"
        for name, keys in (("kept their initial values", self.fresh), ("not taken over", self.dropped)):
            if keys:
                text += f"; {len(keys)} {name}: {', '.join(keys[:6])}{' ...' if len(keys) > 6 else ''}"
        return text


def load_openai(model: DualEncoder, path: str | Path) -> WeightReport:
    """Start ``model`` from OpenAI's CLIP weights: a TorchScript archive as released, or a plain state dict.

    Everything is taken over but the output projections and the temperature; the temporal embedding, which
    images do not have, keeps its initial values. Weights become float32.

    Raises:
        WeightsError: no such file, not readable, a pickle that would run code, or another geometry.
    """
    path = Path(path)
    state = {_ours(name): value for name, value in _read(path).items() if name not in NOT_WEIGHTS}
    if "visual.conv1.weight" in state:
        state["visual.conv1.weight"] = state["visual.conv1.weight"].flatten(1)
    dropped = [name for name in NOT_TAKEN_OVER if state.pop(name, None) is not None]
    fresh = [*NOT_TAKEN_OVER, "visual.temporal_embedding"]
    _assign(model, state, str(path), fresh)
    return WeightReport(str(path), len(state), fresh, dropped)


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str = "checkpoint") -> WeightReport:
    """Put a complete state dict into ``model``.

    Raises:
        WeightsError: names or shapes differ; the message shows the first of each kind.
    """
    _assign(model, state, source, fresh=[])
    return WeightReport(source, len(state))


def _assign(model: nn.Module, state: Mapping[str, Tensor], source: str, fresh: list[str]) -> None:
    """Copy ``state`` into ``model``; only ``fresh`` may be absent. All is checked before anything is copied."""
    own = model.state_dict()
    complaints = []
    shapes = [name for name in state if name in own and state[name].shape != own[name].shape]
    if shapes:
        pairs = [f"{name} is {_shape(state[name])} there and {_shape(own[name])} here" for name in shapes[:3]]
        complaints.append("; ".join(pairs) + _more(shapes, 3))
    for what, names in (
        ("it lacks", [name for name in own if name not in state and name not in fresh]),
        ("it has unknown tensors", [name for name in state if name not in own]),
    ):
        if names:
            complaints.append(f"{what} {', '.join(names[:3])}{_more(names, 3)}")
    if complaints:
        geometry = getattr(model, "geometry", None)
        here = f"{geometry.name}, {getattr(model, 'num_frames', '?')} frames" if geometry else type(model).__name__
        raise WeightsError(f"{source}: these weights do not fit the model ({here}): {'; '.join(complaints)}")
    model.load_state_dict({**own, **{name: value.float() for name, value in state.items()}})


def _ours(name: str) -> str:
    """OpenAI's name -> ours; already ours stays."""
    if name == "visual.proj":
        return "visual.image_projection"
    return f"textual.{name}" if name.startswith(TEXT_KEYS) else name


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        if _is_torchscript(path):
            return _read_torchscript(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path}: {_explain(error)}") from error
    except WeightsError:
        raise
    except Exception as error:  # a damaged file can raise anything in its reader
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise WeightsError(f"{path}: not a readable weights file ({reason})") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"{path}: holds no state dict (a mapping of names to tensors)")
    return dict(content)


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

    def __init__(self, path: Path, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self._path, self._archive, self._root = path, archive, root

    def find_class(self, module: str, name: str) -> Any:
        """Attribute holders for the archive's own classes, tensors and ordered dictionaries; nothing else."""
        if module.split(".")[0] == "__torch__":
            return _Module
        if module == "torch" and name in self.DTYPES:
            return self.DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return torch._utils._rebuild_tensor_v2
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list
        raise WeightsError(f"{self._path}: refused: it asks for {module}.{name}, which is no part of plain weights")

    def persistent_load(self, pid: Any) -> Any:
        """A storage: its bytes lie beside the pickle."""
        _, dtype, key, *_ = pid
        content = bytearray(self._archive.read(f"{self._root}/data/{key}"))
        storage = torch.frombuffer(content, dtype=torch.uint8).untyped_storage()
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)


def _read_torchscript(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].split("/")[0]
        return dict(_tensors(_ArchiveUnpickler(path, archive, root).load(), ""))


def _tensors(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested attribute holders by dotted name."""
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.")


def _is_torchscript(path: Path) -> bool:
    """TorchScript archives are zip files with a ``code`` folder."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.split("/")[1:2] == ["code"] for name in archive.namelist())


def _explain(error: pickle.UnpicklingError) -> str:
    """Why a pickle was refused. PyTorch's own text advises to load it unsafely, so it is not passed on."""
    wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
    if wanted:
        return (
            f"refused: it asks for {wanted.group(1)}, which is no part of plain weights and could run code; "
            "nothing was run. Save it as a plain state dict of tensors first"
        )
    return "refused: not a weights file, or a pickle of something else than plain tensors; nothing in it was run"


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _more(names: list[str], shown: int) -> str:
    return f" and {len(names) - shown} more" if len(names) > shown else ""
