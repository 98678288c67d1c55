"""What leaves the project: a folder for the Hugging Face Hub with its model card, and towers that run without egohod.

Both get ``preprocessor_config.json``: how frames become what the vision tower reads, in the words of transformers.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from egohod import hub
from egohod.api import create_model_and_transforms
from egohod.data.dataset import Tokenizer
from egohod.errors import UserError
from egohod.evaluation.embed import fingerprint
from egohod.evaluation.features import read_json
from egohod.evaluation.results import FORMAT, RESULTS_FILE, markdown, table
from egohod.model.cards import model_info
from egohod.model.checkpoints import PARTS, WeightFile, upstream_state
from egohod.model.config import OPEN_CLIP
from egohod.model.dual_encoder import DualEncoder
from egohod.model.weight_files import write_safetensors
from egohod.runtime import atomic_write, write_text
from egohod.training.checkpoint import open_weights

log = logging.getLogger(__name__)

WEIGHTS, PREPROCESSING, CARD = "model.safetensors", "preprocessor_config.json", "README.md"
# Sentences to try an exported text tower with: a short one, a usual one, and one that is longer than most.
_SENTENCES = (
    "#C C cuts",
    "#C C opens the drawer with the left hand",
    "#O a man picks up the blue cup from the table, drinks from it and puts it back beside the plate",
)
# An exported tower in float32 may differ from the model by this much.
_TOLERANCE = 1e-4
_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def save_weights(weights: WeightFile, path: Path, to: str = "egohod") -> list[str]:
    """Write ``weights`` as safetensors by the names of ``egohod`` or ``upstream``; returns what these have no name for.

    An interrupted conversion leaves no half-written file. Raises :class:`UserError` as :func:`upstream_state` does.
    """
    tensors = upstream_state(weights) if to == "upstream" else weights.tensors
    # Family and settings travel along: names alone would make an OpenAI model a trained video model of this project.
    metadata = {"format": "pt", "family": str(weights.family), "settings": json.dumps(weights.settings)}
    with atomic_write(path) as temporary:
        write_safetensors(tensors, temporary, metadata)
    return [name for name in weights.tensors if to == "upstream" and name not in tensors]


# --------------------------------------------------------------------------------------------------
# A folder for the Hub
# --------------------------------------------------------------------------------------------------


def push_to_hub(
    run: str | Path,
    repository: str,
    *,
    results: str | Path | None = None,
    licence: str = "other",
    private: bool = False,
) -> str:
    """Publish the weights of a run on the Hugging Face Hub; returns the address of the repository.

    The token is that of ``hf auth login`` or of HF_TOKEN.

    Args:
        run: a run or checkpoint folder, or a file of weights that says what model it is of.
        repository: ``org/name``, which is created if it does not exist.
        results: see :func:`write_folder`.
        licence: see there.
        private: whether a new repository is private.

    Raises:
        UserError: as of :func:`write_folder`; no permission, no network.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_folder(run, Path(temporary) / "model", results=results, licence=licence, name=repository)
        return hub.upload(folder, repository, private=private, message="Upload by egohod")


