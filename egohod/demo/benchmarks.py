"""A split of the demo world written in the formats of the field's benchmarks, so that each of them runs on it.

<split>/benchmarks/
    ek100/          EPIC_100_*.csv over the split's own chunks, training rows from the train world
    egtea/          action_idx.txt, train_split1.txt and test_split1.txt (2, 3); videos/<session>/<clip>.mp4
    egomcq/         egomcq.json over the split's own chunks
    charades_ego/   CharadesEgo_v1_test_only1st.csv, Charades_v1_classes.txt; videos/<id>.mp4, two actions each;
                    CharadesEgo_v1_train_only1st.csv over the train world's chunks
    labels/         train.csv, test.csv (video,start,end,label) over the chunks of the train world and of the split
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from egohod.data.config import SourceConfig
from egohod.data.decoders import choose_decoder
from egohod.data.table import ClipSource, ClipTable
from egohod.demo.world import DEFAULT, FPS, NOUNS, VERBS
from egohod.demo.write import encode

_NOUNS = sorted(NOUNS)
# Of all objects, whatever the world's variant: classes without a clip harm nobody.
_ACTIONS = DEFAULT.actions
_VERBS = list(VERBS)
_CHOICES = 5


def write_benchmarks(world: Path, split: str = "test") -> bool:
    """Write ``world/<split>/benchmarks``; whether there was anything to do. It appears as a whole or not at all."""
    final = world / split / "benchmarks"
    if final.exists():
        return False
    part = final.with_name(".benchmarks.part")
    shutil.rmtree(part, ignore_errors=True)
    train, table = (pd.read_csv(world / name / "hod.csv") for name in ("train", split))
    frames = _frames(world / split)
    coarse = pd.read_csv(world / split / "narrations.csv")["text"].str.removeprefix("#C C ")
    _write_ek100(part / "ek100", train, table)
    _write_egtea(part / "egtea", table, frames)
    _write_egomcq(part / "egomcq", table, coarse)
    _write_charades(part / "charades_ego", train, table, frames)
    _write_labels(part / "labels", train, table)
    part.rename(final)
    return True


def _frames(folder: Path) -> list[np.ndarray]:
    """All frames of each clip, uint8 [T, H, W, 3]."""
    source = SourceConfig(metadata=str(folder / "hod.csv"), root=str(folder / "videos"), layout="chunks")
    clips = ClipSource(ClipTable.read(source, strict=True), source, choose_decoder()[1])
    rows = [clips.table.row(i) for i in range(len(clips.table))]
    return [clips.read(row, round((row.end - row.start) * FPS), None).pictures for row in rows]


def _write_ek100(folder: Path, train: pd.DataFrame, test: pd.DataFrame) -> None:
    folder.mkdir(parents=True)
    tables = {name: _ek100(table) for name, table in (("train", train), ("validation", test))}
    for name, table in tables.items():
        table.to_csv(folder / f"EPIC_100_{name}.csv", index=False)
    tables["validation"].to_csv(folder / "EPIC_100_retrieval_test.csv", index=False)
    sentences = tables["validation"].drop_duplicates("narration")[["narration_id", "narration"]]
    sentences.to_csv(folder / "EPIC_100_retrieval_test_sentence.csv", index=False)


def _ek100(table: pd.DataFrame) -> pd.DataFrame:
    def clock(seconds: float) -> str:
        return f"{int(seconds // 3600):02d}:{int(seconds // 60 % 60):02d}:{seconds % 60:09.6f}"

    verb = table["verb"].map(_VERBS.index)
    noun = table["noun"].map(_NOUNS.index)
    return pd.DataFrame(
        {
            "narration_id": table["uid"],
            "participant_id": table["video_id"].str.rpartition("_")[0],
            "video_id": table["video_id"],
            "narration_timestamp": table["start_second"].map(clock),
            "start_timestamp": table["start_second"].map(clock),
            "stop_timestamp": table["end_second"].map(clock),
            "start_frame": (table["start_second"] * FPS).round().astype(int),
            "stop_frame": (table["end_second"] * FPS).round().astype(int),
            "narration": [VERBS[v].phrase.format(o=n) for v, n in zip(table["verb"], table["noun"], strict=True)],
            "verb": table["verb"].str.replace(" ", "-"),
            "verb_class": verb,
            "noun": table["noun"],
            "noun_class": noun,
            "all_nouns": [f"['{name}']" for name in table["noun"]],
            "all_noun_classes": [f"[{code}]" for code in noun],
        }
    )


def _write_egtea(folder: Path, table: pd.DataFrame, frames: Sequence[np.ndarray]) -> None:
    """Every clip a file of its own; a clip of class k is in the split k mod 3 + 1 and, to overlap, in the next one."""
    folder.mkdir(parents=True)
    code = {f"{verb} {noun}": number for number, (verb, noun) in enumerate(_ACTIONS, start=1)}
    index = [f"{verb.replace(' ', '_').capitalize()} {noun} {code[f'{verb} {noun}']}" for verb, noun in _ACTIONS]
    (folder / "action_idx.txt").write_text("\n".join(index) + "\n")
    rows = [f"{number},{verb} {noun}" for number, (verb, noun) in enumerate(_ACTIONS, start=1)]
    (folder / "classes.csv").write_text("\n".join(["action,class_name", *rows]) + "\n")
    splits: list[list[str]] = [[], [], []]
    for row, clip in enumerate(frames):
        action, video = table["action"][row], int(table["video_id"][row].rpartition("_")[2])
        session = f"DEMO{video:02d}-R01-Kitchen"
        begin = round(table["start_second"][row] * 1000)
        name = f"{session}-{begin}-{begin + 1000 * len(clip) // FPS}-F{row:06d}-F{row + len(clip):06d}"
        verb, noun = _VERBS.index(table["verb"][row]) + 1, _NOUNS.index(table["noun"][row]) + 1
        for split in (row % 3, (row + 1) % 3):
            splits[split].append(f"{name} {code[action]} {verb} {noun}")
        (folder / "videos" / session).mkdir(parents=True, exist_ok=True)
        encode(clip, folder / "videos" / session / f"{name}.mp4")
    everything = list(dict.fromkeys(line for lines in splits for line in lines))
    for number, lines in enumerate(splits, start=1):
        # As in the original, a split trains on the clips that it does not test.
        rest = [line for line in everything if line not in set(lines)]
        for name, some in (("test", lines), ("train", rest)):
            (folder / f"{name}_split{number}.txt").write_text("".join(f"{line} \n" for line in some))


def _write_egomcq(folder: Path, table: pd.DataFrame, coarse: pd.Series) -> None:
    """For every clip the question across videos, and the one within its video where that has five other actions."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    entries: dict[str, dict[str, object]] = {}
    for row in range(len(table)):
        same = table["video_id"] == table["video_id"][row]
        other = table["action"] != table["action"][row]
        for kind, rest in ((1, table[~same & other]), (2, table[same & other])):
            wrong = rest.drop_duplicates("action").index.to_numpy()
            if len(wrong) < _CHOICES - 1:
                continue
            rows = [row, *rng.permutation(wrong)[: _CHOICES - 1].tolist()]
            order = rng.permutation(_CHOICES)
            choices = [_egomcq_clip(table, coarse, rows[i]) for i in order]
            entries[str(len(entries))] = {
                "answer": int(np.flatnonzero(order == 0)[0]),
                "query": _egomcq_clip(table, coarse, row),
                "choices": {str(i): choice for i, choice in enumerate(choices)},
                "types": kind,
            }
    (folder / "egomcq.json").write_text(json.dumps(entries))


