"""Every reader of the project with a small valid input: what tests/fuzz.py damages, and how it is read.

``seed`` writes a folder that ``read`` accepts; the files below it are what gets damaged (``only`` narrows
them). ``mend`` makes checksums right again, so that the code behind them is reached as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import json
import pickle
import shutil
import sqlite3
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import open_clip
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import torch
import torchvision

from egohod import config
from egohod.data import detections
from egohod.data.chunking import ChunkSettings, Output, VideoReader, find_videos, write_chunks
from egohod.data.config import SourceConfig
from egohod.data.dataset import Tokenizer
from egohod.data.decoders import choose_decoder
from egohod.data.detections import BoxTable
from egohod.data.formats import read_clips
from egohod.data.formats.custom import rows_of_csv
from egohod.data.formats.ek100 import cached_matrix, csv_relevancy, read_relevancy, save_matrix
from egohod.data.formats.pairs import index_shards
from egohod.data.labels import ClassLabels, RelevantTexts, class_space
from egohod.data.storage import LocalCache, ShardIndex, one_clip, open_root
from egohod.data.table import ClipReader, choose_text
from egohod.demo import write as demo
from egohod.distributed import Distributed
from egohod.errors import UserError
from egohod.evaluation import features as feature_index
from egohod.evaluation.config import BenchmarkConfig
from egohod.evaluation.features import FeatureCache, search
from egohod.evaluation.report import contact_sheet, write_report
from egohod.evaluation.results import mean_table, write_results
from egohod.evaluation.runner import PROTOCOLS, benchmark, execution_of, read_benchmark
from egohod.evaluation.submission import CLASSES, LEVELS, check_submission
from egohod.hod import config as hod_config
from egohod.hod.check import claims
from egohod.hod.config import HodConfig, NarratorConfig
from egohod.hod.detectors.files import DetectionFiles
from egohod.hod.detectors.torchvision_boxes import TorchvisionBoxes
from egohod.hod.hands3d import SCHEMA as HANDS_SCHEMA
from egohod.hod.hands3d import Hands3d
from egohod.hod.narrators import Request
from egohod.hod.narrators.batch import BatchNarrator
from egohod.hod.narrators.llm import Endpoint, LanguageModelNarrator
from egohod.hod.pipeline import build
from egohod.hod.store import Shard
from egohod.hod.vocabulary import load_vocabulary
from egohod.loss.config import LossConfig
from egohod.model.checkpoints import load_weights
from egohod.model.config import GEOMETRIES, Geometry, ModelConfig, geometry
from egohod.model.dual_encoder import DualEncoder, create_model
from egohod.model.reranker import Reranker, RerankerShape, load_reranker
from egohod.serve.index import Marks, Moment
from egohod.training.checkpoint import CheckpointStore, classes_of, open_checkpoint, open_weights
from egohod.training.telemetry import _truncate
from tests.data.set_files import write_lerobot, write_shards
from tests.data.video_files import encode, picture
from tests.model.field_files import write_archive, write_avion, write_safetensors, write_upstream
from tools import ablate, convert_checkpoint, exchange
from tools.verify_dataset import Verifier
from tools.visualize_hod import collect

ROOT = Path(__file__).parents[1]
VIDEO = "v"
CLIPS = ((0.0, 1.0), (0.5, 1.6), (1.0, 2.5))
TEXTS = ("#C C cuts the onion", "the left hand picks up a pot", "['stirs soup', 'mixes']")


@dataclass(frozen=True)
class Target:
    """A reader; ``lines`` is how many lines its message may have (one a problem)."""

    name: str
    seed: Callable[[Path], object]
    read: Callable[[Path], object]
    only: str = "**/*"
    mend: Callable[[Path], object] = lambda folder: None
    lines: int = 1


def _files(**content: str) -> Callable[[Path], None]:
    """Writes text files; ``__`` in a name stands for its dot."""

    def seed(folder: Path) -> None:
        for name, text in content.items():
            (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")

    return seed


def _video(path: Path, **how: Any) -> Path:
    return encode(path, 30, size=(64, 48), **how)


# --------------------------------------------------------------------------------------------------
# Annotations of training
# --------------------------------------------------------------------------------------------------

_ROWS = [f'{VIDEO},{a},{b},"{text}",set{i},u{i}' for i, ((a, b), text) in enumerate(zip(CLIPS, TEXTS, strict=True))]
HOD = "\n".join(["video_id,start_second,end_second,text,dataset,uid", *_ROWS, ""])
EXCLUDED = f"video_id,start_second,end_second,row,reason\n{VIDEO},0.500,1.600,2,cut off\n"
EK100_HEAD = "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,narration,"
EK100 = EK100_HEAD + (
    "verb,verb_class,noun,noun_class,all_nouns,all_noun_classes\n"
    f"P01_0,P01,{VIDEO},00:00:00.5,00:00:00.00,00:00:01.10,wash cup,wash,2,cup,13,['cup'],[13]\n"
    f"P01_1,P01,{VIDEO},00:00:01.5,00:00:00.50,00:00:02.00,cut onion,cut,7,onion,16,\"['onion', 'pot']\",\"[16, 3]\"\n"
    f"P01_2,P01,{VIDEO},00:00:02.5,00:00:01.00,00:00:01.40,turn-on tap,turn-on,6,tap,0,['tap'],[0]\n"
)
SENTENCES = "narration_id,narration\nP01_0,wash cup\nP01_1,cut onion\nP01_2,turn-on tap\n"
ACTIONS = "id,verb,noun,action\n0,2,13,wash cup\n1,7,16,cut onion\n2,6,0,turn-on tap\n3,1,1,put plate\n"
EGTEA = "OP01-R01-Pizza-1000-2500-F000024-F000060 1 1 2\nOP01-R01-Pizza-3000-4000-F000072-F000096 2 2 1\n"
EGTEA_CLASSES = "Take bowl 1\nPut bread_container 2\n"
CHARADES = "id,subject,actions\nA1,S1,c001 0.00 2.50;c000 1.0 3.0\nB2,S2,\nC3,S1,c000 0.10 1.00\n"
CHARADES_CLASSES = "c000 Holding some clothes\nc001 Putting clothes somewhere\n"
EGOCLIP = "video_uid\tnarration_ind\tnarration_time\tclip_start\tclip_end\tclip_text\ttag_verb\ttag_noun\n"
EGOCLIP += "".join(f"{VIDEO}\t{i}\t{a}\t{a}\t{b}\t#C C cuts\t[1, 2]\t[3]\n" for i, (a, b) in enumerate(CLIPS))
NARRATIONS = {
    "videos": {
        VIDEO: {
            "narration_pass_1": {
                "narrations": [{"timestamp_sec": t, "narration_text": f"#C C stirs {t}"} for t in (0.5, 1.5, 1.9)],
                "summaries": [],
            },
            "status": "complete",
        }
    }
}


def _clips(name: str, **source: Any) -> Callable[[Path], None]:
    """Reads an annotation file as training does, and looks at every clip."""

    def read(folder: Path) -> None:
        settings = {key: str(folder / value) if key == "exclude" else value for key, value in source.items()}
        table = read_clips(SourceConfig(metadata=str(folder / name), **settings))
        rng, tokenizer = np.random.default_rng(0), _tokenizer()
        for i in range(len(table)):
            row = table.row(i)
            for mode in ("random", "concat", "first"):
                tokenizer([choose_text(row.texts, mode, rng)])
            table.where(i)
        table.datasets()
        table.group_codes(["video", "window", *table.column_names])

    return read


@functools.cache
def _tokenizer() -> Tokenizer:
    return Tokenizer()


def _seed_narrations(folder: Path) -> None:
    (folder / "narration.json").write_text(json.dumps(NARRATIONS))


def _seed_pickle(folder: Path) -> None:
    entries = [(VIDEO, a, b, text) for (a, b), text in zip(CLIPS, TEXTS, strict=True)]
    entries.append((VIDEO, np.float64(2.0), np.float32(3.5), ["opens", "closes"]))
    (folder / "train.pkl").write_bytes(pickle.dumps(entries))


def _seed_packed(folder: Path) -> None:
    """The same table as other programs keep it."""
    (folder / "hod.csv.gz").write_bytes(gzip.compress(HOD.encode(), mtime=0))
    (folder / "narration.json.gz").write_bytes(gzip.compress(json.dumps(NARRATIONS).encode(), mtime=0))
    (folder / "wide.csv").write_text(HOD.replace(",", ";"), encoding="utf-16")
    columns = {name: [f"{i}" for i in range(3)] for name in ("video_id", "text", "uid")}
    times = {"start_second": [0.0, 1.0, 2.0], "end_second": [1, 2, 3], "words": [["a"], [], ["b", "c"]]}
    pa.parquet.write_table(pa.table(columns | times), folder / "hod.parquet")


def _read_packed(folder: Path) -> None:
    for name in ("hod.csv.gz", "narration.json.gz", "wide.csv", "hod.parquet"):
        _clips(name)(folder)


def _index_shards(folder: Path) -> None:
    """As tools/prepare_data.py does, and then training."""
    index_shards(str(folder), folder)
    _clips("shards.parquet")(folder)
    open_root(folder / "shards.parquet")


def _seed_index_of_shards(folder: Path) -> None:
    index_shards(str(write_shards(folder)), folder)


def _train_labels(folder: Path) -> None:
    table = read_clips(SourceConfig(metadata=str(folder / "train.csv"), format="ek100"))
    space = class_space(
        [table], ["verb_class", "noun_class"], [str(folder / "actions.csv"), str(folder / "validation.csv")], warn=True
    )
    space.heads("parts")
    ClassLabels(table, space, "parts").draw(0, np.random.default_rng(0))
    texts = RelevantTexts(table, 0.1, str(folder / "sentences.csv"))
    texts.warn_of_sides(0.5)
    texts.draw(0, np.random.default_rng(0))


# --------------------------------------------------------------------------------------------------
# Benchmarks
# --------------------------------------------------------------------------------------------------

OWN = HOD.replace(",uid\n", ",uid,action\n").replace(",u0\n", ",u0,cut onion\n").replace(",u1\n", ",u1,take pot\n")
OWN = OWN.replace(",u2\n", ",u2,stir soup\n")
OWN_CLASSES = (
    "action,text,verb,noun\ncut onion,cuts an onion,cut,onion\ntake pot,takes it,take,pot\nstir soup,it,stir,soup\n"
)
RELEVANCY = "uid,text,relevancy\nu0,#C C cuts the onion,1\nu1,the left hand picks up a pot,1.0\nu2,stirs soup,0.5\n"
QUESTIONS = (
    '{"kind": "object", "query": {"clip": "u0"}, "choices": [{"text": "a"}, {"text": "b"}], "answer": 1}\n'
    '{"kind": "across_clips", "query": {"text": "stirs"}, "choices": [{"clip": "u1"}, {"clip": "u2"}], "answer": 0}\n'
)


def _seed_egomcq(folder: Path) -> None:
    choice = {"video_uid": VIDEO, "clip_start": 0.5, "clip_end": 1.75, "clip_text": "#C C cuts"}
    entry = {"query": choice, "choices": {str(i): choice | {"clip_start": i / 4} for i in range(5)}, "answer": 2}
    (folder / "egomcq.json").write_text(json.dumps({"0": entry | {"types": 1}, "1": entry | {"types": 2}}))


def _benchmark(kind: str, name: str = "") -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        settings = BenchmarkConfig(kind=kind, metadata=str(folder / name), root=str(folder))
        for protocol in ("clean", "upstream"):
            for task in read_benchmark(kind, settings, PROTOCOLS[protocol].prompts)[1].tasks:
                if task.texts:  # clips that ask for clips have none
                    _tokenizer()(list(task.texts))

    return read


_OPTIONS = {"options": ["cuts", "stirs"], "choices": ["cuts", "stirs"], "correct_idx": 1, "question": "What?"}
_PROMPT = [{"value": "<video>\nWhat?\n(A) cuts\n(B) stirs\nAnswer."}, {"value": "B"}]
_STRETCH = {"video_uid": VIDEO, "start_sec": 0.5, "end_sec": 1.5}
_CLIP = {"clip_uid": "c", "video_start_sec": 0.0, "video_end_sec": 9.0}
_NLQ = {"query": "what", "video_start_sec": 1.0, "video_end_sec": 3.0}
_MOMENT = {"label": "cut_/_stir", "video_start_time": 1.0, "video_end_time": 3.0, "primary": True}


def _moments(key: str, *labels: Any) -> dict[str, Any]:
    return {"videos": [{"video_uid": VIDEO, "clips": [_CLIP | {"annotations": [{key: list(labels)}]}]}]}


# Files by benchmark: JSON, or text.
_QUESTIONS: dict[str, dict[str, Any]] = {
    "handyvqa": {"action/q.json": _OPTIONS | {"video": VIDEO, "correct_idx": [1]}},
    "egohoibench": {
        "e.csv": "video_uid\tclip_start\tclip_end\tclip_text\tverb_neg\tnoun_neg\nv\t0\t1\tcuts\tstirs,eats\thits\n"
    },
    "chirality": {"cia-x.csv": "id,chiral_triplet_id,chiral_label,template\n1,a,0,opens\n2,a,1,closes\n3,a,1,closes\n"},
    "egoexolearn_mcq": {"m.jsonl": json.dumps({"image": {"video": "v.mp4"}, "conversations": _PROMPT}) + "\n"},
    "egoexolearn_association": {
        "association_x.json": {
            "0": {"query": _STRETCH, "choices": {"0": _STRETCH, "1": _STRETCH}, "answer": 0, "types": 1}
        }
    },
    "hd_epic_vqa": {
        "a.json": {
            "q": _OPTIONS | {"inputs": {"video 1": {"id": VIDEO, "start_time": "00:00:01.5", "end_time": "2.5"}}}
        }
    },
    "egotempo": {
        "egotempo_openQA.json": {
            "annotations": [{"clip_id": f"{VIDEO}_1.5_2.5", "question_type": "a b", "answer": text} for text in "xy"]
        }
    },
    "ego4d_nlq": {f"nlq_{part}.json": _moments("language_queries", _NLQ, _NLQ) for part in ("train", "val")},
    "ego4d_mq": {f"moments_{part}.json": _moments("labels", _MOMENT, _MOMENT) for part in ("train", "val")},
}


def _seed_questions(kind: str) -> Callable[[Path], None]:
    def seed(folder: Path) -> None:
        for name, content in _QUESTIONS[kind].items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))

    return seed


def _seed_relevancy(folder: Path) -> None:
    matrix = np.linspace(0, 1, 12).reshape(3, 4)
    (folder / "relevancy.pkl").write_bytes(pickle.dumps(matrix))
    (folder / "old.pkl").write_bytes(pickle.dumps(matrix, protocol=2))
    np.save(folder / "relevancy.npy", matrix)
    _files(test__csv=EK100, sentence__csv=SENTENCES)(folder)
    csv_files = folder / "test.csv", folder / "sentence.csv"
    cached_matrix(folder / "cache", csv_files, lambda: csv_relevancy(*csv_files))


def _read_relevancy(folder: Path) -> None:
    for name in ("relevancy.pkl", "old.pkl", "relevancy.npy"):
        read_relevancy(folder / name)
    csv_files = folder / "test.csv", folder / "sentence.csv"
    save_matrix(cached_matrix(folder / "cache", csv_files, lambda: csv_relevancy(*csv_files)), folder / "again.npy")


def _seed_submission(folder: Path) -> None:
    clip = {part: {str(c): 0.5 for c in range(count)} for part, count in CLASSES.items()}
    levels = dict.fromkeys(LEVELS, 2)
    recognition = {"version": "0.2", "challenge": "action_recognition", "results": {"P01_1": clip}} | levels
    ids = {"vis_ids": pd.Index(["P01_1"], dtype=object), "txt_ids": np.array(["P01_1"], dtype=object)}
    retrieval = {"version": 0.1, "challenge": "multi_instance_retrieval", "sim_mat": np.eye(1)} | ids | levels
    (folder / "test.json").write_text(json.dumps(recognition))
    for protocol in (3, 4):
        with zipfile.ZipFile(folder / f"{protocol}.zip", "w") as archive:
            archive.writestr("test.pkl", pickle.dumps(retrieval, protocol=protocol))
        (folder / f"{protocol}.pkl").write_bytes(pickle.dumps(retrieval, protocol=protocol))


def _read_submission(folder: Path) -> None:
    for name in ("test.json", "3.zip", "4.zip", "3.pkl", "4.pkl"):
        check_submission(folder / name, ["P01_1"], ["P01_1"])


# --------------------------------------------------------------------------------------------------
# Configuration
# --------------------------------------------------------------------------------------------------

BASE = """model: {name: DEMO, num_frames: 4}
data:
  train:
    mine: {metadata: clips.csv, root: "${oc.env:HOME}/videos", columns: {text: sentence}, weight: 1.0}
  workers: 0
  hard_negatives: {share: 0.5, group_by: [video, noun], group_size: 2}
