"""torch.compile: block by block, one graph for all blocks, never for an evaluation, and what becomes of an adapter."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend
from torch.nn.parallel import DistributedDataParallel

from egohod.config import Config
from egohod.distributed import Distributed
from egohod.evaluation.embed import Execution, _inference, embed_texts
from egohod.loss.contrastive import ContrastiveLoss
from egohod.model.config import GEOMETRIES, ModelConfig, geometry
from egohod.model.dual_encoder import DualEncoder, compiles, create_model
from egohod.training.step import TrainStep
from tests.support import ROOT

ALONE = Distributed(0, 1, torch.device("cpu"), None)


def test_both_towers_compile_without_a_break_for_any_text_length(
    demo_model: DualEncoder, clips: Tensor, tokens: Tensor
) -> None:
    torch._dynamo.reset()
    compiled = copy.deepcopy(demo_model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled.compile_towers(backend=counter)
    assert compiled.state_dict().keys() == demo_model.state_dict().keys()
    graphs = []
    for length in (16, 24, 32):
        texts = torch.nn.functional.pad(tokens, (0, length - 16))
        outputs = [model(clips, texts) for model in (demo_model, compiled)]
        torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=0)
        graphs.append(counter.frame_count)
    assert graphs[0] >= 2, "a tower was not compiled"
    assert graphs[-1] == graphs[0], "another text length was compiled anew"
    ContrastiveLoss()(**outputs[1])["loss"].backward()
    assert compiled.visual.conv1.weight.grad is not None


def test_dropout_and_checkpointing_compile_too(clips: Tensor) -> None:
    torch._dynamo.reset()
    config = ModelConfig(name="DEMO", num_frames=8, patch_dropout=0.5, drop_path=0.2, checkpoint_blocks="all")
    model = create_model(config)
    model.compile_towers(backend="aot_eager")
    model.encode_video(clips).sum().backward()
    assert model.visual.temporal_embedding.grad is not None


@pytest.fixture(autouse=True)
def _no_graphs_are_left() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def compiled(name: str = "DEMO", **config: Any) -> tuple[DualEncoder, CompileCounterWithBackend]:
    """A compiled model, and what counts its graphs; they are traced, and run as they were written."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = create_model(ModelConfig(name=name, num_frames=8, **config))
    model.compile_towers(backend=counter)
    return model, counter


