"""Features: every clip once on any number of processes, nothing disturbed, nothing broken let through."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_cases import FRAMES, demo_benchmark, small_model
from torch import Tensor, nn

from egohod.data.dataset import Tokenizer, normalise
from egohod.distributed import Distributed, inference_precision
from egohod.errors import UserError
from egohod.evaluation.embed import Execution, embed_clips, embed_texts, extract, remaining

ALONE = Distributed(0, 1, torch.device("cpu"), None)


class Recorder(nn.Module):
    """Features that are the mean of each frame; remembers how it was called."""

    def __init__(self, bad: float = 0.0) -> None:
        super().__init__()
        self.bad = bad
        self.videos = 0
        self.token_rows: list[tuple[int, ...]] = []
        self.modes: set[tuple[bool, bool]] = set()

    def encode_video(self, video: Tensor, normalize: bool = True) -> Tensor:
        self.videos += len(video)
        self.modes.add((self.training, torch.is_grad_enabled()))
        return video.mean(dim=(1, 3, 4)) + self.bad

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        self.token_rows += [tuple(row) for row in tokens.tolist()]
        return tokens.double().sum(dim=1, keepdim=True).float()


def run_in_group(rank: int, world_size: int, folder: Path, broken: Path, out: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world_size)
    dist = Distributed(rank, world_size, torch.device("cpu"), "gloo")
    model = small_model()
    bench = demo_benchmark(folder, dist, batch_size=4)
    run = Execution(4, 0, dist)
    clips, _ = embed_clips(model, bench.dataset, run, controls=["shuffle"])
    texts = embed_texts(model, ["one", "a longer text", "one"], bench.tokenizer, run)
    results = bench(model)
    try:
        embed_clips(model, demo_benchmark(broken, dist).dataset, run)
        fault = ""
    except UserError as error:
        fault = str(error)
    torch.save({"clips": clips, "texts": texts, "results": results, "fault": fault}, out / f"{rank}.pt")
    dist.close()


def test_two_processes_give_the_features_and_results_of_one(world: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(world, broken)
    victim = sorted(broken.glob("videos/*/*.mp4"))[-1]
    victim.write_bytes(b"")

    torch.multiprocessing.spawn(run_in_group, (2, world, broken, tmp_path), nprocs=2)

    bench, model = demo_benchmark(world), small_model()
    assert len(bench.dataset) % 2 == 1, "the shares of the processes should differ in length"
    alone, _ = embed_clips(model, bench.dataset, Execution(7, 0, ALONE), controls=["shuffle"])
    results = bench(model)
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for order in ("plain", "shuffle"):
            torch.testing.assert_close(got["clips"][order], alone[order], atol=1e-6, rtol=0)
        assert torch.equal(got["texts"][0], got["texts"][2])
        assert got["results"] == pytest.approx(results)
        # Only one process meets the broken file; both must stop and name it.
        assert victim.name in got["fault"]
        assert victim.parent.name in got["fault"]


def test_clips_come_in_the_order_of_the_table_with_and_without_workers(world: Path) -> None:
    dataset = demo_benchmark(world).dataset
    want = torch.stack([normalise(dataset[i]["video"])[0].mean(dim=(0, 2, 3)) for i in range(len(dataset))])
    for workers, batch_size in ((0, len(dataset)), (2, 3)):
        model = Recorder()
        got = embed_clips(model, dataset, Execution(batch_size, workers, ALONE))[0]["plain"]
        assert got.dtype == torch.float32
        assert got.shape == (len(dataset), FRAMES)
        assert model.videos == len(dataset)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def float32_settings() -> tuple[str, str]:
    """Of matrix products and of convolutions on a GPU."""
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.conv.fp32_precision


@pytest.fixture
def training_precision() -> Iterator[None]:
    """What setup() sets on a GPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("training_precision")
def test_fp32_features_are_computed_without_tf32(world: Path, tmp_path: Path) -> None:
    class Settings(Recorder):
        def encode_video(self, video: Tensor, normalize: bool = True) -> Tensor:
            seen.add(float32_settings())
            assert not torch.backends.cuda.matmul.allow_tf32
            return super().encode_video(video, normalize)

        def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
            seen.add(float32_settings())
            return super().encode_text(tokens, normalize)

    seen, dataset, training = set[tuple[str, str]](), demo_benchmark(world).dataset, ("high", "tf32")
    assert float32_settings() == training
    embed_clips(Settings(), dataset, Execution(8, 0, ALONE))
    embed_texts(Settings(), ["one"], Tokenizer(), Execution(8, 0, ALONE))
    todo = remaining(dataset, tmp_path)
    extract(Settings(), dataset, tmp_path, todo, Execution(8, 0, ALONE))
    assert seen == {("highest", "ieee")}
    # Training continues as before, also after an evaluation that failed.
    assert float32_settings() == training
    with pytest.raises(UserError, match="NaN"):
        embed_clips(Recorder(float("nan")), dataset, Execution(8, 0, ALONE))
    assert float32_settings() == training
    with inference_precision(torch.device("cpu"), torch.bfloat16):
        assert torch.is_autocast_enabled("cpu")
        assert float32_settings() == training


@pytest.mark.usefixtures("training_precision")
def test_fp32_is_exact_with_the_switches_of_torch_2_6(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        allow_tf32 = True

    monkeypatch.setattr(torch.backends, "cudnn", Old)
    with inference_precision(torch.device("cpu"), torch.float32):
        assert not Old.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
    assert Old.allow_tf32
    assert torch.get_float32_matmul_precision() == "high"


def test_evaluation_leaves_mode_gradients_and_random_numbers_alone(world: Path) -> None:
    dataset, model = demo_benchmark(world).dataset, Recorder()
    state = torch.get_rng_state()
    embed_clips(model, dataset, Execution(8, 1, ALONE))
    assert model.modes == {(False, False)}
    assert model.training
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


def test_equal_texts_are_encoded_once_and_padding_is_cut() -> None:
    tokenizer, model = Tokenizer(), Recorder()
    texts = ["a long narration " * 12, "short", "short", "other", "short"]
    got = embed_texts(model, texts, tokenizer, Execution(2, 0, ALONE))
    assert len(model.token_rows) == 3
    assert [len(row) for row in model.token_rows][:2] == [8, 8]
    np.testing.assert_array_equal(got[:, 0], tokenizer(texts).sum(dim=1))


def test_text_features_do_not_depend_on_the_batch() -> None:
    model, tokenizer = small_model(), Tokenizer()
    texts = [f"#C C moves the {noun} " * count for count in (1, 3, 12) for noun in ("cup", "red pan")]
    one, many = (embed_texts(model, texts, tokenizer, Execution(size, 0, ALONE)) for size in (1, 6))
    torch.testing.assert_close(one, many, atol=1e-6, rtol=0)


def test_features_that_are_not_finite_are_refused(world: Path) -> None:
    dataset = demo_benchmark(world).dataset
    with pytest.raises(UserError, match=f"{len(dataset)} of {len(dataset)} clips are NaN or infinite, first of clip 0"):
        embed_clips(Recorder(float("nan")), dataset, Execution(8, 0, ALONE))


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(UserError, match="not a single text"):
        embed_texts(Recorder(), [], Tokenizer(), Execution(8, 0, ALONE))