def _egomcq_clip(table: pd.DataFrame, coarse: pd.Series, row: int) -> dict[str, object]:
    return {
        "video_uid": table["video_id"][row],
        "clip_start": float(table["start_second"][row]),
        "clip_end": float(table["end_second"][row]),
        "clip_text": table["text"][row],
        "narration": coarse[row],
    }


def _write_labels(folder: Path, train: pd.DataFrame, test: pd.DataFrame) -> None:
    folder.mkdir(parents=True)
    for name, table in (("train", train), ("test", test)):
        named = {"video_id": "video", "start_second": "start", "end_second": "end", "action": "label"}
        table[list(named)].rename(columns=named).to_csv(folder / f"{name}.csv", index=False)


def _write_charades(folder: Path, train: pd.DataFrame, table: pd.DataFrame, frames: Sequence[np.ndarray]) -> None:
    (folder / "videos").mkdir(parents=True)
    code = {f"{verb} {noun}": f"c{number:03d}" for number, (verb, noun) in enumerate(_ACTIONS)}
    classes = [f"{code[f'{verb} {noun}']} {VERBS[verb].phrase.format(o=noun)}" for verb, noun in _ACTIONS]
    (folder / "Charades_v1_classes.txt").write_text("\n".join(classes) + "\n")
    # The train world's videos are whole already, with many actions each.
    told = [
        f"{code[a]} {start:.2f} {end:.2f}" for a, start, end in train[["action", "start_second", "end_second"]].values
    ]
    actions_of = train.assign(told=told).groupby("video_id")["told"].agg(";".join)
    trained = pd.DataFrame({"id": actions_of.index, "scene": "Kitchen", "actions": actions_of.to_numpy()})
    trained.to_csv(folder / "CharadesEgo_v1_train_only1st.csv", index=False)
    rows = []
    for first in range(0, len(table) - 1, 2):
        pair, at, actions = (first, first + 1), 0.0, []
        for row in pair:
            length = len(frames[row]) / FPS
            actions.append(f"{code[table['action'][row]]} {at:.2f} {at + length:.2f}")
            at += length
        name = f"D{first:04d}EGO"
        encode(np.concatenate([frames[row] for row in pair]), folder / "videos" / f"{name}.mp4")
        rows.append({"id": name, "scene": "Kitchen", "actions": ";".join(actions), "length": f"{at:.2f}"})
    pd.DataFrame(rows).to_csv(folder / "CharadesEgo_v1_test_only1st.csv", index=False)