"""
TRAIN = """_base_: base.yml
train:
  output: runs/2024_01_01
  duration: 12 steps
  lr: 1e-3
  betas: [0.9, 0.98]
  lr_end: ${train.lr_start}
  warmup: 3 steps
  clip_norm: null
evaluate:
  every: 4 steps
  benchmarks: {mine: {kind: own, metadata: test.csv, root: videos, protocol: clean}}
  final: [mine]
"""
HOD_YAML = """output: out/hod.csv
source: {metadata: narrations.csv, root: videos, list_text: first}
detector: {kind: oracle, options: {path: detections.parquet, jitter: 0.1}}
narrator: {kind: llm, endpoint: "http://127.0.0.1:8000/v1", temperature: 0.5}
check: {min_words: 2}
keep: [noun]
frames: 8
"""
STUDY = """base: base.yml
output: runs/study
world: {folder: demo, scale: 0.5, variant: {objects: 4}}
seeds: [0]
overrides: [train.duration=10 steps]
rows:
  plain: {title: plain, overrides: [model.num_frames=4], start: false}
metrics: {object: objects}
chance: {object: 50.0}
"""
OPEN_CLIP_CONFIG = json.dumps(
    {
        "model_cfg": {
            "embed_dim": 32,
            "quick_gelu": True,
            "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "norm_kwargs": {"eps": 1e-6}},
            "text_cfg": {"width": 32, "heads": 2, "layers": 2, "tokenizer_kwargs": {"clean": "canonicalize"}},
        },
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    },
    indent=1,
)
OVERRIDES = "train.lr=1e-4\ntrain.output=2024_01_01\ntrain.betas=[0.9,0.95]\ndata.train.a.columns={text: b}\n" + (
    "evaluate.batch_size=4\nmodel.fast.pool=mean\ntrain.clip_norm=null\ndata.train.a.metadata=a=b.csv\ndata.train.a.weight=2\n"
)


def _overrides(folder: Path) -> None:
    # Any bytes but NUL can stand on a command line, where Python makes surrogates of what is not UTF-8.
    lines = (folder / "overrides.txt").read_bytes().replace(b"\0", b"").decode("utf-8", "surrogateescape").split("\n")
    config.load(folder / "base.yml", lines[:-1][:50])


# --------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------

SMALL = Geometry("FUZZ", 16, 8, 16, 1, 2, 16, 1, 2, 8, context_length=8, vocab_size=32)
ALONE = Distributed(0, 1, torch.device("cpu"), None)


def _model() -> DualEncoder:
    GEOMETRIES[SMALL.name] = SMALL
    torch.manual_seed(0)
    return create_model(ModelConfig(name=SMALL.name, num_frames=2), LossConfig())


@functools.cache
def _fitted() -> DualEncoder:
    return _model()


def _openai_state() -> dict[str, torch.Tensor]:
    """Of the small model, under OpenAI's names, with OpenAI's three numbers."""
    vision = {"image_size": SMALL.image_size, "patch_size": SMALL.patch_size, "width": SMALL.vision_width}
    text = {"vocab_size": SMALL.vocab_size, "context_length": SMALL.context_length, "width": SMALL.text_width}
    model = open_clip.CLIP(SMALL.embed_dim, vision | {"layers": 1, "head_width": 8}, text | {"layers": 1, "heads": 2})
    numbers = {"input_resolution": SMALL.image_size, "context_length": 8, "vocab_size": 32}
    return model.half().state_dict() | {name: torch.tensor(value) for name, value in numbers.items()}


def _weights(name: str, adapt: bool = True) -> Callable[[Path], None]:
    """Opens weights, describes them and puts them into a model."""

    def read(folder: Path) -> None:
        weights = open_weights(folder / name)
        convert_checkpoint.inspect(weights)
        load_weights(_fitted(), weights, adapt=adapt, projections="keep")

    return read


def _seed_run(folder: Path) -> None:
    model = _model()
    model.add_heads({"verb": 2, "noun": 2})
    optimizer = torch.optim.AdamW(model.parameters())
    identity = {
        "model.name": SMALL.name,
        "model.fast": {"position": "before", "pool": "cls", "spatial": False, "slow_frames": 4},
        **{"heads": "parts", "data.labels.columns": ["verb", "noun"], "classes": [["0", "1"], ["1", "0"]]},
        "names of the classes": ["a b", "c d"],
    }
    (folder / "run").mkdir()
    store = CheckpointStore(folder / "run", keep_last=2)
    training = {"optimizer": optimizer.state_dict(), "step": 1, "scaler": {"scale": 1.0}, "note": "x"}
    store.save(1, model.state_dict(), training, metrics={"val/top1": 0.5}, identity=identity)


def _read_run(folder: Path) -> None:
    run = folder / "run"
    checkpoint = open_checkpoint(run)
    weights = open_weights(run)
    convert_checkpoint.inspect(weights)
    load_weights(_fitted(), weights.without_heads(), projections="keep")
    classes_of(run)[1].heads("parts")
    store = CheckpointStore(run, keep_last=1, best="val/top1")
    store.rate(checkpoint.step, {"val/top1": 0.7})


def _right_checksums(folder: Path) -> None:
    """In the manifests of a run folder, where they can still be read."""
    for path in folder.glob("run/checkpoints/*/manifest.json"):
        try:
            manifest = json.loads(path.read_text())
            for name in manifest["sha256"]:
                manifest["sha256"][name] = hashlib.sha256((path.parent / name).read_bytes()).hexdigest()
            path.write_text(json.dumps(manifest))
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            continue


def _seed_shards(folder: Path) -> None:
    state, shards = _model().state_dict(), ("model-1-of-2.safetensors", "model-2-of-2.safetensors")
    places = {name: shards[number % 2] for number, name in enumerate(state)}
    for shard in shards:
        write_safetensors(folder / shard, {name: state[name] for name in state if places[name] == shard})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


class _Boxes(torch.nn.Module):
    """Stands for a whole detector, which would be too large to be damaged ten thousand times."""

    def __init__(self, num_classes: int, **_: object) -> None:
        super().__init__()
        predictor = torch.nn.ModuleDict({"cls_score": torch.nn.Linear(4, num_classes)})
        self.roi_heads = torch.nn.ModuleDict({"box_predictor": predictor})


def _seed_detector(folder: Path) -> None:
    torch.save({"model": _Boxes(3).state_dict()}, folder / "boxes.pth")


def _read_detector(folder: Path) -> None:
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    setattr(torchvision.models.detection, name, lambda weights, weights_backbone, **options: _Boxes(**options))
    TorchvisionBoxes(str(folder / "boxes.pth"), {1: "hand", 2: "cup"}, name)


# --------------------------------------------------------------------------------------------------
# Videos
# --------------------------------------------------------------------------------------------------


def _seed_videos(folder: Path) -> None:
    """The same pictures in every container, with and without B-frames, sound and a table of contents at the start."""
    _video(folder / "plain.mp4")
    _video(folder / "early.mp4", faststart=True, x264="keyint=8:bframes=0", sound=0.5)
    for ending in ("mkv", "ts", "avi", "mov", "flv", "wmv", "mpg"):
        with av.open(str(folder / f"plain.{ending}"), "w") as target:
            codec = {"avi": "mpeg4", "mpg": "mpeg2video"}.get(ending, "libx264")
            rate = 25 if ending == "mpg" else 10  # the only one of the two that MPEG-2 has
            stream = target.add_stream(codec, rate=rate, options={"threads": "1"})
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for i in range(30):
                target.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i, 64, 48), format="rgb24")))
            target.mux(stream.encode(None))


def _videos(decoder: str) -> Callable[[Path], None]:
    """Opens the one file that is left of the seed, and reads the frames of a clip."""

    def read(folder: Path) -> None:
        opener = choose_decoder(decoder)[1]
        for path in folder.iterdir():
            video = opener(path)
            try:
                frames = video.read_at(np.linspace(0, 2.5, 4))
                assert frames.dtype == np.uint8
                assert frames.ndim == 4
            finally:
                video.close()

    return read


def _chunk(folder: Path) -> None:
    for path in list(folder.iterdir()):
        with VideoReader(path) as source:
            source.probe()
        (folder / "out").mkdir(exist_ok=True)
        write_chunks(path, folder / "out", ChunkSettings(seconds=1.0, short_side=32))


def _seed_chunks(folder: Path) -> None:
    (folder / "videos").mkdir()
    for name in ("a.mp4", "b.mp4"):
        (folder / "videos" / name).write_bytes(b"x")
    (folder / "names.txt").write_text("a.mp4\nb.mp4\n")
    own = folder / "out" / ".chunk_videos"
    own.mkdir(parents=True)
    (folder / "out" / "a").mkdir()
    (own / "settings.json").write_text(json.dumps(dataclasses.asdict(ChunkSettings())))
    (own / "done.jsonl").write_text(json.dumps({"video_id": "a", "source_bytes": 1, "chunks": 3}) + "\n")


def _read_chunks(folder: Path) -> None:
    output = Output(folder / "out", ChunkSettings(), folder / "videos")
    for video in find_videos(folder / "videos", names=folder / "names.txt"):
        output.is_done(video)


def _seed_shards_of_chunks(folder: Path) -> None:
    (folder / "shard-00000.tar").write_bytes(bytes(range(256)) * 8)
    places = [("a/0000.mp4", 512, 300), ("a/0001.mp4", 1024, 200), ("b c/0000.mp4", 1536, 512)]
    ShardIndex.write(folder, [(name, "shard-00000.tar", offset, size) for name, offset, size in places])


def _read_shards_of_chunks(folder: Path) -> None:
    root = open_root(folder / "shards.parquet")
    root.names("a")
    for name in (*root.names("")[:3], "a/0000.mp4", "b c/0000.mp4"):
        with contextlib.suppress(FileNotFoundError), one_clip(root.name_of(name)):
            root.open(name).read(1 << 20)  # type: ignore[union-attr]


def _seed_cache(folder: Path) -> None:
    LocalCache(folder, 1.0).put("v.mp4", b"content")


def _read_cache(folder: Path) -> None:
    LocalCache(folder, 1.0).get("v.mp4")


def _seed_verify(folder: Path) -> None:
    _files(hod__csv=HOD)(folder)
    verifier = _verifier(folder)
    # As a run leaves them that was ended before the last block.
    (folder / "mine_progress.jsonl").write_text(
        json.dumps(verifier._identity) + "\n" + json.dumps([0, [[1, "cut off"]]])
    )


def _read_verify(folder: Path) -> None:
    _verifier(folder).run(0)


def _verifier(folder: Path) -> Verifier:
    source = SourceConfig(metadata=str(folder / "hod.csv"), root=str(folder))
    table = read_clips(source)
    return Verifier("mine", ClipReader(table, source, choose_decoder("pyav")[1], None), folder)


# --------------------------------------------------------------------------------------------------
# Hands and objects
# --------------------------------------------------------------------------------------------------


def _boxes() -> pa.Table:
    moments = [(frame, (frame + 0.5) / 10) for frame in range(30)]
    box = {"left": 0.1, "top": 0.2, "right": 0.4, "bottom": 0.6, "offset_x": 0.1, "offset_y": 0.05}
    hand = {"kind": "hand", "side": 0, "state": 3, "score": 0.9, "name": None, **box}
    thing = hand | {"kind": "object", "side": -1, "state": -1, "offset_x": None, "offset_y": None, "name": "cup"}
    where = [{"video_id": VIDEO, "frame_number": frame, "second": second} for frame, second in moments]
    return pa.Table.from_pylist([at | what for at in where for what in (hand, thing)], detections.SCHEMA)


def _seed_parquet(folder: Path) -> None:
    detections.write(_boxes().slice(0, 6), folder / "boxes.parquet")


def _read_parquet(folder: Path) -> None:
    BoxTable.read(folder / "boxes.parquet").at(VIDEO, np.array([0.05, 0.1, 9.0]))
    BoxTable.read(folder)
    _detect(folder / "boxes.parquet")


def _seed_epic(folder: Path) -> None:
    detections.write_epic(_boxes().slice(0, 6), folder)


def _read_epic(folder: Path) -> None:
    BoxTable(detections.read_epic(folder / f"{VIDEO}.pkl", 10.0).to_pandas())


def _detect(path: Path) -> None:
    seconds = np.array([0.05, 0.15])
    detections = DetectionFiles(str(path), fps=10.0)
    for video in detections.videos():
        detections.detect(video, np.array([0, 1]), seconds)


def _seed_annotated(folder: Path) -> None:
    _video(folder / f"{VIDEO}.mp4")
    detections.write(_boxes().slice(0, 6), folder / "boxes.parquet")
    for program in ("cvat", "labelstudio"):
        exchange.main([program, str(folder / "boxes.parquet"), "--videos", str(folder), "--output", str(folder)])


def _read_annotated(program: str, name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        arguments = [str(folder / name), "--videos", str(folder), "--output", str(folder / "corrected.parquet")]
        exchange.main([program, *arguments])

    return read


def _hod() -> HodConfig:
    """With relative paths: results are stored under a hash of their inputs, which has the path of the detections."""
    cfg = HodConfig(output="out/hod.csv", frames=4, block=2, workers=0, decoder="pyav")
    cfg.source.metadata, cfg.source.root = "in/hod.csv", "in"
    cfg.detector.kind, cfg.detector.options, cfg.tracks.camera = "detections", {"path": "in/boxes.parquet"}, "none"
    return cfg


def _seed_hod(folder: Path) -> None:
    (folder / "in").mkdir()
    _video(folder / "in" / f"{VIDEO}.mp4")
    rows = HOD.replace("['stirs soup', 'mixes']", "stirs soup") + "gone,0,1,opens the box,,u9\n"
    _files(hod__csv=rows)(folder / "in")
    detections.write(_boxes(), folder / "in" / "boxes.parquet")
    _run_hod()


def _run_hod() -> None:
    """As tools/generate_hod.py does: stored results are read, the others computed."""
    pipeline = build(_hod())
    with pipeline.store.claim(Shard()):
        if pipeline.finished(Shard()) is None:
            pipeline.run_all(Shard())
            pipeline.finish(Shard())
        pipeline.store.divisions(pipeline.fingerprint)
        pipeline.merge(1)
    list(collect(pipeline, range(len(pipeline.table))))


def _read_hod(folder: Path) -> None:
    _run_hod()
    # Without the mark that the shard is finished everything is made of the results of the stages.
    database = sqlite3.connect(folder / "out" / "hod.csv.work" / "results" / "0-of-1.sqlite", isolation_level=None)
    with contextlib.closing(database), contextlib.suppress(sqlite3.Error):
        database.execute("DELETE FROM finished")
    _run_hod()


def _read_hod_boxes(folder: Path) -> None:
    shutil.rmtree(folder / "out")
    _run_hod()


ANSWER = {
    "choices": [
        {"message": {"content": json.dumps({"captions": [{"clip": 1, "caption": "The hand cuts an onion."}]})}}
    ],
    "usage": {"prompt_tokens": 30, "completion_tokens": 12},
}


def _seed_answer(folder: Path) -> None:
    (folder / "answer.json").write_text(json.dumps(ANSWER))


def _read_answer(folder: Path) -> None:
    """A server's answer is no file, but may be as damaged: it must cost its request, never the run."""
    narrator = _narrator()
    try:
        answer = narrator._endpoint._read((folder / "answer.json").read_bytes())
    except ValueError as error:
        if not str(error).startswith(("not an answer of a chat endpoint", "an answer without text")):
            raise
        raise UserError(str(error)) from error  # which is retried
    for each in narrator._format.narrations(answer, 2):
        (each.text or "").encode()


