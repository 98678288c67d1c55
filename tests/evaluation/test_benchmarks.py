"""Benchmarks from Python and from the command ``egohod``, and models of other projects on them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_cases import ALONE, FRAMES, config, random_features, settings, small_model

import egohod
from egohod.__main__ import main
from egohod.api import LoadedBenchmark
from egohod.data.dataset import tokenizer_for
from egohod.errors import UserError
from egohod.evaluation.cards import CARDS
from egohod.evaluation.features import INDEX_FORMAT, file_of, open_index, write_feature_file, write_video
from egohod.evaluation.runner import benchmark, execution_of
from egohod.model.config import ModelConfig
from egohod.model.dual_encoder import create_model
from tests.support import ROOT, environment

OPTIONS: dict[str, Any] = {"num_frames": FRAMES, "batch_size": 7, "workers": 0}


class Pixels:
    """An outside model without weights: the mean colours of each frame, and texts by their letters."""

    image_size = 40

    def encode_video(self, frames: torch.Tensor) -> torch.Tensor:
        assert frames.shape[1:] == (FRAMES, 40, 40, 3)
        assert 0 <= float(frames.min()) <= float(frames.max()) <= 1
        return frames.mean(dim=(2, 3)).flatten(1) - 0.4

    def encode_text(self, sentences: list[str]) -> np.ndarray:
        return np.stack([np.resize([ord(letter) % 7 - 3.0 for letter in text], 3 * FRAMES) for text in sentences])


def loaded(formats: Path, name: str) -> LoadedBenchmark:
    chosen = settings(formats, name)
    return egohod.load_benchmark(name, chosen.metadata, chosen.root, layout=chosen.layout)


def test_cards_name_what_each_benchmark_is() -> None:
    cards = {card.name: card for card in egohod.list_benchmarks()}
    assert set(cards) == set(CARDS) >= {"ek100_mir", "egomcq"}
    numbers = cards["ek100_mir"].published
    assert ("EgoVideo-L", "map", 41.8) in [number[:3] for number in numbers]
    for card in cards.values():
        assert all((card.task, card.size, card.chance, card.licence, card.source, card.paper)), card.name
        assert all(number.source for number in card.published)
    assert [card.name for card in egohod.list_benchmarks("ek100*")] == ["ek100_mir", "ek100_cls", "ek100_cls_test"]


def test_the_command_shows_the_cards_of_a_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmarks", "ek100_c*"]) == 0
    shown = capsys.readouterr().out
    assert "published: EgoVideo-L action_top1 24 (ICLR 2025" in shown
    assert "egomcq" not in shown
    with pytest.raises(UserError, match=r"benchmarks egomqc: no benchmark matches \(did you mean 'egomcq'"):
        main(["benchmarks", "egomqc"])


def test_a_benchmark_is_five_lines_and_equals_the_program(formats: Path, tmp_path: Path) -> None:
    bench = loaded(formats, "ek100_mir")
    assert list(bench.clips.columns) == ["id", "video", "start", "end"]
    assert len(bench.clips)
    assert len(bench.texts) == len(set(bench.texts))
    model, cfg = small_model(), config()
    results = bench.evaluate(model, ["shuffle"], tokenizer=tokenizer_for(cfg.model), **OPTIONS)
    program = benchmark(
        cfg, "ek100_mir", settings(formats, "ek100_mir"), execution_of(cfg, ALONE), controls=["shuffle"]
    ).measure(model)
    assert results.metrics == pytest.approx({f"ek100_mir/{key}": value for key, value in program.flat().items()})
    text = results.to_json(tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text())["metrics"] == json.loads(text)["metrics"]
    assert "| ek100_mir | mAP" in results.to_markdown()
    page = (
        results + loaded(formats, "egomcq").evaluate(model, tokenizer=tokenizer_for(cfg.model), **OPTIONS)
    ).to_html()
    assert "ek100_mir" in page
    assert "egomcq" in page
    assert "shuffle" in page
    with pytest.raises(UserError, match="both results have the benchmark ek100_mir"):
        results + results
    with pytest.raises(UserError, match=r"Pixels \(.*cannot be joined: a page is of one model"):
        results + loaded(formats, "egomcq").evaluate(Pixels(), **OPTIONS)


def test_an_object_with_two_methods_is_a_model(formats: Path) -> None:
    results = loaded(formats, "egomcq").evaluate(Pixels(), ["reverse"], **OPTIONS)
    assert results.contents["checkpoint"]["path"] == "Pixels"
    assert {"egomcq/intra", "egomcq/reverse/intra"} <= set(results.metrics)


def test_the_cache_tells_models_of_equal_weights_apart(formats: Path, tmp_path: Path) -> None:
    bench, options = loaded(formats, "egomcq"), {**OPTIONS, "tokenizer": tokenizer_for(config().model)}
    first = small_model()
    other = create_model(ModelConfig(name="DEMO", num_frames=FRAMES, activation="quick_gelu"))
    other.load_state_dict(first.state_dict())
    assert first.activation != other.activation
    stored = [
        bench.evaluate(model, cache=tmp_path, **options).contents["benchmarks"]["egomcq"]["timing"]["from_cache"]
        for model in (first, other, other)
    ]
    assert stored == [0, 0, len(bench.clips)]


def test_models_that_lack_something_are_refused(formats: Path) -> None:
    bench = loaded(formats, "egomcq")

    class NoText:
        image_size = 40

        def encode_video(self, frames: torch.Tensor) -> torch.Tensor:
            raise AssertionError("texts come first, which are cheap")

    class Flat(Pixels):
        def encode_video(self, frames: torch.Tensor) -> torch.Tensor:
            return frames.mean(dim=(1, 2, 3, 4))

    with pytest.raises(UserError, match="NoText has no method encode_text"):
        bench.evaluate(NoText(), **OPTIONS)
    with pytest.raises(UserError, match=r"Flat.encode_video returned \[7\] for 7 items"):
        bench.evaluate(Flat(), **OPTIONS)
    with pytest.raises(UserError, match="object has no method encode_video"):
        bench.evaluate(object(), **OPTIONS)
    with pytest.raises(UserError, match=r"no temporal control 'shufle' \(did you mean 'shuffle'"):
        bench.evaluate(Pixels(), ["shufle"], **OPTIONS)

    class Short(Pixels):
        def encode_text(self, sentences: list[str]) -> np.ndarray:
            return super().encode_text(sentences)[:, :5]

    with pytest.raises(UserError, match="features of clips have 12 dimensions and those of texts 5"):
        bench.evaluate(Short(), **OPTIONS)
    with pytest.raises(UserError, match="DualEncoder reads tokens: give tokenizer="):
        bench.evaluate(small_model(), **OPTIONS)
    for model in (Pixels(), torch.nn.Linear(1, 1)):
        with pytest.raises(UserError, match=r"must be a torch\.nn\.Module with encode_video and encode_text"):
            bench.evaluate(model, tokenizer=list, **OPTIONS)
    with pytest.raises(UserError, match="runs/demo: not open_clip"):
        bench.evaluate("runs/demo", **OPTIONS)
    for arguments, message in (
        ({"name": "egomcq"}, "metadata is missing"),
        ({"name": "egomcq", "metadata": "x", "protocol": "upstrem"}, "did you mean 'upstream'"),
        ({"name": "egomcq", "metadata": "x", "layuot": "whole"}, "did you mean 'layout'"),
        ({"name": "x", "metadata": "x", "kind": "egomq"}, "did you mean 'egomcq'"),
    ):
        with pytest.raises(UserError, match=message):
            egohod.load_benchmark(**arguments)  # type: ignore[arg-type]


def write_features(folder: Path, bench: LoadedBenchmark, without: int | None = None) -> None:
    """Random features of all clips but one, and of all texts."""
    clips = bench.clips if without is None else bench.clips.drop(index=without)
    features = random_features(len(bench.clips), 0).numpy()
    index: dict[str, Any] = {"format": INDEX_FORMAT, "model": "x", "weights": "0f" * 32, "root": ""}
    index["protocol"] = {"frames": 3, "size": 40}
    videos = {video: file_of(video) for video in clips["video"]}
    open_index(folder, {**index, "layout": "whole", "chunk_seconds": 15.0, "videos": videos})
    for video, rows in clips.groupby("video"):
        write_video(folder, str(video), features[rows.index], rows["start"], rows["end"], [""] * len(rows), "")
    texts = random_features(len(bench.texts), 1).numpy()
    write_feature_file(folder / "texts.npz", texts, text=np.array(bench.texts))


def test_a_folder_of_features_is_a_model(formats: Path, tmp_path: Path) -> None:
    chosen = settings(formats, "egomcq")
    bench = egohod.load_benchmark("egomcq", chosen.metadata)  # stored features need no videos
    write_features(tmp_path / "all", bench)
    results = bench.evaluate(f"features:{tmp_path}/all")
    assert results.contents["checkpoint"]["sha256"] == "0f" * 32
    assert results.metrics["egomcq/intra"] < 60
    made = results.contents["benchmarks"]["egomcq"]["protocol"]
    assert (made["frames"], made["size"]) == (3, 40), "as the features were made"
    with pytest.raises(UserError, match="no temporal controls"):
        bench.evaluate(f"features:{tmp_path}/all", ["reverse"])
    write_features(tmp_path / "some", bench, without=3)
    with pytest.raises(UserError, match=f"no features of {bench.clips['video'][3]}"):
        bench.evaluate(f"features:{tmp_path}/some")
    partial = bench.evaluate(f"features:{tmp_path}/some", allow_missing=True)
    assert partial.contents["benchmarks"]["egomcq"]["partial"]
    assert "**partial**" in partial.to_markdown()
    # Texts are those of the protocol, whose class prompts may be more.
    chosen = settings(formats, "ek100_cls")
    classes = egohod.load_benchmark("ek100_cls", chosen.metadata, protocol="upstream")
    write_features(tmp_path / "classes", classes)
    assert classes.evaluate(f"features:{tmp_path}/classes").metrics["ek100_cls/action_top1"] < 20
    (tmp_path / "all" / "texts.npz").unlink()
    with pytest.raises(UserError, match="compares clips with texts"):
        bench.evaluate(f"features:{tmp_path}/all")


def test_folders_of_features_make_an_ensemble(formats: Path, tmp_path: Path) -> None:
    bench = egohod.load_benchmark("egomcq", settings(formats, "egomcq").metadata)
    write_features(tmp_path / "all", bench)
    spec = f"features:{tmp_path}/all"
    (tmp_path / "eval.yml").write_text("{}")
    command = [
        *("eval", "--config_file", str(tmp_path / "eval.yml"), "--checkpoint", spec, "--benchmark", "egomcq"),
        *("--metadata", str(bench.config.metadata), "--output", str(tmp_path), f"evaluate.ensemble=[{spec}]"),
    ]
    assert main(command) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["benchmarks"]["egomcq"]["scoring"] == ["ensemble of 2"]
    assert results["metrics"] == pytest.approx(bench.evaluate(spec).metrics)
    with pytest.raises(UserError, match="no mirrored clips"):
        main([*command, "evaluate.flip=true"])


def test_an_open_clip_model_and_a_transformers_folder_are_named(
    formats: Path, tiny_outside: str, tmp_path: Path
) -> None:
    results = loaded(formats, "egomcq").evaluate(tiny_outside, **OPTIONS)
    assert results.contents["config"]["model"] == tiny_outside
    with pytest.raises(UserError, match="transformers:"):
        loaded(formats, "egomcq").evaluate(f"transformers:{tmp_path}", **OPTIONS)


class _Clip(torch.nn.Module):
    """The interface of transformers' CLIPModel, as far as it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.texts = torch.nn.Linear(3, 8), torch.nn.Embedding(256, 8)
        self.device = torch.device("cpu")

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        assert pixel_values.shape[1:] == (3, 40, 40)
        return self.images(pixel_values.mean(dim=(2, 3)))

    def get_text_features(self, input_ids: torch.Tensor) -> SimpleNamespace:
        # Version 5 returns an object.
        return SimpleNamespace(pooler_output=self.texts(input_ids).mean(dim=1))


