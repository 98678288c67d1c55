"""train.deterministic: what it sets, and that a step has no operation that a GPU cannot compute deterministically.

That a GPU then computes the same bits twice is not tested: none was available.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from egohod import cli
from egohod.config import Config
from egohod.distributed import Distributed, use_deterministic_algorithms
from egohod.loss.config import LossConfig
from egohod.model.config import ModelConfig, geometry
from egohod.model.dual_encoder import create_model
from egohod.training.step import TrainStep

VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The settings as they are without the knob, before and after."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    settings = torch.backends.cudnn.benchmark, torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark, torch.utils.deterministic.fill_uninitialized_memory = settings  # type: ignore[attr-defined]
    for name in VARIABLES:
        os.environ.pop(name, None)


@pytest.mark.usefixtures("unset")
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_knob_is_set_before_anything_is_computed(deterministic: bool) -> None:
    cfg = Config()
    cfg.train.device, cfg.train.deterministic = "cpu", deterministic
    with cli.joined(cfg):
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert torch.backends.cudnn.benchmark != deterministic
        # Not warn_only: what cannot be deterministic must not pass for it.
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        set_to = (":4096:8", "^NVLS,NVLSTree") if deterministic else (None, None)
        assert tuple(os.environ.get(name) for name in VARIABLES) == set_to


@pytest.mark.usefixtures("unset")
def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    use_deterministic_algorithms()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


class Operations(TorchDispatchMode):
    """Notes the names of all operations."""

    # By the documentation of torch.use_deterministic_algorithms these raise an error on a GPU.
    NOT_DETERMINISTIC = frozenset(
        {
            *(f"upsample_{mode}_backward" for mode in ("linear1d", "bilinear2d", "bicubic2d", "trilinear3d")),
            *(f"reflection_pad{n}d_backward" for n in (1, 2, 3)),
            *(f"fractional_max_pool{n}d_backward" for n in (2, 3)),
            *("avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward"),
            *("adaptive_max_pool2d_backward", "max_unpool2d", "max_unpool3d", "nll_loss2d_forward"),
            *(
                "_ctc_loss_backward",
                "_embedding_bag",
                "put_",
                "histc",
                "bincount",
                "median",
                "grid_sampler_2d_backward",
            ),
            *("grid_sampler_3d_backward", "scatter_reduce"),
        }
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operations_of_a_step(name: str, **model: Any) -> set[str]:
    cfg = Config(model=ModelConfig(name=name, num_frames=4, **model), loss=LossConfig(boxes=0.1))
    cfg.train.precision, cfg.model.fast.slow_frames = "fp32", 2
    side, here = geometry(name).image_size, Distributed(0, 1, torch.device("cpu"), None)
    step = TrainStep(create_model(cfg.model, cfg.loss), cfg, here, total_steps=10, steps_per_epoch=10)
    tokens = torch.randint(1, 49000, (2, 8))
    tokens[:, -1] = 49407
    video = torch.zeros(2, 3, 4, side, side, dtype=torch.uint8)
    with Operations() as operations:
        step(1, [{"video": video, "tokens": tokens, "boxes": torch.rand(2, 4, 3, 4)}])
    return operations.names


@pytest.mark.usefixtures("unset")
@pytest.mark.parametrize(
    ("name", "model"),
    [("DEMO", {"patch_dropout": 0.5}), ("DEMO_Slowfast", {"motion_stem": 8})],
    ids=["one path", "two"],
)
def test_a_step_has_no_operation_without_a_deterministic_algorithm(name: str, model: dict[str, Any]) -> None:
    use_deterministic_algorithms()
    names = operations_of_a_step(name, **model)
    assert len(names) > 50
    assert names & Operations.NOT_DETERMINISTIC == set()
    torch.use_deterministic_algorithms(False)
    # The slow path's temporal embedding, which would end the run.
    usual = operations_of_a_step(name, **model) & Operations.NOT_DETERMINISTIC
    assert usual == ({"upsample_linear1d_backward"} if name == "DEMO_Slowfast" else set())


@pytest.mark.usefixtures("unset")
@pytest.mark.parametrize("frames", [1, 3, 4, 16])
def test_the_temporal_embedding_is_interpolated_to_the_same_values(frames: int) -> None:
    torch.manual_seed(0)
    tower = create_model(ModelConfig(name="DEMO", num_frames=8)).visual
    torch.nn.init.normal_(tower.temporal_embedding)
    results = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        positions = tower.positions(frames)
        (gradient,) = torch.autograd.grad((positions**2).sum(), tower.temporal_embedding)
        results.append((positions, gradient))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-5)
