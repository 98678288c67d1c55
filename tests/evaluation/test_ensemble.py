"""Ensembles, mirrored clips and dual softmax: what they change, and that results say so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_cases import FRAMES, cached, evaluate, made, random_features, settings, small_model
from torch import Tensor, nn
from torch.nn.functional import normalize

import main_eval
from egohod.__main__ import main
from egohod.data.formats.base import Question
from egohod.data.labels import ClassSpace
from egohod.data.table import swap_sides
from egohod.evaluation.embed import MIRRORED, PLAIN, ClassProbabilities
from egohod.evaluation.tasks import (
    ClassificationTask,
    Members,
    MultiLabelTask,
    MultipleChoiceTask,
    RetrievalTask,
    dual_softmax,
    similarity,
)
from egohod.model.config import ModelConfig
from egohod.model.dual_encoder import create_model
from tests.support import ROOT, environment

COUNT = 60


def pairs(temperature: float | None = None) -> RetrievalTask:
    """Every clip has one text, and no two are related."""
    texts = [str(row) for row in range(COUNT)]
    return RetrievalTask(texts, np.arange(COUNT), np.eye(COUNT, dtype=np.float32), temperature=temperature)


def noisy(seed: int, noise: float, width: int = 24) -> tuple[Tensor, Tensor]:
    """Clips and texts as a model with errors of its own sees them."""
    true = random_features(COUNT, seed, width)
    clips, texts = (
        normalize(true + noise * random_features(COUNT, seed + place, width), dim=1) for place in (100, 200)
    )
    return clips, texts


def joined(members: list[tuple[Tensor, Tensor]], combine: str) -> tuple[Members, Members]:
    clips, texts = zip(*members, strict=True)
    return Members(clips, combine), Members(texts, combine)


@pytest.mark.parametrize("combine", ["raw", "standardised"])
def test_an_ensemble_of_two_noisy_models_beats_each(combine: str) -> None:
    task, members = pairs(), [noisy(1, 1.4), noisy(2, 1.4, width=32)]
    alone = [evaluate(task, *each)["map"] for each in members]
    both = evaluate(task, *joined(members, combine))["map"]
    assert both > max(alone) + 5, (both, alone)
    # Several copies of one model are that model, in its own scale.
    same = joined([members[0]] * 3, combine)
    torch.testing.assert_close(task.scores(*same), similarity(*members[0]), atol=2e-6, rtol=0)


def test_standardising_keeps_the_widest_similarities_from_deciding_alone() -> None:
    good, (clips, texts) = noisy(1, 0.9), noisy(2, 3.0)
    # Beside a good model of narrow cosines, as a common direction in all features makes them.
    narrow = tuple(normalize(torch.cat([each, torch.full((COUNT, 1), 3.0)], dim=1), dim=1) for each in good)
    members = [(narrow[0], narrow[1]), (clips, texts)]
    by_combine = {combine: evaluate(pairs(), *joined(members, combine))["map"] for combine in ("raw", "standardised")}
    assert by_combine["standardised"] > by_combine["raw"] + 5, by_combine


def test_all_kinds_of_tasks_average_their_members() -> None:
    (one, other), (texts, others) = (
        (random_features(6, seed) for seed in (1, 2)),
        (random_features(4, s) for s in (3, 4)),
    )
    members = joined([(one, texts), (other, others)], "raw")
    mean = (similarity(one, texts) + similarity(other, others)) / 2
    labels, split = np.arange(6) % 4, np.arange(6)
    classes = ClassificationTask("c", ["a", "b", "c", "d"], np.arange(4), labels)
    expected = evaluate(classes, mean, torch.eye(4))
    assert evaluate(classes, *members) == pytest.approx(expected)
    several = MultiLabelTask("m", ["a", "b", "c", "d"], labels[:, None] == np.arange(4))
    assert evaluate(several, *members) == pytest.approx(evaluate(several, mean, torch.eye(4)))
    kinds = [Question("two", True, clip, (0, 1), 0) for clip in split] + [Question("four", True, 0, (0, 1, 2, 3), 1)]
    questions = MultipleChoiceTask(["a", "b", "c", "d"], kinds)
    assert evaluate(questions, *members) == pytest.approx(evaluate(questions, mean, torch.eye(4)))
    scores = questions._scores(*joined([(one, texts), (other, others)], "standardised"))
    assert np.isneginf(scores[:6, 2:]).all()
    assert np.isfinite(scores[:, :2]).all()


def test_dual_softmax_takes_away_what_a_text_shares_with_all_clips() -> None:
    clips, texts = noisy(1, 0.5)
    # Hubs: every sixth text is in a direction that all clips have in common, and hides the right ones.
    common = random_features(1, 7, clips.shape[1])
    clips = normalize(clips + common, dim=1)
    texts[::6] = normalize(texts[::6] + common, dim=1)
    without, with_it = (evaluate(pairs(temperature), clips, texts) for temperature in (None, 0.05))
    assert with_it["recall_1_v2t"] > without["recall_1_v2t"] + 20, (with_it, without)
    scores = dual_softmax(torch.tensor([[0.2, 0.1], [0.3, 0.4]]), 0.1)
    rows, columns = (torch.tensor([[2.0, 1.0], [3.0, 4.0]]).softmax(dim=dim) for dim in (1, 0))
    torch.testing.assert_close(scores, (rows * columns).log())
    assert torch.isfinite(dual_softmax(similarity(clips, texts), 1e-3)).all()


# --------------------------------------------------------------------------------------------------
# Mirrored clips
# --------------------------------------------------------------------------------------------------


class MirroredWorld(nn.Module):
    """A model that sees every clip mirrored."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_model()

    def encode_video(self, video: Tensor, normalize: bool = True) -> Tensor:
        return self.inner.encode_video(video.flip(-1), normalize=normalize)

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        return self.inner.encode_text(tokens, normalize=normalize)


