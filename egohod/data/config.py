"""Settings of clips, their annotation files, labels and loading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from egohod.knobs import knob, part


@dataclass
class HardNegativesConfig:
    """Hard negatives: batches in which some clips differ only in the motion."""

    share: float = knob(
        0.0, "fraction of each batch filled with groups of similar clips; 0 is the plain sampler", low=0, high=1
    )
    group_by: list[str] = knob(
        ["video"],
        "what the clips of a group share: video (the same scene), window (the same time window of a video) "
        "or any column of the annotation file",
    )
    group_size: int = knob(4, "clips of a group in a batch", low=2)
    window_seconds: float = knob(60.0, "length of a time window", above=0)


@dataclass
class SourceConfig:
    """One annotation file and its videos; NAME is yours to choose."""

    metadata: str = knob("", "annotation file")
    format: str = knob(
        "auto",
        "hod: csv with video_id,start_second,end_second,text (or caption); egoclip: EgoClip's table; ego4d: "
        "narration.json; pickle: list of (video, start, end, text) as LaViLa and AVION release; ek100, egtea, "
        "charades: these benchmarks' files; labels: csv with video,start,end,label; lerobot: folder of a LeRobot data "
        "set; webdataset: shards.parquet, the index of tars of mp4 and json or txt (tools/prepare_data.py index); "
        "egodex: folder of mp4 and hdf5; or one that you added to "
        "egohod/data/formats; auto recognises the file",
    )
    columns: dict[str, str] = knob(
        {}, "this file's names for the columns of its format, e.g. {video_id: vid, text: sentence}"
    )
    clip_rule: str = knob(
        "egoclip",
        "ego4d: how long a narrated moment lasts. egoclip: mean spacing of the video's narrations over that of all "
        "videos, as published; neighbours: spacing to the neighbours over the video's mean",
        choices=("egoclip", "neighbours"),
    )
    video_keys: list[str] = knob(
        [], "lerobot: the cameras, by the names of their features, such as observation.images.ego; []: the only one"
    )
    subtasks: bool = knob(False, "lerobot: clips are the annotated steps of the episodes, not the episodes")
    exclude: str | None = knob(None, "csv of clips to leave out, such as tools/verify_dataset.py writes")
    weight: float | None = knob(
        None,
        "share of every batch relative to the other sources' weights, set for all or none; 0 leaves the source out; "
        "null: all clips are equally likely",
        low=0,
    )
    root: str = knob("", "folder of the videos, or an fsspec URI such as s3://bucket/prefix")
    dataset_roots: dict[str, str] = knob(
        {}, "folders by the value of the dataset column, e.g. {ego4d: /data/ego4d}; all other rows use root"
    )
    layout: str = knob(
        "auto",
        "chunks is root/<video>/<0000>.mp4, avion is root/<video>.mp4/<start second>.mp4, whole is root/<video>.mp4; "
        "auto detects it from the files",
        choices=("auto", "chunks", "avion", "whole"),
    )
    chunk_seconds: float = knob(15.0, "length of a chunk; upstream's Ego4D and HowTo100M chunks have 15 s", above=0)
    min_clip_seconds: float | None = knob(
        None,
        "a shorter clip is widened to this; null: to 1 in chunks, as upstream does, and not at all in whole files; 0: "
        "never",
        low=0,
    )
    detections: str | None = knob(
        None,
        "hands and objects in these videos for loss.boxes: a parquet file, or a folder of them, in the schema of "
        "egohod/data/detections.py (EPIC-KITCHENS' one)",
    )
    list_text: str = knob(
        "random",
        "for a clip with several narrations: draw one, join all with '. ' as upstream does, or take the first",
        choices=("random", "concat", "first"),
    )
    opposite_column: str | None = knob(
        None,
        "column with the opposite of each caption for loss.opposites (a list literal where there are several; empty: "
        "none), as tools/opposites.py writes it; null: by the rules of egohod/data/opposites.py",
    )
    replacement_column: str | None = knob(
        None,
        "column with a list literal of captions that are false of the clip, for loss.name=egonce_pp, as "
        "tools/opposites.py --replacements writes it; null, and clips with several narrations: by the rules of "
        "egohod/data/replacements.py",
    )
    tag_columns: list[str] = knob(
        [],
        "two columns with the verbs and the nouns of a clip, words or classes, each one or a list literal, for "
        "loss.name=egonce and egonce_pp: [tag_verb, tag_noun] of EgoClip; []: the words of the caption, by rule",
    )


@dataclass
class LabelsConfig:
    """The target of a training clip: its own narration, a relevant text, or a class."""

    target: str = knob(
        "narration",
        "narration: the clip's own text (pretraining); relevancy: a text drawn from all that are relevant by the "
        "classes of verb and nouns; class: the classes of model.heads",
        choices=("narration", "relevancy", "class"),
    )
    threshold: float = knob(0.1, "relevancy: texts above it may be drawn for a clip (EPIC-KITCHENS MIR)", low=0, high=1)
    sentences: str | None = knob(
        None,
        "relevancy: csv of the texts to draw from (EPIC_100_retrieval_train_sentence.csv); null takes the distinct "
        "narrations of the clips",
    )
    columns: list[str] = knob(
        ["label"], "class: the columns whose values together are a clip's class, such as verb_class and noun_class"
    )
    classes: list[str] = knob(
        [], "class: further annotation files that name classes, such as EPIC_100_validation.csv and actions.csv"
    )


@dataclass
class DataConfig:
    """From an annotation row to a batch of uint8 clips."""

    train: dict[str, SourceConfig] = knob({}, "sources of clips by name")
    labels: LabelsConfig = part(LabelsConfig)
    strict: bool = knob(False, "stop at the first unusable annotation row; false leaves it out and counts it")
    decoder: str = knob(
        "auto",
        "auto takes the fastest that can be imported (pyav, then torchcodec, then decord) and logs which; cuda decodes "
        "on the GPU (NVDEC, through torchcodec) in data.workers threads, for nodes with too few cores",
        choices=("auto", "torchcodec", "pyav", "decord", "cuda"),
    )
    cache: str | None = knob(
        None, "folder on a local disk that keeps files of remote roots (those up to 64 MB); null keeps none"
    )
    cache_gb: float = knob(
        50.0, "size of data.cache in GB (1e9 bytes); least recently used files are removed first", above=0
    )
    frame_cache: str | None = knob(
        None,
        "folder for decoded frames of local videos, height x width x 3 bytes each: every video is decoded once, which "
        "halves a small model's step on a CPU; for small datasets, videos of more than 256 MB are left out; null "
        "decodes for every clip",
    )
    # The same clips whatever it is, so that the machine may choose.
    workers: int | None = knob(
        None,
        "decoding processes per training process; 0 decodes in the training process; null or auto: the cores of the "
        "node divided by its training processes, less one for the training process itself, at most 16 (upstream: 8)",
        low=0,
    )
    # Four hide a round trip of 100 ms behind the 30 ms that a clip takes to decode.
    read_ahead: int = knob(
        4,
        "clips of remote videos that each worker fetches while it decodes the ones before them; 0 fetches each clip "
        "when it is decoded",
        low=0,
    )
    prefetch: int = knob(
        2,
        "batches each worker holds ready, at least; with several micro-batches a step, all workers together hold the "
        "next step's",
        low=1,
    )
    timeout: float = knob(
        900.0,
        "seconds without a batch from the workers after which a run ends, as on a file system that hangs; longer than "
        "a batch ever takes to decode",
        above=0,
    )
    pin_memory: bool = knob(
        True, "page-locked batches, so that the copy to a GPU overlaps with computing; ignored on CPU"
    )
    crop_scale_min: float = knob(
        0.5, "smallest fraction of the picture that a training crop keeps (upstream: 0.5)", above=0, high=1
    )
    flip: float = knob(
        0.5, "probability of a horizontal flip; left and right are exchanged in the caption too", low=0, high=1
    )
    max_bad_fraction: float = knob(
        0.01,
        "stop when more than this fraction of the clips that were tried, by all processes, could not be read; a run "
        "that stopped is resumed with a larger one",
        low=0,
        high=1,
    )
    hard_negatives: HardNegativesConfig = part(HardNegativesConfig)

    @staticmethod
    def convert_old_keys(section: dict[str, Any], below: dict[str, Any]) -> list[tuple[str, str]]:
        """Replace ``workers: auto`` by null, in place: a number is a number in Python. Nothing in it is old."""
        if section.get("workers") == "auto":
            section["workers"] = None
        return []
