"""Mixing clips with each other: mixup and cutmix over whole clips."""

from __future__ import annotations

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor

from egohod.training.config import TrainConfig


class ClipMixer:
    """Mixup (1710.09412) or cutmix (1905.04899) of a batch of clips, timm's; a cut is the same box in all frames."""

    def __init__(self, cfg: TrainConfig) -> None:
        self._alphas = {"mixup_alpha": cfg.mixup, "cutmix_alpha": cfg.cutmix}

    def __call__(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """``video`` float [B, C, T, H, W], changed in place, and whose share of pixels is whose: float32 [B, B].

        What is drawn follows from torch's generator, so that a step that is repeated mixes alike. The number of clips
        is even (:func:`egohod.training.setup.micro_batches`).
        """
        # timm draws from numpy's global generator.
        before = np.random.get_state()  # noqa: NPY002
        np.random.seed(int(torch.randint(2**31, ()).item()))  # noqa: NPY002
        try:
            # Each clip is a class of its own, so timm's mixed targets tell the shares for any number of heads.
            mix = Mixup(**self._alphas, label_smoothing=0.0, num_classes=len(video))
            # Time into channels: timm's cut is along the third and fourth dimension, which must be H and W.
            _, shares = mix(video.flatten(1, 2), torch.arange(len(video), device=video.device))
        finally:
            np.random.set_state(before)  # noqa: NPY002
        return video, shares