@pytest.mark.parametrize("kind", ["custom", "ek100_cls"])
def test_a_mirrored_world_gives_the_same_numbers(formats: Path, kind: str) -> None:
    """Clips mirrored and captions with left and right exchanged: with flip nothing changes, without it does."""
    scores = {}
    for flip in (True, False):
        here, there = made(formats, kind, flip=flip), made(formats, kind, flip=flip)
        plain = there.tokenizer
        there.tokenizer = lambda texts, plain=plain: plain([swap_sides(text) for text in texts])
        for name, bench, model in (("here", here, small_model()), ("there", there, MirroredWorld())):
            result = bench.measure(model)
            scores[flip, name] = [
                task.scores(*features) if hasattr(task, "scores") else torch.from_numpy(task._scores(*features))
                for task, features in zip(bench.tasks, result.features, strict=True)
            ]
    for one, other in zip(scores[True, "here"], scores[True, "there"], strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(scores[False, "here"], scores[False, "there"], strict=True))


def test_texts_are_exchanged_only_where_they_name_a_side(formats: Path) -> None:
    bench = made(formats, "custom", flip=True)
    embedded = bench.embed(small_model())
    texts = [text for task in bench.tasks for text in task.texts]
    place = {text: row for row, text in enumerate(texts)}
    sided = [row for row, text in enumerate(texts) if swap_sides(text) != text]
    assert 0 < len(sided) < len(texts)
    plain, mirrored = embedded.texts[PLAIN], embedded.texts[MIRRORED]
    for row, text in enumerate(texts):
        if (other := place.get(swap_sides(text))) is not None:
            torch.testing.assert_close(mirrored[row], plain[other], atol=1e-6, rtol=0)
    assert ((mirrored - plain)[sided].abs().amax(dim=1) > 1e-5).all()


def test_mirrored_clips_have_cached_features_of_their_own(formats: Path, tmp_path: Path) -> None:
    first = cached(formats, "ek100_cls", tmp_path)
    without = first.measure(small_model()).flat()
    both = cached(formats, "ek100_cls", tmp_path)
    both.flip = True
    with_flip = both.measure(small_model())
    assert with_flip.report.from_cache == 0, "the clips are decoded once more, for their mirror images"
    again = cached(formats, "ek100_cls", tmp_path)
    again.flip = True
    measured = again.measure(small_model())
    assert measured.report.from_cache == measured.report.clips
    assert measured.flat() == pytest.approx(with_flip.flat())
    assert cached(formats, "ek100_cls", tmp_path).measure(small_model()).flat() == pytest.approx(without)


def test_probabilities_of_mirrored_clips_are_those_of_the_class_on_the_other_side() -> None:
    names = ("pick left", "pick right", "stir")
    space = ClassSpace(("verb_class", "side"), (("0", "left"), ("0", "right"), ("1", "both")), names)
    torch.manual_seed(0)
    model = create_model(ModelConfig(name="DEMO", num_frames=FRAMES), classes=space.heads("all"))
    # The classes, the two verbs, and the sides: both, left, right.
    assert ClassProbabilities(model, space).mirrored.tolist() == [1, 0, 2, 3, 4, 5, 7, 6]