def write_folder(
    source: str | Path,
    folder: str | Path,
    *,
    results: str | Path | None = None,
    licence: str = "other",
    name: str | None = None,
) -> Path:
    """Write what :func:`push_to_hub` uploads, which ``create_model_and_transforms(folder)`` loads without a network.

    That is: model.safetensors without classification heads, config.json and preprocessor_config.json (for people and
    other programs; the header of model.safetensors has the same settings), a tokenizer if it is not CLIP's, and a model
    card, README.md.

    Args:
        source: as ``run`` of :func:`push_to_hub`.
        folder: a new or an empty one.
        results: ``results.json`` of an evaluation of these weights, or its folder; None takes that of the run.
        licence: of the weights, an identifier of the Hub such as ``apache-2.0``.
        name: title of the card, ``org/name``; None is the folder's.

    Raises:
        UserError: weights that cannot be read or do not say what model they are of, results of other weights, or a
            folder that is not empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not an empty folder")
    if not re.fullmatch(r"[\w.+-]+", licence):  # part of the card's header, which is YAML
        raise UserError(f"licence={licence!r}: give an identifier of the Hub, such as apache-2.0 or other")
    content = open_weights(source)
    geometry = content.model_name
    if geometry is None:
        raise UserError(f"{source}: does not state its model, without which published weights cannot be loaded")
    plain = geometry.removesuffix("_Slowfast").removeprefix(OPEN_CLIP)
    if geometry.startswith(OPEN_CLIP) and not plain.startswith(hub.PREFIX) and Path(plain).exists():
        raise UserError(f"{source}: its model.name={geometry} is a folder of this machine; publish that one first")
    if heads := [each for each in content.tensors if each.startswith("heads.")]:
        content = content.without_heads()
        log.warning("%s: its classification heads are left out (%d tensors)", source, len(heads))
    content.settings = {"model.name": geometry} | content.settings
    run = next((each for each in (Path(source), *Path(source).parents[1:2]) if (each / "config.yml").is_file()), None)
    recipe = yaml.safe_load((run / "config.yml").read_text(encoding="utf-8")) if run else {}
    # The tokenizer's files are of the training run's machine; where they are is in no checkpoint.
    files = (recipe.get("model") or {}).get("tokenizer")
    # Of the file itself, so that nothing is published that cannot be loaded.
    more = {"tokenizer": files} if files else {}
    model, _, tokenizer = create_model_and_transforms(geometry, source, projections="keep", **more)
    # Results of a run with heads are of the heads, mostly, which are not published.
    measured = _results(content, source, None if heads else run, results, model)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(content, folder / WEIGHTS)
    # Without paths of this machine.
    config = {"library_name": "egohod", "model": {"name": geometry} | content.model_knobs}
    write_text(folder / "config.json", json.dumps(config, indent=1) + "\n")
    write_text(folder / PREPROCESSING, json.dumps(preprocessing(model), indent=1) + "\n")
    if tokenizer.folder is not None:
        _copy_tokenizer(tokenizer.folder, folder)
    card = _card(name or folder.resolve().name, model, content, recipe, measured, licence)
    write_text(folder / CARD, card)
    return folder


def preprocessing(model: DualEncoder) -> dict[str, Any]:
    """How frames of a clip become the input of the vision tower."""
    size, stats = model.geometry.image_size, model.image_stats
    return {
        "num_frames": model.num_frames,
        "frame_sampling": "the middle of each of num_frames equal parts of the clip",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # PIL's number of bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(stats.mean),
        "image_std": list(stats.std),
        "layout": "float32 [batch, 3 (RGB), num_frames, height, width]",
        "context_length": model.geometry.context_length,
    }


def _results(
    weights: WeightFile, source: str | Path, run: Path | None, results: str | Path | None, model: DualEncoder
) -> tuple[list[str], list[str]]:
    """The lines of the card about results.json, and the metrics that are no better with the frames in order.

    Raises :class:`UserError` for results of other weights.
    """
    path = None if results is None else Path(results)
    if path is None and run is not None and (run / RESULTS_FILE).is_file():
        path = run
    if path is None:
        return [], []
    path = path / RESULTS_FILE if path.is_dir() else path
    content = read_json(path, FORMAT, "main_eval.py writes it")
    still: list[str] = []
    try:
        about, benchmarks = content["checkpoint"], content["benchmarks"]
        # By its place only where the checksum cannot tell: what shapes the loss alone may be in one of the two models.
        # A run that was continued has other weights than when it was evaluated.
        is_own = any(re.fullmatch(part.pattern, name) for part in PARTS if part.only_trains for name in weights.tensors)
        is_own &= path.parent == run or Path(str(about["path"])).resolve() == Path(source).resolve()
        if not is_own and about["sha256"] != fingerprint(model):
            text = f"{path}: results of other weights ({about['path']}) than {source} holds"
            if results is not None:
                raise UserError(text)
            log.warning("%s; the card has none", text)
            return [], []
        for bench, each in benchmarks.items():
            for metric, number in each["metrics"].items():
                for control, other in number.get("controls", {}).items():
                    low, high = other["drop_interval"]
                    # An interval that holds 0: without the order of frames the model is as good.
                    if low is not None and high is not None and low <= 0 <= high:
                        still.append(f"{bench}/{metric} ({control})")
        lines = [markdown(content), "With chance levels, and under the temporal controls that were measured: the same"]
        lines += ["clips with their frames shuffled, reversed, or frozen to the middle one.", "", "```"]
        lines += [table(content["metrics"]), "```"]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not the results of this version ({error!r})") from error
    return (lines if benchmarks else []), still


def _card(
    title: str,
    model: DualEncoder,
    content: WeightFile,
    recipe: Mapping[str, Any],
    results: tuple[list[str], list[str]],
    licence: str,
) -> str:
    """README.md: what the model is, how it was made and what was measured."""
    title = " ".join(title.split())
    place = f"{hub.PREFIX}{title}" if "/" in title else title
    geometry = content.settings["model.name"]
    knobs = {key: value for key, value in content.model_knobs.items() if "." not in key and key != "name"}
    info = model_info(geometry, **knobs)
    head = ["---", "library_name: egohod", f"license: {licence}", "pipeline_tag: feature-extraction"]
    head += ["tags: [egocentric, video-text-retrieval, video-language]", "---", ""]
    what = "two paths with motion adapters" if model.geometry.slowfast else "one path"
    lines = [f"# {title}", "", f"A dual encoder of egocentric clips and sentences ({geometry}, {what}).", ""]
    lines += ["```python", "import egohod", ""]
    lines += [f'clips, texts = egohod.embed(["kitchen.mp4"], ["#C C washes a plate"], model={json.dumps(place)})']
    lines += ["print(clips @ texts.T)", "```", ""]
    lines += ["## Model", "", "| | |", "|---|---|"]
    both = f"vision {info.vision_parameters / 1e6:.1f}, text {info.text_parameters / 1e6:.1f}"
    rows = {
        "architecture": f"`{geometry}`",
        "parameters": f"{info.parameters / 1e6:.1f} M ({both})",
        "input": f"{info.frames} frames of {info.resolution} px; {model.geometry.context_length} tokens of text",
        "cost of a clip": f"{info.gflops:.3g} GFLOPs, {info.tokens:,} tokens",
        "shared space": f"{info.embed_dim} dimensions, unit length",
        "family of the file": str(content.family),
    }
    lines += [f"| {key} | {value} |" for key, value in rows.items()]

    def setting(key: str) -> Any:
        value: Any = recipe
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    lines += ["", "## Training data", ""]
    if sources := setting("data.train"):
        clips = content.beside.get("data.train.clips")
        lines += [f"{int(clips):,} clips in all.", ""] if clips and clips.isdecimal() else []
        lines += ["| source | annotations | weight |", "|---|---|---|"]
        # Of a path the last part alone: the rest is of the machine that it was trained on.
        lines += [
            f"| {key} | `{Path(str(each['metadata'])).name}` | {'by its clips' if weight is None else weight} |"
            for key, each in sources.items()
            for weight in [each.get("weight")]
        ]
    else:
        lines += ["Not recorded with these weights."]
    lines += ["", "## Recipe", ""]
    keys = ["loss.name", "train.duration", "train.global_batch_size", "train.optimizer", "train.lr", "train.schedule"]
    keys += ["train.warmup", "train.trainable", "train.precision", "train.seed", "model.weights.source"]
    if chosen := {key: setting(key) for key in keys if setting(key) is not None}:
        if (start := setting("model.weights.path")) and setting("model.weights.source") != "scratch":
            is_name = str(start).startswith(hub.PREFIX)
            chosen["model.weights.path"] = start if is_name else Path(str(start)).name
        lines += ["| setting | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in chosen.items())]
    else:
        lines += ["Not recorded with these weights."]
    lines += ["", "## Results", ""]
    tables, still = results
    lines += tables or [f"Not measured. `egohod eval --checkpoint {place} --benchmark NAME` measures it."]
    lines += ["", "## Limits", ""]
    lines += [f"- It reads {info.frames} frames of the central square of a clip, however long the clip is."]
    lines += ["- Sentences should be phrased like its training narrations; others may rank lower than they should."]
    lines += ["- It was not measured on data other than that listed above."]
    if still:
        shown = ", ".join(still[:8]) + (f" and {len(still) - 8} more" if len(still) > 8 else "")
        lines += [f"- Not measurably better than with destroyed time: {shown}. These say nothing about motion."]
    lines += ["", "## Licence", ""]
    lines += [f"Of these weights: {licence}." if licence != "other" else "The publisher of these weights states none."]
    lines += ["The licences of the starting weights and of the training data apply too. The code is Apache-2.0.", ""]
    return "\n".join([*head, *lines])


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in hub.tokenizer_files(sorted(each.name for each in source.iterdir() if each.is_file())):
        # The content: files of the local cache are links.
        shutil.copyfile(source / name, folder / name)


# --------------------------------------------------------------------------------------------------
# Towers that run without egohod
# --------------------------------------------------------------------------------------------------


class _Tower(nn.Module):
    """One tower with its projection: float32 or int64 in, unit vectors in float32 out, whatever it computes in."""

    def __init__(self, model: DualEncoder, kind: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.kind, self.dtype = model, kind, dtype

    def forward(self, inputs: Tensor) -> Tensor:
        """Frames [B, 3, T, S, S] or tokens [B, L] -> [B, E]."""
        return self.model.encode_text(inputs) if self.kind == "text" else self.model.encode_video(inputs.to(self.dtype))


def export(
    source: str | Path, folder: str | Path, to: str = "onnx", *, dtype: str = "float32", name: str | None = None
) -> dict[str, float]:
    """Write both towers for torch.export (``video.pt2``, ``text.pt2``) or ONNX (``video.onnx``, ``text.onnx``).

    The batch is dynamic; frames and tokens are those of the model. Beside them are ``preprocessor_config.json`` and
    ``tokenizer.json`` (or the files of a Hugging Face tokenizer), so that they run without egohod (docs/export.md).

    Args:
        source: weights that ``create_model_and_transforms`` loads.
        folder: a new or an empty one.
        to: ``torch`` or ``onnx``; ONNX needs ``pip install onnx onnxscript``, and onnxruntime for the check.
        dtype: of weights and arithmetic, ``float32``, of torch also ``float16`` or ``bfloat16``; frames and features
            are float32 in any case.
        name: the model, where the weights do not say.

    Returns:
        The largest difference of an entry from the model in float32, by tower, on batches of one and three inputs; none
        of what could not be run here.

    Raises:
        UserError: wrong arguments, a folder that is not empty, packages that are missing, or towers in float32 that
            differ by more than 1e-4.
    """
    folder, precision = Path(folder), getattr(torch, dtype, None)
    if to not in ("torch", "onnx") or precision not in (torch.float32, torch.float16, torch.bfloat16):
        raise UserError(f"cannot export {to} in {dtype}; there are torch and onnx, in float32, float16 and bfloat16")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not an empty folder")
    if to == "onnx" and precision != torch.float32:
        # A crash of the process, which no check here could turn into a message.
        raise UserError("ONNX is exported in float32 only, as ONNX Runtime 1.32 crashes on these towers in float16")
    missing = [each for each in ("onnx", "onnxscript") if importlib.util.find_spec(each) is None]
    if to == "onnx" and missing:
        raise UserError(f"ONNX needs packages that are not installed: pip install {' '.join(missing)} onnxruntime")
    # Both towers as the weights have them, also those of CLIP, whose projections a training run would start anew.
    model, _, tokenizer = create_model_and_transforms(name or str(source), source if name else None, projections="keep")
    model.requires_grad_(False)
    side, context = model.geometry.image_size, model.geometry.context_length
    video = torch.randn(3, 3, model.num_frames, side, side, generator=torch.Generator().manual_seed(0))
    inputs = {"video": video, "text": tokenizer(list(_SENTENCES))}
    assert inputs["text"].shape == (3, context)
    expected = {kind: _Tower(model, kind, torch.float32)(each) for kind, each in inputs.items()}
    model.to(precision)
    folder.mkdir(parents=True, exist_ok=True)
    differences: dict[str, float] = {}
    for kind, each in inputs.items():
        batch = {0: torch.export.Dim("batch")}
        # A batch of two: that of one would be taken for a constant.
        with torch.no_grad():
            program = torch.export.export(_Tower(model, kind, precision), (each[:2],), dynamic_shapes=(batch,))
        if to == "torch":
            torch.export.save(program, folder / f"{kind}.pt2")
            run: Callable[[Tensor], Tensor] | None = torch.export.load(folder / f"{kind}.pt2").module()
        else:
            run = _write_onnx(program, folder / f"{kind}.onnx", kind)
        if run is not None:
            parts = torch.cat([run(each[:1]), run(each)]) - torch.cat([expected[kind][:1], expected[kind]])
            differences[kind] = float(parts.abs().max())
            if not differences[kind] <= (_TOLERANCE if precision == torch.float32 else math.inf):
                raise UserError(f"{folder}: the {kind} tower differs from the model by {differences[kind]:.2g}")
    write_text(folder / PREPROCESSING, json.dumps(preprocessing(model) | {"dtype": dtype}, indent=1) + "\n")
    if tokenizer.folder is not None:
        _copy_tokenizer(tokenizer.folder, folder)
    else:
        write_text(folder / "tokenizer.json", json.dumps(_clip_tokenizer(tokenizer)))
    return differences


def _write_onnx(program: Any, path: Path, kind: str) -> Callable[[Tensor], Tensor] | None:
    """Write an exported tower as ONNX; returns what runs it, None without ONNX Runtime."""
    written = torch.onnx.export(program, dynamo=True, input_names=[kind], output_names=["features"], verbose=False)
    assert written is not None
    written.save(path)
    if importlib.util.find_spec("onnxruntime") is None:
        log.warning("%s: not compared with the model, as onnxruntime is not installed", path)
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(inputs: Tensor) -> Tensor:
        features: np.ndarray = session.run(None, {kind: inputs.numpy()})[0]
        return torch.from_numpy(features)

    return run


def _clip_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """CLIP's tokenizer as the file of the package tokenizers, which needs no PyTorch; padded with zeros.

    Texts with markup or damaged characters, which open_clip repairs first, give other tokens.
    """
    inner = tokenizer.inner
    assert isinstance(inner, SimpleTokenizer)
    first, last = "<start_of_text>", "<end_of_text>"
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": {
            **{"direction": "Right", "max_length": tokenizer.context_length, "strategy": "LongestFirst", "stride": 0}
        },
        "padding": {
            **{"strategy": {"Fixed": tokenizer.context_length}, "direction": "Right", "pad_to_multiple_of": None},
            **{"pad_id": 0, "pad_type_id": 0, "pad_token": "!"},
        },
        "added_tokens": [{"id": inner.encoder[token], "content": token, **special} for token in (first, last)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _PIECES}, "behavior": "Removed", "invert": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "post_processor": {
            "type": "RobertaProcessing",
            **{"sep": [last, inner.encoder[last]], "cls": [first, inner.encoder[first]]},
            **{"trim_offsets": False, "add_prefix_space": False},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            **{"dropout": None, "unk_token": last, "continuing_subword_prefix": "", "end_of_word_suffix": "</w>"},
            **{"fuse_unk": False, "vocab": inner.encoder, "merges": [" ".join(each) for each in inner.bpe_ranks]},
        },
    }
