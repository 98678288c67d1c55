"""Models of other projects, seen as a :class:`~egohod.evaluation.embed.VideoTextModel`.

* :class:`SentenceModel`: any object with ``encode_video(frames)`` and ``encode_text(sentences)``
* :class:`TransformersModel`: CLIP-like models of transformers, frames averaged
* :class:`StoredFeatures`: a folder of features instead of a model

open_clip's are in :class:`egohod.evaluation.embed.FrameAverage`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize as unit

from egohod.data.table import ClipTable
from egohod.errors import UserError
from egohod.evaluation.features import read_feature_file, read_features, read_index
from egohod.model.config import ImageStats

# Normalising with these leaves pixels as 0..1.
_PIXELS = ImageStats((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
# Side of the frames of a model that does not say which it expects.
IMAGE_SIZE = 224
TEXTS_FILE = "texts.npz"
# Clips of other programs are written with fewer digits.
_SAME_SECOND = 0.01


def mean_of_frames(encode: Callable[[Tensor], Tensor], video: Tensor, normalize: bool) -> Tensor:
    """The mean of the features of single frames, blind to their order: [B, 3, T, H, W] -> [B, D]."""
    batch, _, frames, *_ = video.shape
    # Unit vectors first, or a frame of large norm would outvote the others.
    features = unit(encode(video.transpose(1, 2).flatten(0, 1)), dim=-1)
    mean = features.unflatten(0, (batch, frames)).mean(dim=1)
    return unit(mean, dim=-1) if normalize else mean


class SentenceModel(nn.Module):
    """Any object with two methods:

    * ``encode_video(frames)``: float32 RGB in 0..1 [B, T, H, W, 3], on the model's device -> [B, D]
    * ``encode_text(sentences)``: a list of B strings -> [B, D]

    and perhaps ``image_size``, the side of the square frames in pixels (224). Features are tensors or arrays; they are
    L2-normalised here. A model without ``encode_text`` can be measured on tasks without texts.
    """

    image_stats = _PIXELS
    tokenizer = list

    def __init__(self, inner: Any) -> None:
        super().__init__()
        if not callable(getattr(inner, "encode_video", None)):
            raise UserError(
                f"{type(inner).__name__} has no method encode_video(frames [B, T, H, W, 3]); docs/evaluation.md, "
                "'Other models'"
            )
        self.inner = inner
        self.size = int(getattr(inner, "image_size", IMAGE_SIZE))

    def encode_video(self, video: Tensor, normalize: bool = True) -> Tensor:
        """Frames in 0..1 [B, 3, T, H, W] -> float32 [B, D]."""
        return self._features(self.inner.encode_video(video.permute(0, 2, 3, 4, 1).contiguous()), len(video), "video")

    def encode_text(self, sentences: Sequence[str], normalize: bool = True) -> Tensor:
        """B sentences -> float32 [B, D]. Raises :class:`UserError` for a model without a text tower."""
        if not callable(getattr(self.inner, "encode_text", None)):
            raise UserError(
                f"{type(self.inner).__name__} has no method encode_text(sentences), which this benchmark needs: it "
                "compares clips with texts"
            )
        return self._features(self.inner.encode_text(list(sentences)), len(sentences), "text")

    def _features(self, value: Any, count: int, what: str) -> Tensor:
        features = torch.as_tensor(value).float()
        if features.dim() != 2 or len(features) != count:
            raise UserError(
                f"{type(self.inner).__name__}.encode_{what} returned {list(features.shape)} for {count} items, not "
                f"[{count}, D]"
            )
        return unit(features, dim=-1)


class TransformersModel(nn.Module):
    """A CLIP-like model of transformers (``get_image_features``, ``get_text_features``), its frames averaged.

    ``folder`` holds the model and its processor, as ``save_pretrained`` writes them; nothing is downloaded. Raises
    :class:`UserError` where transformers or the files are missing.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        try:
            from transformers import AutoModel, AutoProcessor

            self.inner = AutoModel.from_pretrained(folder, local_files_only=True)
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        except ImportError as error:
            raise UserError(f"transformers:{folder}: {error}; pip install transformers") from error
        except (OSError, ValueError) as error:
            raise UserError(f"transformers:{folder}: {' '.join(str(error).split())}") from error
        if not hasattr(self.inner, "get_image_features") or not hasattr(self.inner, "get_text_features"):
            raise UserError(f"transformers:{folder}: {type(self.inner).__name__} has no features of images and texts")
        self.tokenizer = list
        images, self._tokenizer = processor.image_processor, processor.tokenizer
        side = images.crop_size if getattr(images, "do_center_crop", False) else images.size
        self.size = int(side.get("height") or side["shortest_edge"])
        self.image_stats = ImageStats(tuple(images.image_mean), tuple(images.image_std))

    def encode_video(self, video: Tensor, normalize: bool = True) -> Tensor:
        """Frames normalised with ``image_stats`` [B, 3, T, H, W] -> [B, D]."""
        # A tensor up to version 4 of transformers, an object from 5 on; so for texts.
        encode = self.inner.get_image_features
        return mean_of_frames(
            lambda x: getattr(value := encode(pixel_values=x), "pooler_output", value), video, normalize
        )

    def encode_text(self, sentences: Sequence[str], normalize: bool = True) -> Tensor:
        """B sentences -> [B, D]."""
        # SigLIP's towers were trained on texts padded to their whole length.
        length = self._tokenizer.model_max_length
        padding = {"padding": "max_length", "max_length": length} if length < 1000 else {"padding": True}
        tokens = self._tokenizer(list(sentences), truncation=True, return_tensors="pt", **padding)
        output = self.inner.get_text_features(**tokens.to(self.inner.device))
        features = getattr(output, "pooler_output", output)
        return unit(features, dim=-1) if normalize else features