@functools.cache
def _narrator() -> LanguageModelNarrator:
    settings = NarratorConfig(kind="llm")
    return LanguageModelNarrator(settings, ROOT / "configs/hod/prompts/llm.jinja", Endpoint(settings))


def _seed_batch(folder: Path) -> None:
    lines = [{"custom_id": f"{'0' * 12}-1-{at}x2", "response": {"status_code": 200, "body": ANSWER}} for at in (0, 2)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(each | {"error": None}) + "\n" for each in lines))


def _read_batch(folder: Path) -> None:
    settings = NarratorConfig(kind="llm")
    batch = BatchNarrator(settings, [folder / "answers.jsonl"], "0" * 12, range(4), 4)
    for _, each in batch.narrate([Request("#C C cuts", None, index) for index in range(4)]):
        (each.text or "").encode()


def _seed_vocabulary(folder: Path) -> None:
    (folder / "my.yml").write_text(
        "version: 1\nreplace: [talk]\nverbs: |\n  chop dice\nlemmas: {diced: dice}\ntalk: ['as an ai']\n"
        "pieces: {fast: '(?:very )?quick(?:ly)?'}\nclaims:\n  - {what: back and forth, pattern: '{fast} to and fro'}\n"
    )


def _read_vocabulary(folder: Path) -> None:
    vocabulary = load_vocabulary(str(folder / "my.yml"), fresh=True)
    claims("the right hand moves it very quickly to and fro" * 20, vocabulary)