@pytest.mark.parametrize("name", ["DEMO", pytest.param("DEMO_Slowfast", marks=pytest.mark.ci)])
def test_all_blocks_share_the_graphs_of_one(name: str, clips: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start takes as long for 24 blocks as for 2: the graphs are those of all tokens, and of CLS alone."""
    graphs = {}
    for depth in (2, 5):
        monkeypatch.setitem(GEOMETRIES, name, replace(geometry(name), vision_layers=depth))
        model, counter = compiled(name)
        model.encode_video(clips).sum().backward()
        graphs[depth] = counter.frame_count
    paths = 2 if name == "DEMO_Slowfast" else 1
    assert graphs == {2: 2 * paths, 5: 2 * paths}


def test_several_processes_compile_the_graphs_of_one(
    clips: Tensor, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch divides graphs within DDP by its buckets, which are small here; and with the kernels of a GPU's order."""
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1024)
    monkeypatch.setattr("egohod.model.vision.SHORT", 0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    graphs, losses = [], []
    try:
        for is_parallel in (False, True):
            torch.manual_seed(0)
            model, counter = compiled()
            model.visual.set_attention([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
            forward = DistributedDataParallel(model, bucket_cap_mb=0.1) if is_parallel else model
            losses.append(ContrastiveLoss()(**forward(clips, tokens))["loss"])
            losses[-1].backward()
            graphs.append(counter.frame_count)
    finally:
        dist.destroy_process_group()
    assert graphs[1] == graphs[0]
    assert torch.equal(losses[1], losses[0])


@pytest.mark.ci
def test_more_variants_than_pytorch_allows_by_default_are_compiled(
    clips: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stochastic depth each block has a rate of its own; its limit would be reached by the eighth block."""
    monkeypatch.setitem(GEOMETRIES, "DEMO", replace(geometry("DEMO"), vision_layers=12))
    model, counter = compiled(drop_path=0.3)
    model.encode_video(clips).sum().backward()
    assert counter.frame_count == 12
    with torch.no_grad():  # as the first pass of cached accumulation
        model.encode_video(clips)
    assert counter.frame_count == 24


def test_an_evaluation_compiles_nothing(clips: Tensor, tokens: Tensor) -> None:
    model, counter = compiled()

    def train() -> int:
        ContrastiveLoss()(**model(clips, tokens))["loss"].backward()
        return counter.frame_count

    before = train()
    plain = create_model(ModelConfig(name="DEMO", num_frames=8))
    plain.load_state_dict(model.state_dict())
    # A last batch that is smaller, views, protocols of other frames: more variants than PyTorch compiles.
    with _inference(model, ALONE.device, torch.float32):
        for count in range(1, 11):
            video = torch.randn(1 + count % 4, 3, count, 40, 40)
            assert torch.equal(model.encode_video(video), plain.encode_video(video))
    texts = [" ".join(["word"] * length) for length in (1, 3, 5, 8, 13, 21, 34)]
    assert embed_texts(model, texts, lambda chosen: tokens_of(chosen), Execution(1, 0, ALONE)).shape == (7, 128)
    assert counter.frame_count == before
    # And the graphs of training are still there.
    assert train() == before
    model.encode_video(clips[:2]).sum().backward()
    assert counter.frame_count > before, "without the stance another batch size is compiled"


def tokens_of(texts: Any) -> Tensor:
    """A token for each word, and the end of the text."""
    rows = torch.zeros(len(texts), 77, dtype=torch.long)
    for row, text in zip(rows, texts, strict=True):
        length = len(text.split())
        row[:length], row[length] = 7, 49407
    return rows


def test_which_runs_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_models: list[DualEncoder] = []
    monkeypatch.setattr(DualEncoder, "compile_towers", lambda model: compiled_models.append(model))
    for choice, count in (("auto", 0), ("false", 0), ("true", 1)):
        cfg = Config(model=ModelConfig(name="DEMO_SMALL", compile=choice))
        TrainStep(create_model(cfg.model), cfg, ALONE, total_steps=1, steps_per_epoch=1)
        assert len(compiled_models) == count, choice


def test_auto_compiles_on_a_gpu_where_the_compiler_has_all_it_needs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    gpu = torch.device("cuda")
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("sysconfig.get_path", lambda name, scheme: str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert compiles("auto", gpu)
    assert not compiles("auto", ALONE.device)
    assert not compiles("false", gpu)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not compiles("auto", gpu)
    assert "model.compile=auto: the model is not compiled, for lack of a C compiler" in caplog.text
    assert compiles("true", gpu), "then PyTorch says what it lacks"
    (tmp_path / "Python.h").unlink()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))  # Pascal, which cu126 has code for
    assert not compiles("auto", gpu)
    assert "lack of a C compiler and Python.h (apt-get install python3-dev) and a GPU of compute cap" in caplog.text


@pytest.mark.ci
def test_the_temporal_convolution_of_an_adapter_is_one_kernel() -> None:
    """All between two matrix products is: GELU; padding, shifts, products and sums; the residual; the output."""
    code = """
import torch
from torch._inductor.utils import run_and_get_code
from egohod.model.vision import MotionAdapter
adapter, tokens = MotionAdapter(64), torch.randn(2, 1 + 4 * 9, 64)
with torch.no_grad():
    output, code = run_and_get_code(torch.compile(adapter, fullgraph=True, dynamic=False), tokens, 4)
    torch.testing.assert_close(output, adapter(tokens, 4), atol=1e-5, rtol=1e-4)
print(*(word for word in code[0].replace("(", " ").split() if word.startswith("cpp_fused")))
"""
    # In a process of its own: the compiler's state stays in a process, and other tests count what PyTorch does.
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    kernels = set(answer.stdout.splitlines()[-1].split())
    # Patches without CLS, and the three of the docstring; all else are matrix products.
    assert len(kernels) == 4
    (convolution,) = (name for name in kernels if "constant_pad" in name)
    assert "gelu" in convolution
    assert "mul" in convolution