class StoredFeatures(nn.Module):
    """Features on disk in the place of a model: what ``tools/extract_features.py`` writes, or the same by others.

    ``texts.npz`` in the folder has ``features`` float32 [M, D] and ``text`` [M] of the benchmark's texts, which
    ``egohod.load_benchmark(...).texts`` lists. Raises :class:`UserError` for a folder that cannot be read.
    """

    tokenizer = list

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        index = read_index(self.folder)
        self.weights = str(index["weights"])
        # What results state is how the features were made, not what a benchmark's protocol would have asked for.
        made: dict[str, Any] = index.get("protocol") or {}
        self.size, self.frames = int(made.get("size", IMAGE_SIZE)), made.get("frames")
        self._clips, _ = read_features(self.folder)
        self._rows: dict[str, list[int]] = {}
        for row, video in enumerate(self._clips.videos):
            self._rows.setdefault(video, []).append(row)

    def of_clips(self, clips: ClipTable) -> tuple[Tensor, dict[int, str]]:
        """Unit vectors float32 [N, D] of clips by video and times; NaN, and a message, for those it lacks."""
        chosen, faults = np.full(len(clips), -1), dict[int, str]()
        for place, (video, start, end) in enumerate(zip(clips.videos, clips.start, clips.end, strict=True)):
            rows = np.array(self._rows.get(video, []), dtype=np.int64)
            # Infinite ends are equal, though their difference is no number.
            ends = self._clips.end[rows]
            same = (ends == end) | (np.abs(np.where(np.isfinite(ends), ends, 0) - end) < _SAME_SECOND)
            same &= np.abs(self._clips.start[rows] - start) < _SAME_SECOND
            if same.any():
                chosen[place] = rows[same.argmax()]
            else:
                faults[place] = f"{self.folder}: no features of {video}, {start:g} to {end:g} s"
        features = torch.from_numpy(self._clips.features[chosen])
        features[torch.from_numpy(chosen < 0)] = torch.nan
        return unit(features, dim=-1), faults

    def encode_video(self, video: Tensor, normalize: bool = True) -> Tensor:
        """Raises :class:`UserError`: features of other frames than the stored ones need the model."""
        raise UserError(
            f"{self.folder}: stored features have no temporal controls and no mirrored clips, which need the model"
        )

    def encode_text(self, sentences: Sequence[str], normalize: bool = True) -> Tensor:
        """Unit vectors float32 [B, D]. Raises :class:`UserError` naming the texts that the folder lacks."""
        path = self.folder / TEXTS_FILE
        try:
            features, (texts,) = read_feature_file(path, "text")
        except FileNotFoundError as error:
            raise UserError(f"{path}: no such file, but the benchmark compares clips with texts") from error
        except Exception as error:  # a damaged file can raise anything
            raise UserError(f"{path}: not readable: {error}") from error
        row = {str(text): i for i, text in enumerate(texts)}
        if missing := [text for text in sentences if text not in row]:
            raise UserError(*(f"{path}: no features of the text '{text}'" for text in dict.fromkeys(missing)))
        return unit(torch.from_numpy(features[[row[text] for text in sentences]]), dim=-1)
