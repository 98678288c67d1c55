"""The clips of an annotation table where they lie: their frames, and their boxes. Nothing here needs PyTorch."""

from __future__ import annotations

import numpy as np

from egohod.data.config import SourceConfig
from egohod.data.decoders import Opener
from egohod.data.detections import EDGES, ROLES, BoxTable
from egohod.data.files import LocalCache
from egohod.data.table import ClipRow, ClipTable
from egohod.data.video import Frames, VideoStore
from egohod.errors import UserError


class ClipSource:
    """One annotation table with the folders its videos lie in."""

    def __init__(
        self,
        table: ClipTable,
        config: SourceConfig,
        opener: Opener,
        cache: LocalCache | None = None,
        boxes: bool = False,
    ) -> None:
        self.table = table
        self.config = config
        self.list_text = config.list_text
        self._with_boxes = boxes
        self._boxes = BoxTable.read(config.detections) if boxes and config.detections else None
        self._stores = {
            name: VideoStore(root, config.layout, config.chunk_seconds, opener, cache, config.min_clip_seconds)
            for name, root in _roots(table, config).items()
        }

    def read(self, row: ClipRow, num_frames: int, rng: np.random.Generator | None) -> Frames:
        """``num_frames`` frames of a clip; see :meth:`VideoStore.read`."""
        store = self._stores.get(row.dataset) or self._stores[""]
        return store.read(row.video_id, row.start, row.end, num_frames, rng)

    def boxes(self, row: ClipRow, seconds: np.ndarray) -> np.ndarray | None:
        """Boxes at ``seconds`` [T] of the row's video, float32 [T, 3, 4]; None if none were asked for."""
        if not self._with_boxes:
            return None
        if self._boxes is None:
            return np.full((len(seconds), len(ROLES), len(EDGES)), np.nan, dtype=np.float32)
        return self._boxes.at(row.video_id, seconds)


def _roots(table: ClipTable, config: SourceConfig) -> dict[str, str]:
    """Video folder by dataset name; the name '' stands for all others."""
    datasets = table.datasets()
    roots = {name: root for name, root in config.dataset_roots.items() if name in datasets}
    others = [name for name in datasets if name not in roots]
    if others:
        if not config.root:
            what = f"the rows of dataset '{others[0]}'" if others[0] else "its rows"
            raise UserError(f"{table.path}: {what} need a video folder; set root (or dataset_roots.NAME)")
        roots[""] = config.root
    return roots
