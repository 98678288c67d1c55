"""Retrieval in two stages: candidates alone are ordered anew, results say so, and the tool trains a head for it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from evaluation_cases import ALONE, FRAMES, config, settings, small_model
from torch import Tensor

from egohod.config import check
from egohod.distributed import Distributed
from egohod.errors import UserError
from egohod.evaluation.embed import PLAIN, Execution, WithTokens, fingerprint, rerank
from egohod.evaluation.results import describe, markdown
from egohod.evaluation.runner import Benchmark, benchmark, execution_of
from egohod.model.reranker import Reranker, RerankerShape
from tests.support import Command
from tools.train_reranker import Pool, train

TEXTS = ["opens the jar", "closes the jar", "shakes the box", "wipes the counter", "slides the cup to the left"]


def head_for(model: torch.nn.Module, top: bool = True) -> Reranker:
    """A head with random weights, which orders candidates arbitrarily."""
    torch.manual_seed(1)
    width = 128
    head = Reranker(RerankerShape(width, width, FRAMES, 2, width=16, encoder=fingerprint(model), trained="not at all"))
    if top:
        torch.nn.init.normal_(head.target.weight, std=3.0)
    return head.eval()


def made(formats: Path, head: Reranker | None, kind: str = "ek100_mir", **evaluate: object) -> Benchmark:
    cfg = config(**evaluate)
    cfg.evaluate.rerank.top_k = 4
    execution = execution_of(cfg, ALONE)
    return benchmark(cfg, kind, settings(formats, kind), execution, controls=["reverse"], reranker=head)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, FRAMES * 4 * 128, generator=generator), torch.rand(6, 5, generator=generator)


def ranked(dist: Distributed, model: torch.nn.Module | None = None) -> tuple[Tensor, Tensor]:
    from egohod.data.dataset import Tokenizer

    clips, sim = inputs()
    model = model or small_model()
    by_clip, by_text, flops = rerank(
        model, head_for(model), clips, TEXTS, Tokenizer(), sim, 3, Execution(4, 0, dist)
    )  # fmt: skip
    assert dist.rank or flops > 1000
    return torch.from_numpy(by_clip), torch.from_numpy(by_text)


def test_candidates_stay_in_front_and_the_others_keep_their_places() -> None:
    _, sim = inputs()
    for result, scores in zip(ranked(ALONE), (sim, sim.T), strict=True):
        assert result.shape == scores.shape
        changed = 0
        for row, before in zip(result, scores, strict=True):
            first = before.argsort(descending=True)
            assert {*row.argsort(descending=True)[:3].tolist()} == {*first[:3].tolist()}
            assert torch.equal(row[first[3:]], before[first[3:]])
            changed += row.argsort(descending=True)[:3].tolist() != first[:3].tolist()
        assert changed


def in_group(rank: int, out: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    dist = Distributed(rank, 2, torch.device("cpu"), "gloo")
    torch.save(ranked(dist), out / f"{rank}.pt")
    dist.close()


def test_two_processes_give_the_ranking_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(in_group, (tmp_path,), nprocs=2)
    torch.set_num_threads(1)
    for expected, *others in zip(ranked(ALONE), *(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)), strict=True):
        assert all(torch.equal(other, expected) for other in others)


def test_results_say_that_a_reranker_was_used_and_what_it_cost(formats: Path) -> None:
    model = small_model()
    plain = made(formats, None).measure(model)
    bench = made(formats, head_for(model))
    result = bench.measure(model)
    stage = result.reranking
    assert stage is not None
    # The first stage is the evaluation without a reranker, to the bit; under controls, too, something changes.
    assert {name: score.value for name, score in stage.first_stage.items()} == {
        name: score.value for name, score in plain.scores[PLAIN].items()
    }
    assert result.scores[PLAIN]["map"].value != plain.scores[PLAIN]["map"].value
    assert result.scores["reverse"]["map"].value != plain.scores["reverse"]["map"].value
    described = describe(bench, result, {})
    assert described["rerank"]["top_k"] == 4
    assert described["rerank"]["trained"] == "not at all"
    gain = described["rerank"]["first_stage"]["map"]
    assert gain["gain"] == pytest.approx(result.scores[PLAIN]["map"].value - gain["value"])
    assert gain["gain_interval"][0] < gain["gain"] < gain["gain_interval"][1]
    assert 0 < described["rerank"]["gflop_per_query"] < 1
    assert any(note.startswith("RERANKED: the first 4 candidates of every query") for note in described["notes"])
    page = markdown(
        {"config": {"model": "DEMO"}, "checkpoint": {"sha256": "0" * 64}, "benchmarks": {"ek100_mir": described}}
    )
    assert "top 4 reranked" in page


def test_a_new_head_changes_no_number_and_classification_none_at_all(formats: Path) -> None:
    model = small_model()
    plain, same = made(formats, None).measure(model), made(formats, head_for(model, top=False)).measure(model)
    assert same.flat() == pytest.approx(plain.flat())
    other = made(formats, head_for(model), "ek100_cls")
    assert other.reranker is None
    assert other.measure(model).reranking is None


def test_other_weights_and_protocols_are_refused(formats: Path) -> None:
    model = small_model()
    head = head_for(model)
    with torch.no_grad():
        model.logit_scale.add_(1)
    with pytest.raises(UserError, match=r"evaluate\.rerank\.path: was trained on the tokens of other weights"):
        made(formats, head).measure(model)
    with pytest.raises(UserError, match=r"shows 1 views of 8 frames, but the reranker reads one of 4"):
        made(formats, head, num_frames=8).measure(small_model())


@torch.no_grad()
def test_features_with_tokens_begin_with_the_models_own() -> None:
    model = small_model().eval()
    video = torch.randn(2, 3, FRAMES, model.geometry.image_size, model.geometry.image_size)
    both = WithTokens(model, head_for(model)).encode_video(video)
    assert torch.equal(both[:, : model.geometry.embed_dim], model.encode_video(video))
    assert both.shape[1] == model.geometry.embed_dim + FRAMES * 4 * model.geometry.vision_width


def test_the_tool_trains_a_head_that_an_evaluation_uses(
    formats: Path, demo_world: Path, tmp_path: Path, inside: Command
) -> None:
    model = small_model()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.pt")
    (tmp_path / "cfg.yml").write_text("data: {workers: 0, decoder: pyav, flip: 0}\nevaluate: {cache: null}\n")
    common = ["--config_file", tmp_path / "cfg.yml", "--checkpoint", tmp_path / "model.pt", "model.name=DEMO"]
    common += [f"model.num_frames={FRAMES}", f"evaluate.num_frames={FRAMES}"]
    train = [f"data.train.demo.metadata={formats}/benchmarks/ek100/EPIC_100_train.csv", "data.train.demo.format=ek100"]
    train += [f"data.train.demo.root={demo_world}/train/videos", "data.labels.target=relevancy", "loss.name=sms"]
    sizes = ["--steps", "4", "--group", "5", "--groups", "1", "--views", "1", "--width", "16", "--depth", "10"]
    sizes += ["--grid", "9"]  # more than the tower's patches
    output = tmp_path / "rerank.safetensors"
    done = inside("train_reranker", *common, *train, *sizes, "--output", output, "--width", "18")
    assert done.returncode == 2
    assert "--width 18 must be a multiple of 4" in done.stderr
    done = inside("train_reranker", *common, *train, *sizes, "--output", output)
    assert done.returncode == 0, done.stderr
    assert " 0.0 % of the pairs" not in done.stderr, "a run of few steps has a last tenth, too"
    assert output.exists()
    where = settings(formats, "ek100_mir")
    more = [
        "--benchmark",
        "ek100_mir",
        "--metadata",
        where.metadata,
        "--root",
        where.root,
        "--output",
        tmp_path / "out",
    ]
    done = inside("main_eval", *common, *more, f"evaluate.rerank.path={output}", "evaluate.rerank.top_k=5")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["benchmarks"]["ek100_mir"]["rerank"]["trained"].startswith("60 clips, steps=4")


@pytest.mark.parametrize(
    ("knob", "value"),
    [("ensemble", ["x.pt"]), ("flip", True), ("dual_softmax", 0.05), ("submission", "x")],
)
def test_it_reads_the_tokens_of_one_model(knob: str, value: object) -> None:
    cfg = config(supervision=[2, 0, 0], **{knob: value})
    assert not check(cfg)
    cfg.evaluate.rerank.path = "head.safetensors"
    assert [key for key, _ in check(cfg)] == [f"evaluate.{knob}"]


def test_training_orders_by_relevancy_what_cosines_cannot() -> None:
    generator = torch.Generator().manual_seed(0)
    # Six classes, seen at one of four places of a clip: features, all alike, know nothing of them.
    kinds, seen = torch.arange(48) % 6, torch.eye(6, 8)
    clips = 0.3 * torch.randn(48, 4, 8, generator=generator)
    clips[torch.arange(48), torch.arange(48) % 4] += 3 * seen[kinds]
    same = torch.ones(48, 4) / 2
    # Verbs and nouns are the class twice over.
    labels = {f"clip_{name}": value for name, value in (("verbs", kinds), ("nouns", seen[kinds]))}
    texts = {f"text_{name}": value for name, value in (("verbs", torch.arange(6)), ("nouns", seen[:6]))}
    pool = Pool(
        same, clips.half(), kinds, same[:6], seen[:, None].half(), torch.ones(6, 1, dtype=torch.bool), labels, texts
    )
    torch.manual_seed(0)
    head = Reranker(RerankerShape(8, 8, 4, 1, width=16, heads=2))
    options = {"steps": 80, "groups": 2, "group": 6, "depth": 48, "temperature": 0.1, "lr": 1e-2, "seed": 0}
    train(head, pool, torch.device("cpu"), argparse.Namespace(**options))
    with torch.no_grad():
        scores = head(clips, seen[:, None], pool.mask, same @ pool.text.T)
    assert float((scores.argmax(dim=1) == kinds).float().mean()) > 0.9