def _seed_hands3d(folder: Path) -> None:
    palm = np.linspace(0, 0.18, 63).reshape(21, 3) + np.array([0, 0, 0.5])
    rows = [
        {"video_id": VIDEO, "second": t / 10, "side": t % 2, "joints": palm.ravel(), "focal": 0.8} for t in range(6)
    ]
    pa.parquet.write_table(pa.Table.from_pylist(rows, HANDS_SCHEMA), folder / "hands.parquet")


def _read_hands3d(folder: Path) -> None:
    Hands3d(folder / "hands.parquet").at(VIDEO, np.array([0.0, 0.1, 9.0]))


def _seed_prompt(folder: Path) -> None:
    shutil.copy(ROOT / "configs/hod/prompts/llm.jinja", folder / "prompt.jinja")


def _read_prompt(folder: Path) -> None:
    settings = NarratorConfig(kind="llm")
    LanguageModelNarrator(settings, folder / "prompt.jinja", Endpoint(settings))


# --------------------------------------------------------------------------------------------------
# What the project writes and reads again
# --------------------------------------------------------------------------------------------------


INDEX = {"format": feature_index.INDEX_FORMAT, "weights": "w", "protocol": {"name": "clean"}, "root": "videos"}
INDEX |= {"layout": "whole", "chunk_seconds": 15.0}