class _Tokens(dict[str, torch.Tensor]):
    def to(self, device: torch.device) -> _Tokens:
        return self


def _tokenizer(texts: list[str], **how: Any) -> _Tokens:
    rows = [[ord(letter) % 256 for letter in text.ljust(how["max_length"])[: how["max_length"]]] for text in texts]
    return _Tokens(input_ids=torch.tensor(rows))


def test_a_model_of_transformers_is_averaged_over_frames(formats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the package, which is no requirement of the project."""
    torch.manual_seed(0)
    _tokenizer.model_max_length = 16  # type: ignore[attr-defined]
    images = SimpleNamespace(do_center_crop=True, crop_size={"height": 40}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    model, processor = _Clip(), SimpleNamespace(image_processor=images, tokenizer=_tokenizer)
    package = SimpleNamespace(
        AutoModel=SimpleNamespace(from_pretrained=lambda folder, local_files_only: model),
        AutoProcessor=SimpleNamespace(from_pretrained=lambda folder, local_files_only: processor),
    )
    monkeypatch.setitem(sys.modules, "transformers", package)  # type: ignore[arg-type]
    results = loaded(formats, "egomcq").evaluate("transformers:folder", ["reverse"], **OPTIONS)
    # Blind to the order of frames.
    assert results.metrics["egomcq/reverse/intra"] == results.metrics["egomcq/intra"]


def run_egohod(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "egohod", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment(), check=False)


def test_the_command_lists_benchmarks_and_runs_the_programs() -> None:
    listed = run_egohod("benchmarks")
    assert listed.returncode == 0
    assert "ek100_mir: " in listed.stdout
    wrong = run_egohod("evla")
    assert wrong.returncode == 2
    assert "did you mean 'eval'" in wrong.stderr
    assert "--benchmark" in run_egohod("eval", "--help").stdout