# --------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = create_model(ModelConfig(name="DEMO", num_frames=FRAMES))
        torch.save({"state_dict": model.state_dict()}, folder / f"{seed}.pt")
    (folder / "eval.yml").write_text("{}")
    return [folder / "0.pt", folder / "1.pt"]


def command(checkpoints: list[Path], formats: Path, output: Path, *more: str) -> list[str]:
    source = settings(formats, "ek100_mir")
    return [
        *("--config_file", str(checkpoints[0].parent / "eval.yml"), "--checkpoint", str(checkpoints[0])),
        *("--benchmark", "ek100_mir", "--metadata", str(source.metadata), "--root", str(source.root)),
        *("model.name=DEMO", f"model.num_frames={FRAMES}", f"evaluate.num_frames={FRAMES}", "data.workers=0"),
        *("data.decoder=pyav", "evaluate.batch_size=4", "evaluate.cache=null", "--output", str(output), *more),
    ]


def test_results_name_what_they_are_of(formats: Path, tmp_path: Path, checkpoints: list[Path]) -> None:
    more = [f"evaluate.ensemble=[{checkpoints[1]}]", "evaluate.flip=true", "evaluate.dual_softmax=0.05"]
    more += [f"evaluate.submission={tmp_path}/submission", "evaluate.supervision=[2,0,0]", "--controls", "shuffle"]
    assert main(["eval", *command(checkpoints, formats, tmp_path, *more)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    members = results["checkpoint"]["members"]
    assert [each["path"] for each in members] == [str(path) for path in checkpoints]
    assert len({results["checkpoint"]["sha256"], *(each["sha256"] for each in members)}) == 3
    notes = " ".join(results["benchmarks"]["ek100_mir"]["notes"])
    assert results["benchmarks"]["ek100_mir"]["scoring"] == ["ensemble of 2", "flip", "dual softmax"]
    page, row = (tmp_path / "report.html").read_text(), (tmp_path / "results.md").read_text()
    for word in ("ENSEMBLE", "FLIP", "DUAL SOFTMAX (temperature 0.05)"):
        assert word in notes
        assert word in page
    for each in members:
        assert each["sha256"] in page
        assert f"DEMO `{each['sha256'][:12]}`" in row
    assert ", ensemble of 2, flip, dual softmax |" in row
    assert (tmp_path / "submission" / "ek100_mir.zip").is_file()
    assert "ek100_mir/shuffle/map" in results["metrics"]
    # None of it unless it was requested.
    assert main_eval.main(command(checkpoints, formats, tmp_path)) == 0
    alone = json.loads((tmp_path / "results.json").read_text())
    assert alone["benchmarks"]["ek100_mir"]["scoring"] == []
    assert "members" not in alone["checkpoint"]
    assert alone["metrics"]["ek100_mir/map"] != results["metrics"]["ek100_mir/map"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["evaluate.submission=x"], "evaluate.supervision=[]: a challenge wants three levels"),
        (["evaluate.supervision=[1,2,6]"], "evaluate.supervision=[1, 2, 6]: a challenge wants three levels"),
        (["evaluate.dual_softmax=0"], "evaluate.dual_softmax"),
        (["evaluate.combine=max"], "must be one of standardised, raw"),
        (["evaluate.ensemble=[none.pt]"], "none.pt: no such file"),
        (
            ["evaluate.submission=x", "evaluate.supervision=[2,0,0]", "evaluate.benchmarks.ek100_mir.kind=egomcq"],
            "no egomcq.json there",
        ),
    ],
)
def test_mistakes_are_one_line(
    formats: Path, tmp_path: Path, checkpoints: list[Path], more: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main_eval.cli.run(main_eval.main, command(checkpoints, formats, tmp_path, *more)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.ci
def test_an_ensemble_on_two_processes_is_that_of_one(formats: Path, tmp_path: Path, checkpoints: list[Path]) -> None:
    metrics = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        more = [f"evaluate.ensemble=[{checkpoints[1]}]", "evaluate.flip=true"]
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"),
                *("main_eval.py", *command(checkpoints, formats, output, *more)),
            ],
            cwd=ROOT, env=environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        metrics.append(json.loads((output / "results.json").read_text())["metrics"])
    assert metrics[1] == pytest.approx(metrics[0], abs=1e-6)
