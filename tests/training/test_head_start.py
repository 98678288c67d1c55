"""Classification heads that start from the text tower."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from egohod import config
from egohod.data.dataset import Tokenizer
from egohod.data.formats import read_clips
from egohod.data.labels import class_space
from egohod.errors import UserError
from egohod.model.dual_encoder import create_model
from egohod.training.build import class_texts, start_from_text

ROWS = """video_id,start_second,end_second,text,label,place
a,0,1,#C C washes a cup,wash,sink
a,1,2,#C C washes a cup there,wash,table
b,0,1,#C C cuts bread,cut,table
"""


@pytest.mark.parametrize("kind", ["joint", "parts", "all"])
def test_heads_begin_as_the_zero_shot_classifier(tmp_path: Path, kind: str) -> None:
    (tmp_path / "labels.csv").write_text(ROWS)
    cfg = config.load(
        "configs/demo.yml",
        [
            f"data.train.demo.metadata={tmp_path}/labels.csv",
            "data.train.demo.format=hod",
            "data.train.demo.detections=null",
        ],
    )
    table = read_clips(cfg.data.train["demo"], extra=["label", "place"])
    space = class_space([table], ["label", "place"])
    texts = class_texts([table], space)
    assert [sorted(each) for each in texts] == [sorted({table.row(i).texts[0]}) for i in (2, 0, 1)]
    torch.manual_seed(0)
    model = create_model(cfg.model, cfg.loss, space.heads(kind)).eval()
    texts[0] = [*texts[0], "#C C cuts a slice"]
    start_from_text(model, space, texts, Tokenizer())
    video = torch.randn(2, 3, cfg.model.num_frames, 40, 40)
    with torch.no_grad():
        logits = model.classify(video)
        of_class = [F.normalize(model.encode_text(Tokenizer()(each)).mean(dim=0), dim=0) for each in texts]
        similarity = model.logit_scale.exp() * model.encode_video(video) @ torch.stack(of_class).T
        if kind != "parts":
            torch.testing.assert_close(logits["action"], similarity)
        if kind != "joint":
            # Classes in order: cut bread on the table, wash cup in the sink, wash cup on the table.
            washing = F.normalize(of_class[1] + of_class[2], dim=0)
            expected = model.logit_scale.exp() * model.encode_video(video) @ torch.stack([of_class[0], washing]).T
            torch.testing.assert_close(logits["label"], expected)


def test_a_text_tower_that_was_never_trained_starts_no_head() -> None:
    with pytest.raises(UserError, match=r"model\.head_start=text needs"):
        config.load(
            "configs/demo.yml",
            ["model.head_start=text", "model.heads=joint", "data.labels.target=class", "loss.name=classes"],
        )
