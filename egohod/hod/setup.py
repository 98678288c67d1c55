"""From a configuration to a pipeline, and from what that found out to rows and pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from egohod.data.decoders import choose_decoder
from egohod.data.files import open_cache
from egohod.data.source import ClipSource
from egohod.data.table import ClipTable, choose_text
from egohod.data.video import VideoError
from egohod.errors import UserError
from egohod.hod import records
from egohod.hod.blocks import key_of
from egohod.hod.clips import checksum, narrated, windows
from egohod.hod.config import HodConfig
from egohod.hod.draw import Seen
from egohod.hod.facts import ClipFacts
from egohod.hod.parts import make_stages
from egohod.hod.pipeline import COLUMNS, Pipeline, Progress, Result, number, uid_of
from egohod.hod.shards import Shard, Work
from egohod.hod.stages import CHECK, DETECT, TRACK
from egohod.hod.tally import Tally

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A pipeline with the configuration it was made of."""

    cfg: HodConfig
    source: ClipSource
    pipeline: Pipeline
    fingerprint: str
    """Of all that the output depends on."""

    @property
    def work(self) -> Work:
        """The folder of the stages."""
        return self.pipeline.work

    def finished(self, shard: Shard) -> dict[str, Any] | None:
        """What a shard that is finished with these settings holds."""
        return self.work.finished(shard, self.fingerprint)

    def finish(self, shard: Shard) -> Result:
        """See :meth:`Pipeline.finish`; says what the narrations are like."""
        tally = Tally(self.cfg.narrator.kind)

        def row(index: int, value: Any) -> Sequence[str]:
            tally.add(value)
            return self._row(index, value)

        result = self.pipeline.finish(shard, self.fingerprint, row, [*COLUMNS, *self.cfg.keep])
        tally.say()
        return result

    def merge(self, shards: int) -> dict[str, int]:
        """See :meth:`Work.merge`."""
        return self.work.merge(shards, self.fingerprint, len(self.pipeline.table), self.cfg.block)

    def seen(self, index: int) -> Seen:
        """All that is known of a clip, to be drawn; without pictures where its video cannot be read."""
        known, row = self.pipeline.known(index), self.pipeline.table.row(index)
        values = {name: found.value for name, found in known.items() if found.fault is None}
        fault = next((f"{name}: {found.fault}" for name, found in known.items() if found.fault), None)
        pictures, seconds = np.zeros((0, 1, 1, 3), np.uint8), np.zeros(0)
        try:
            frames = self.source.read(row, self.cfg.frames, None)
            # Each once, as the detector saw them.
            seconds, kept = np.unique(frames.seconds, return_index=True)
            pictures = frames.pictures[kept]
        except VideoError as error:
            log.warning("no picture: %s", error)
        boxes = values[DETECT]["boxes"] if DETECT in values else {"second": []}
        facts = records.read(ClipFacts, values[TRACK]) if TRACK in values else None
        return Seen(
            title=f"{row.video_id} {row.start:.2f}-{row.end:.2f} s",
            pictures=pictures,
            seconds=seconds,
            boxes=[dict(zip(boxes, each, strict=True)) for each in zip(*boxes.values(), strict=True)],
            facts=facts,
            source=source_text(self.cfg, self.pipeline.table, index),
            text=values[CHECK]["text"] if CHECK in values else fault or "not narrated yet",
            narrator=values[CHECK]["narrator"] if CHECK in values else self.cfg.narrator.kind,
            verdict="failed" if fault else _verdict(values.get(CHECK)),
            sides=tuple(sorted(facts.hands)) if facts else (),
            note="; ".join(values[CHECK]["refusals"]) if CHECK in values else "",
        )

    def described(self) -> dict[str, str]:
        """What a page says about the run."""
        cfg = self.cfg
        known = {
            "metadata": cfg.source.metadata or f"none: windows of {cfg.windows.seconds:g} s",
            "videos": cfg.source.root,
            "detector": cfg.detector.kind,
            "narrator": cfg.narrator.kind,
            "frames a clip": str(cfg.frames),
        }
        return {name: value for name, value in known.items() if value}

    def _row(self, index: int, value: Any) -> Sequence[str]:
        table = self.pipeline.table
        row = table.row(index)
        cells = [row.video_id, number(row.start), number(row.end), value["text"], row.dataset or self.cfg.dataset]
        return [*cells, uid_of(table, index, row), *(table.value(name, index) for name in self.cfg.keep)]


def build(cfg: HodConfig, *, again: bool = False, tell: Callable[[Progress], None] = lambda _: None) -> Plan:
    """Read the clips, and set up the stages; nothing is written, no video opened but to find windows.

    Raises :class:`UserError` for whatever is missing.
    """
    work = Work(Path(cfg.output))
    _require_own_place(cfg, work)
    table = clips_of(cfg)
    opener = choose_decoder(cfg.decoder)[1]
    source = ClipSource(table, cfg.source, opener, open_cache(cfg.cache, cfg.cache_gb))

    def text_of(index: int) -> str:
        return source_text(cfg, table, index)

    stages = make_stages(cfg, source, text_of)
    pipeline = Pipeline(
        table, stages, work, text_of, block=cfg.block, max_bad_fraction=cfg.max_bad_fraction, again=again, tell=tell
    )
    settings = [(stage.name, stage.settings) for stage in stages]
    fingerprint = key_of(checksum(cfg.source, table), settings, cfg.keep, cfg.dataset, cfg.seed, cfg.block)
    return Plan(cfg, source, pipeline, fingerprint)


def _require_own_place(cfg: HodConfig, work: Work) -> None:
    """Raise :class:`UserError` if the output would take the place of a folder, or of a file that is read."""
    if work.output.is_dir():
        raise UserError(f"output is '{cfg.output}', which is a folder; it must be a file, such as {cfg.output}/hod.csv")
    options = {f"detector.options.{name}": value for name, value in cfg.detector.options.items()}
    read = {"source.metadata": cfg.source.metadata, "source.exclude": cfg.source.exclude, **options}
    read["narrator.prompt"] = cfg.narrator.prompt
    for name, path in read.items():
        if isinstance(path, str) and path and Path(path).resolve() in (work.output.resolve(), work.failures.resolve()):
            raise UserError(f"output is '{cfg.output}', but {name} is read from {path}: it would be overwritten")


def clips_of(cfg: HodConfig) -> ClipTable:
    """The clips that are to be narrated. Raises :class:`UserError`."""
    if cfg.source.metadata:
        return narrated(cfg.source, cfg.keep, cfg.max_bad_fraction)
    if cfg.narrator.kind != "vlm":
        raise UserError(
            "no narrations to start from: give --metadata (source.metadata), or narrator.kind=vlm to narrate windows "
            "of the videos of --root"
        )
    return windows(cfg.source.root, cfg.windows.seconds, cfg.windows.stride, cfg.decoder)


def source_text(cfg: HodConfig, table: ClipTable, index: int) -> str:
    """What was said about a clip before; of several narrations the one that ``source.list_text`` chooses."""
    texts = table.row(index).texts
    return choose_text(texts, cfg.source.list_text, np.random.default_rng((cfg.seed, index)))


def _verdict(checked: Any) -> str:
    """What became of the narrator's words."""
    if checked is None:
        return "unchecked"
    if not checked["refusals"]:
        return "passed"
    return "replaced" if checked["narrator"] == "template" else "asked again"
