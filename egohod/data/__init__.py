"""From annotation files and videos to batches of uint8 clips.

The way of a clip: :mod:`~egohod.data.formats` (a dataset's files), :mod:`~egohod.data.table` (clips as columns),
:mod:`~egohod.data.videos` (which files and frames), :mod:`~egohod.data.storage` (their bytes),
:mod:`~egohod.data.decoders`, :mod:`~egohod.data.dataset` (crop, flip, tokens: samples for training and evaluation),
:mod:`~egohod.data.loader` (order, workers, resume).
"""
