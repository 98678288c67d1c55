"""From annotation rows and video files to batches of uint8 clips.

The way of a clip: :mod:`~egohod.data.table` (which clip, which words), :mod:`~egohod.data.frames` (which frames),
:mod:`~egohod.data.videos` (which files), :mod:`~egohod.data.storage` (their bytes), :mod:`~egohod.data.decoders`,
:mod:`~egohod.data.transforms` (one crop, one flip), :mod:`~egohod.data.dataset` (row + seed -> sample),
:mod:`~egohod.data.loader` (order, workers, resuming).
"""