def _seed_index(folder: Path) -> None:
    feature_index.open_index(folder, INDEX | {"videos": {"a": "a.npz", "b": "b.npz"}})
    features = np.eye(4, dtype=np.float32)[:2]
    for video in ("a", "b"):
        feature_index.write_video(folder, video, features, [0, 1], [1, np.inf], ["cuts", ""], "id")


def _read_index(folder: Path) -> None:
    index = feature_index.read_index(folder)
    for video in index["videos"]:
        feature_index.is_written(folder, video, "id")
    features, _ = feature_index.read_features(folder)
    contact_sheet(search(np.ones(4, np.float32) / 2, features, 3), index, "pyav")
    feature_index.open_index(folder, INDEX | {"videos": {"c": "c.npz"}})


def _seed_marks(folder: Path) -> None:
    for number, label in enumerate(("cuts", "peels, twice")):
        Marks(folder / "marks.json").set(Moment("v/w", number, number + 2 if number else None), label, "right")


def _read_marks(folder: Path) -> None:
    marks = Marks(folder / "marks.json")
    for kind in ("narrations", "labels"):
        marks.to_csv(kind, lambda video: 9.0).encode()


def _seed_features(folder: Path) -> None:
    cache = FeatureCache(folder, {"weights": "w"})
    for key in ("a", "b"):
        cache.add(key, np.ones(4, np.float32))
        cache.flush()


