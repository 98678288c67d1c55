"""A split of a demo world in the formats of multiple-choice and grounding benchmarks, see :mod:`egohod.demo.write`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from egohod.demo.world import NOUNS, VERBS

# Of a question that has texts as choices.
_CHOICES = 5
# Takes of a recording in which a moment is looked for.
_TAKES = 5


def write_questions(folder: Path, table: pd.DataFrame, files: Sequence[str]) -> None:
    """Write a folder for each benchmark; ``files`` are the clips' own video files below those of egtea."""
    rng = np.random.default_rng(0)  # the questions are a function of the clips alone
    rows = [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]
    for row in rows:
        verb, noun = str(row["verb"]), str(row["noun"])
        row["caption"] = VERBS[verb].phrase.format(o=noun)
        # The opposite motion first: of all wrong captions it is the hardest.
        others = [name for name in VERBS if noun in VERBS[name].nouns and name != verb]
        others.sort(key=lambda name, verb=verb: name != VERBS[verb].opposite)  # type: ignore[misc]
        row["other_verbs"] = [VERBS[name].phrase.format(o=noun) for name in others]
        row["other_nouns"] = [VERBS[verb].phrase.format(o=each) for each in VERBS[verb].nouns if each != noun]

    def shuffled(right: str, wrong: Sequence[str]) -> tuple[list[str], int]:
        choices = [right, *wrong[: _CHOICES - 1]]
        order = rng.permutation(len(choices))
        return [choices[i] for i in order], int(np.flatnonzero(order == 0)[0])

    def write(path: str, content: Any) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content if isinstance(content, str) else json.dumps(content))

    localised, recognised, mcq, tempo, hoi = dict[str, Any](), dict[str, Any](), list[str](), list[Any](), list[Any]()
    for i, row in enumerate(rows):
        choices, right = shuffled(row["caption"], row["other_verbs"])
        asked = {"question": "What is the person doing?", "options": choices, "correct_idx": [right]}
        write(f"handyvqa/action/action_{i:04d}.json", {**asked, "video": files[i]})
        things = [str(row["noun"]), f"{row['colour']} {row['noun']}", *(n for n in NOUNS if n != row["noun"])][:6]
        objects = {"question": "Which objects?", "options": things, "correct_idx": [0, 1], "video": files[i]}
        write(f"handyvqa/objects/objects_{i:04d}.json", objects)
        lettered = "\n".join(f"({'ABCDE'[k]}) {text}" for k, text in enumerate(choices))
        prompt = f"<video>\nWhat does the {row['hand']} hand do?\n{lettered}\nAnswer with the option's letter."
        talk = [{"from": "human", "value": prompt}, {"from": "gpt", "value": "ABCDE"[right]}]
        mcq.append(json.dumps({"id": str(i), "conversations": talk, "image": {"video": f"{files[i]}.mp4"}}))
        hoi.append(
            {
                "video_uid": row["video_id"], "clip_start": row["start_second"], "clip_end": row["end_second"],
                "clip_text": row["caption"], "tag_verb": "[0]", "tag_noun": "[0]",
                "verb_neg": ",".join(row["other_verbs"]), "noun_neg": ",".join(row["other_nouns"]),
            }
        )  # fmt: skip
        shown = {"video 1": {"id": row["video_id"], **_times(row, "start_time", "end_time")}}
        recognised[f"fine_grained_action_recognition_{i}"] = {
            "inputs": shown, "question": "Which best describes it?", "choices": choices, "correct_idx": right,
        }  # fmt: skip
        same = [each for each in rows if each["video_id"] == row["video_id"] and each["action"] != row["action"]]
        if len(same) >= _CHOICES - 1:
            picked = [row, *(same[k] for k in rng.permutation(len(same))[: _CHOICES - 1])]
            stretches = [
                "video 1 from <TIME {a} video 1> to <TIME {b} video 1>".format(**_times(each, "a", "b"))
                for each in picked
            ]
            localised[f"fine_grained_action_localization_{i}"] = {
                "inputs": shown, "question": f"When did the action <{row['caption']}> happen in the video 1?",
                "choices": stretches, "correct_idx": 0,
            }  # fmt: skip
        clip = f"{row['video_id']}_{row['start_second']}_{row['end_second']}"
        tempo.append(
            {
                "question_id": f"{clip}_0", "clip_id": clip, "question_type": "action sequence",
                "question": "What happens?", "answer": row["caption"],
            }
        )  # fmt: skip
    # One that no dual encoder answers, as most of the original.
    counting = {"inputs": {"video 1": {"id": rows[0]["video_id"]}}, "question": "How often is <BBOX 1 2 3 4> moved?"}
    recognised["3d_perception_0"] = {**counting, "choices": ["0", "1", "2", "3", "4"], "correct_idx": 0}
    write("hd_epic_vqa/fine_grained_action_recognition.json", recognised)
    write("hd_epic_vqa/fine_grained_action_localization.json", localised)
    write("egoexolearn_mcq/mcq.jsonl", "\n".join(mcq) + "\n")
    write("egotempo/egotempo_openQA.json", {"info": {"version": "1"}, "annotations": tempo})
    write("egohoibench/EgoHOIBench.csv", pd.DataFrame(hoi).to_csv(sep="\t", index=False))
    chiral = [
        {
            "id": name, "chiral_triplet_id": f"{VERBS[row['verb']].path} {row['noun']}",
            "chiral_label": int(VERBS[row["verb"]].backwards), "narration": row["caption"],
        }
        for name, row in zip(files, rows, strict=True)
        if VERBS[row["verb"]].opposite
    ]  # fmt: skip
    write("chirality/cia-demo-validation.csv", pd.DataFrame(chiral).to_csv(index=False))
    write("egoexolearn_association/association_val_hard.json", _association(rows, rng))
    _write_moments(folder, rows)