def _read_features(folder: Path) -> None:
    FeatureCache(folder, {"weights": "w"}).read(["a", "b", "c"])


class _Seeded(torch.nn.Module):
    """Features that follow from the sizes alone."""

    def encode_video(self, video: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        return torch.nn.functional.normalize(video.flatten(1)[:, :16].float() + 0.1, dim=-1)

    def encode_text(self, tokens: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        return torch.nn.functional.normalize(tokens[:, :16].float() + 0.1, dim=-1)


def _seed_results(folder: Path) -> None:
    _video(folder / f"{VIDEO}.mp4")
    _files(own__csv=OWN, classes__csv=OWN_CLASSES, questions__jsonl=QUESTIONS)(folder)
    cfg = config.Config()
    cfg.model.name, cfg.model.num_frames, cfg.data.decoder, cfg.data.workers = "DEMO", 2, "pyav", 0
    cfg.evaluate.cache, cfg.evaluate.num_frames = None, 2
    settings = BenchmarkConfig(kind="custom", metadata=str(folder / "own.csv"), root=str(folder))
    bench = benchmark(cfg, "mine", settings, execution_of(cfg, ALONE), controls=["reverse"])
    checkpoint = {"path": "run", "sha256": "0f" * 32}
    write_results(
        folder / "results",
        cfg,
        ALONE,
        [(bench, bench.measure(_Seeded()))],
        checkpoint=checkpoint,
        published="EgoVideo-L",
    )
    for path in folder.glob("*.*"):
        path.unlink()


def _read_results(folder: Path) -> None:
    write_report(folder / "results", decoder="pyav")
    mean_table([folder / "results", folder / "results"])


def _seed_metrics(folder: Path) -> None:
    lines = [{"step": step, "train/loss": 1.5, "train/lr": 1e-3} for step in (1, 2, 3)]
    lines.append({"step": 3, "val/top1": 40.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _read_metrics(folder: Path) -> None:
    _truncate(folder / "metrics.jsonl", 2, evaluates_first=True)


def _seed_world(folder: Path) -> None:
    world = demo._read_world(folder, 0, 0.01, demo.DEFAULT, replace=False)
    world |= {"done": {"train": True, "val": True, "test": True}}
    (folder / "world.json").write_text(json.dumps(world))


TARGETS: dict[str, Target] = {
    each.name: each
    for each in (
        Target("clips_hod", _files(hod__csv=HOD), _clips("hod.csv")),
        Target("clips_hod_tsv", _files(hod__tsv=HOD.replace(",", "\t")), _clips("hod.tsv")),
        Target("clips_packed", _seed_packed, _read_packed),
        Target(
            "clips_exclude",
            _files(hod__csv=HOD, bad__csv=EXCLUDED),
            _clips("hod.csv", exclude="bad.csv"),
            only="bad.csv",
        ),
        Target("clips_egoclip", _files(egoclip__csv=EGOCLIP), _clips("egoclip.csv")),
        Target("clips_ego4d", _seed_narrations, _clips("narration.json")),
        Target("clips_pickle", _seed_pickle, _clips("train.pkl")),
        Target("clips_lerobot", lambda folder: write_lerobot(folder / "set"), _clips("set"), only="set/meta/**/*"),
        Target("clips_lerobot_2", lambda folder: write_lerobot(folder / "set", "v2.1"), _clips("set"), "set/meta/**/*"),
        Target(
            "clips_steps", lambda folder: write_lerobot(folder / "set"), _clips("set", subtasks=True), "**/*.parquet"
        ),
        Target("clips_shards", _seed_index_of_shards, _clips("shards.parquet"), only="shards.parquet"),
        Target("index_of_tars", lambda folder: write_shards(folder), _index_shards, only="**/*.tar"),
        Target("clips_ek100", _files(EPIC_100_train__csv=EK100), _clips("EPIC_100_train.csv")),
        Target(
            "clips_egtea", _files(train_split1__txt=EGTEA, action_idx__txt=EGTEA_CLASSES), _clips("train_split1.txt")
        ),
        Target(
            "clips_charades",
            _files(train__csv=CHARADES, Charades_v1_classes__txt=CHARADES_CLASSES),
            _clips("train.csv"),
        ),
        Target("clips_labels", _files(l__csv="video,start,end,label\nv,0,1,cut\nv,1,2.5,stir\n"), _clips("l.csv")),
        Target(
            "train_labels",
            _files(train__csv=EK100, validation__csv=EK100, actions__csv=ACTIONS, sentences__csv=SENTENCES),
            _train_labels,
        ),
        Target("rows_of_csv", _files(c__csv=HOD), lambda folder: rows_of_csv(folder / "c.csv").rows_of_videos()),
        Target(
            "benchmark_own",
            _files(own__csv=OWN, classes__csv=OWN_CLASSES, relevancy__csv=RELEVANCY, questions__jsonl=QUESTIONS),
            _benchmark("custom", "own.csv"),
        ),
        Target(
            "benchmark_labels",
            _files(l__csv="video,start,end,label\nv,0,1,cut\nv,1,2,a\n"),
            _benchmark("labels", "l.csv"),
        ),
        Target(
            "benchmark_ek100_mir",
            _files(EPIC_100_retrieval_test__csv=EK100, EPIC_100_retrieval_test_sentence__csv=SENTENCES),
            _benchmark("ek100_mir"),
        ),
        Target(
            "benchmark_ek100_cls",
            _files(EPIC_100_validation__csv=EK100, EPIC_100_train__csv=EK100, actions__csv=ACTIONS),
            _benchmark("ek100_cls"),
        ),
        Target(
            "benchmark_egtea",
            _files(test_split1__txt=EGTEA, test_split2__txt=EGTEA, action_idx__txt=EGTEA_CLASSES),
            _benchmark("egtea"),
        ),
        Target("benchmark_egomcq", _seed_egomcq, _benchmark("egomcq")),
        Target(
            "benchmark_charades_ego",
            _files(CharadesEgo_v1_test_only1st__csv=CHARADES, Charades_v1_classes__txt=CHARADES_CLASSES),
            _benchmark("charades_ego"),
        ),
        *(Target(f"benchmark_{kind}", _seed_questions(kind), _benchmark(kind)) for kind in _QUESTIONS),
        Target("relevancy", _seed_relevancy, _read_relevancy),
        Target("submission", _seed_submission, _read_submission),
        Target(
            "config_train",
            _files(base__yml=BASE, run__yml=TRAIN),
            lambda folder: config.load(folder / "run.yml"),
            lines=60,
        ),
        Target("config_hod", _files(hod__yml=HOD_YAML), lambda folder: hod_config.load(folder / "hod.yml"), lines=60),
        Target(
            "config_overrides",
            _files(base__yml=BASE, overrides__txt=OVERRIDES),
            _overrides,
            only="overrides.txt",
            lines=60,
        ),
        Target(
            "config_study",
            _files(base__yml=BASE, study__yml=STUDY),
            lambda folder: ablate.plan(ablate.read_study(folder / "study.yml"), folder / "study.yml", tune=False),
            only="study.yml",
            lines=60,
        ),
        Target(
            "open_clip_config",
            _files(open_clip_config__json=OPEN_CLIP_CONFIG),
            lambda folder: geometry(f"open_clip/{folder}"),
        ),
        Target("weights_run", _seed_run, _read_run, mend=_right_checksums),
        Target("weights_zip", lambda at: write_upstream(at / "w.pt", _model().state_dict()), _weights("w.pt")),
        Target(
            "weights_old_format",
            lambda at: write_upstream(at / "w.pt", _model().state_dict(), zipped=False),
            _weights("w.pt"),
        ),
        Target("weights_avion", lambda at: write_avion(at / "w.pth.tar", _model().state_dict()), _weights("w.pth.tar")),
        Target("weights_torchscript", lambda at: write_archive(at / "w.pt", _openai_state()), _weights("w.pt")),
        Target(
            "weights_safetensors",
            lambda at: write_safetensors(
                at / "w.safetensors", _model().state_dict(), settings='{"model.activation": "gelu"}'
            ),
            _weights("w.safetensors"),
        ),
        Target(
            "weights_reranker",
            lambda at: Reranker(RerankerShape(8, 8, 2, 2, width=8)).save(at / "r.safetensors"),
            lambda at: load_reranker(at / "r.safetensors"),
        ),
        Target("weights_shards", _seed_shards, _weights("")),
        Target("weights_detector", _seed_detector, _read_detector),
        *(Target(f"video_{name}", _seed_videos, _videos(name)) for name in ("pyav", "torchcodec", "decord")),
        Target("video_chunker", _seed_videos, _chunk),
        Target("chunk_folder", _seed_chunks, _read_chunks, only="**/*.*"),
        Target("chunk_shards", _seed_shards_of_chunks, _read_shards_of_chunks),
        Target("cache_of_files", _seed_cache, _read_cache),
        Target("verify_notes", _seed_verify, _read_verify, only="mine_progress.jsonl"),
        Target("boxes_parquet", _seed_parquet, _read_parquet),
        Target("boxes_epic", _seed_epic, _read_epic),
        Target("boxes_cvat", _seed_annotated, _read_annotated("cvat", f"{VIDEO}.xml"), only="*.xml"),
        Target("boxes_label_studio", _seed_annotated, _read_annotated("labelstudio", "tasks.json"), only="tasks.json"),
        Target("hod_work", _seed_hod, _read_hod, only="out/**/*"),
        Target("hod_boxes", _seed_hod, _read_hod_boxes, only="in/boxes.parquet"),
        Target("hod_answer", _seed_answer, _read_answer),
        Target("hod_batch", _seed_batch, _read_batch),
        Target("hod_vocabulary", _seed_vocabulary, _read_vocabulary),
        Target("hod_hands3d", _seed_hands3d, _read_hands3d),
        Target("hod_prompt", _seed_prompt, _read_prompt),
        Target("feature_index", _seed_index, _read_index),
        Target("feature_cache", _seed_features, _read_features),
        Target("marks", _seed_marks, _read_marks),
        Target("results", _seed_results, _read_results),
        Target("metrics", _seed_metrics, _read_metrics, only="metrics.jsonl"),
        Target("demo_world", _seed_world, lambda folder: demo.plan(folder, scale=0.01)),
    )
}
"""By name; tests/fuzz.py numbers the damages of each."""
VIDEOS = ("video_pyav", "video_torchcodec", "video_decord", "video_chunker")
"""Targets of which each case is one of the seed's files; others are a folder of which a file is damaged."""