def _times(row: Mapping[str, Any], *names: str) -> dict[str, str]:
    values = (row["start_second"], row["end_second"])
    pairs = zip(names, values, strict=True)
    return {name: f"{int(s // 3600):02d}:{int(s // 60 % 60):02d}:{s % 60:09.6f}" for name, s in pairs}


def _association(rows: Sequence[Mapping[str, Any]], rng: np.random.Generator) -> dict[str, Any]:
    """Which of several clips shows the same kind of motion as a clip; both views are that of the demo world."""
    clips = [
        {
            "video_uid": row["video_id"], "start_sec": row["start_second"], "end_sec": row["end_second"],
            "narration_en": row["caption"],
        }
        for row in rows
    ]  # fmt: skip
    result: dict[str, Any] = {}
    for i, row in enumerate(rows):
        same = [k for k, other in enumerate(rows) if k != i and other["motion_kind"] == row["motion_kind"]]
        wrong = [k for k, other in enumerate(rows) if other["motion_kind"] != row["motion_kind"]]
        if same and len(wrong) >= _CHOICES - 1:
            picked = [same[0], *rng.permutation(wrong)[: _CHOICES - 1].tolist()]
            order = rng.permutation(_CHOICES)
            result[str(len(result))] = {
                "answer": int(np.flatnonzero(order == 0)[0]), "query": clips[i], "types": 1 + i % 2,
                "choices": {str(place): clips[picked[k]] for place, k in enumerate(order)},
            }  # fmt: skip
    return result


def _write_moments(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Recordings of a few takes each, by turns of the training and the validation part."""
    parts: dict[tuple[str, str], list[dict[str, Any]]] = {}
    videos = dict.fromkeys(str(row["video_id"]) for row in rows)
    takes = [[row for row in rows if row["video_id"] == video] for video in videos]
    groups = [some[at : at + _TAKES] for some in takes for at in range(0, len(some), _TAKES)]
    for number, group in enumerate(groups):
        part = "val" if number % 2 else "train"
        clip = {
            "clip_uid": f"clip_{number:03d}", "video_start_sec": group[0]["start_second"],
            "video_end_sec": group[-1]["end_second"],
        }  # fmt: skip
        queries = [
            {"query": row["caption"], "video_start_sec": row["start_second"], "video_end_sec": row["end_second"]}
            for row in group
        ]
        labels = [
            {
                "label": str(row["motion"]).replace(" ", "_"), "video_start_time": row["start_second"],
                "video_end_time": row["end_second"], "primary": True,
            }
            for row in group
        ]  # fmt: skip
        for stem, annotation in (("nlq", {"language_queries": queries}), ("moments", {"labels": labels})):
            video = {"video_uid": group[0]["video_id"], "split": part, "clips": [{**clip, "annotations": [annotation]}]}
            parts.setdefault((stem, part), []).append(video)
    for (stem, part), content in parts.items():
        path = folder / {"nlq": "ego4d_nlq", "moments": "ego4d_mq"}[stem] / f"{stem}_{part}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"version": "1", "videos": content}))
