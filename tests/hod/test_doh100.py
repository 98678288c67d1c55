"""The 100DOH detector against numbers of the original's code, stage by stage, and the files that it opens."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from egohod.data import detections
from egohod.data.detections import LEFT, NO_CONTACT, RIGHT, SCHEMA, link_objects
from egohod.data.videos import VideoError
from egohod.errors import UserError
from egohod.hod.detectors import check_boxes, doh100, make_detector
from egohod.hod.detectors.doh100 import Detections, HandObjectNetwork
from egohod.hod.facts import facts_of
from tests.hod.doh100_recipe import GOLDEN, noise, picture, shapes, weight
from tests.support import Command


@pytest.fixture(scope="module")
def unit() -> dict[str, Tensor]:
    """Inputs and outputs of the original's functions."""
    with np.load(GOLDEN / "doh100_units.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files if file[name].dtype.kind != "U"}


def golden(name: str) -> dict[str, Any]:
    with np.load(GOLDEN / f"doh100_{name}.npz") as file:
        return {key: file[key] for key in file.files}


def size_of(info: Any) -> tuple[int, int]:
    height, width, _ = info[0].tolist()
    return int(height), int(width)


def close(actual: Tensor, expected: Any, atol: float = 1e-4) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=1e-5, atol=atol)


# --- Stages without weights ---


def test_anchors_are_the_originals(unit: dict[str, Tensor]) -> None:
    close(doh100.anchors(1, 1), unit["anchors"], 0)
    grid = doh100.anchors(3, 5)
    # By row, column, anchor.
    close(grid[(2 * 5 + 4) * 12 + 7], unit["anchors"][7] + torch.tensor([64, 32, 64, 32]), 0)


def test_boxes_are_decoded_and_cut_at_the_last_pixel(unit: dict[str, Tensor]) -> None:
    size = size_of(unit["dec_im_info"])
    parts = [doh100.decode(unit["dec_boxes"], each, size) for each in unit["dec_deltas"].split(4, dim=1)]
    close(torch.cat(parts, dim=1), unit["dec_clipped"])
    # A width is x2 - x1 + 1, and a box without deltas ends a pixel later than it did.
    close(doh100.decode(torch.tensor([[10.0, 20, 29, 39]]), torch.zeros(1, 4), (99, 99)), [[10.0, 20, 30, 40]])


def test_suppression_counts_the_last_pixels(unit: dict[str, Tensor]) -> None:
    for percent in (30, 70):
        kept = doh100.suppress(unit["nms_boxes"], unit["nms_scores"], percent / 100)
        assert kept.tolist() == unit[f"nms_keep_{percent}"].tolist()
    assert unit["nms_keep_30"].tolist() != unit["nms_keep_plain_wrong_30"].tolist()


def test_a_small_picture_has_proposals_of_zeros(unit: dict[str, Tensor]) -> None:
    rois = doh100.propose(unit["prop_logit"][0], unit["prop_delta"][0], size_of(unit["prop_im_info"]), 300)
    close(rois, unit["prop_rois"][:, 1:], 0.01)
    assert (rois[-1] == 0).all()


@pytest.mark.parametrize("shape", ["land", "port"])
def test_padded_regions_have_their_upper_limits_swapped(unit: dict[str, Tensor], shape: str) -> None:
    rois = unit[f"enl_{shape}_rois"][:, 1:]
    actual = doh100.enlarge(rois, size_of(unit[f"enl_{shape}_info"]))
    close(actual, unit[f"enl_{shape}_out"][:, 1:])
    if shape == "land":
        assert (actual[:, 2] < actual[:, 0]).any(), "some regions of a wide picture are inside out"


def test_regions_are_pooled_as_by_the_originals_kernel(unit: dict[str, Tensor]) -> None:
    features = torch.from_numpy(noise("ra_feat", (1, 6, 20, 25)).astype(np.float32))
    close(features.flatten()[:8], unit["ra_feat_first"], 1e-6)
    close(doh100.pool(features, unit["ra_rois"][:, 1:]), unit["ra_out"], 1e-5)


@torch.inference_mode()
def test_heads_of_contact_offset_and_side(unit: dict[str, Tensor]) -> None:
    heads = doh100._Extensions().eval()
    state = {name: torch.empty(0) for name in heads.state_dict()}
    heads.load_state_dict({n: weight(f"extension_layer.{n}", shapes()[f"extension_layer.{n}"]) for n in state})
    plain, padded = (
        torch.from_numpy(np.abs(noise(name, (6, 2048))).astype(np.float32)) for name in ("ext_fc7", "ext_fc7_padded")
    )
    close(heads.hand_contact_state_layer(padded), unit["ext_contact"])
    close(heads.offsets(padded), unit["ext_mag"])
    close(heads.hand_lr_layer(plain), unit["ext_lr"])


@pytest.mark.parametrize("name", ["a", "b"])
def test_pictures_are_resized_by_a_factor_with_a_cap(name: str) -> None:
    expected = golden(name)
    blob, scale = doh100.preprocess(torch.tensor(picture(name)[None]))
    assert scale == pytest.approx(expected["im_scale"][0], abs=1e-12)
    pixels = blob.permute(0, 2, 3, 1)
    assert list(pixels.shape) == expected["blob_shape"].tolist()
    close(pixels[0, :6, :6], expected["blob_nhwc_first6x6"])
    close(pixels[0, 7::61, 5::67], expected["blob_nhwc_stride"])
    close(pixels[0, -3:, -3:], expected["blob_nhwc_last3x3"])


@pytest.mark.parametrize("size", [(240, 427), (487, 640), (1080, 1920), (1801, 1203), (33, 1000), (700, 700)])
def test_resizing_is_that_of_opencv(size: tuple[int, int]) -> None:
    cv2 = pytest.importorskip("cv2")
    rgb = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    blob, scale = doh100.preprocess(torch.tensor(rgb[None]))
    bgr = rgb[..., ::-1].astype(np.float32) - np.array([102.9801, 115.9465, 122.7717], np.float32)
    expected = cv2.resize(bgr, None, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    close(blob[0].permute(1, 2, 0), expected, 2e-3)


# --- Rows ---


def detected(hands: np.ndarray, objects: np.ndarray) -> Detections:
    """Of rows as the original has them: box, score, state, magnitude, dx, dy, side."""
    h, o = torch.from_numpy(hands), torch.from_numpy(objects)
    numbers = torch.arange(len(h)), torch.arange(len(o))
    found = (o[:, :4], o[:, 4], numbers[1], h[:, :4], h[:, 4], numbers[0], h[:, 5].long(), h[:, 6:9], h[:, 9].long())
    return Detections(*found)


def test_hands_are_linked_to_the_objects_that_they_point_to(unit: dict[str, Tensor]) -> None:
    hands, objects = unit["as_hand"].numpy(), unit["as_obj"].numpy()
    width, height = 400, 300
    rows = doh100.rows_of(detected(hands, objects), width, height, "v", 7, 0.25)
    table = pd.DataFrame(rows)
    links = link_objects(table, width / height)
    expected = [each + len(hands) if each >= 0 else -1 for each in unit["as_match"].tolist()]
    assert links.tolist() == [*expected, *[-1] * len(objects)]
    assert table["side"].tolist() == [RIGHT, LEFT, LEFT, RIGHT, -1, -1, -1]
    # Nothing is touched, so no offset; an unknown one is NaN in every table.
    assert table["state"][1] == NO_CONTACT
    assert np.isnan(table["offset_x"].astype(float)[1])
    # 0.08 x 1,000 pixels along (0, -1).
    assert table["offset_y"][0] == pytest.approx(-80 / height)
    assert (table["frame_number"][0], table["second"][0], table["video_id"][0]) == (7, 0.25, "v")
    assert table["right"][4] == pytest.approx(60 / width)


def test_links_of_other_moments_and_of_hands_without_offset() -> None:
    box = {"left": 0.1, "top": 0.1, "right": 0.2, "bottom": 0.2, "video_id": "v", "score": 0.9, "name": None}
    hand = box | {"kind": "hand", "side": LEFT, "state": 3, "offset_x": 0.1, "offset_y": 0.0, "second": 1.0}
    thing = box | {"kind": "object", "side": -1, "state": -1, "offset_x": None, "offset_y": None, "second": 1.0}
    table = pd.DataFrame(
        [hand, thing | {"second": 2.0}, hand | {"second": 2.0, "offset_x": None}, hand | {"second": 3}]
    )
    assert link_objects(table).tolist() == [-1, -1, -1, -1]
    assert link_objects(table.iloc[:0]).tolist() == []
    # Several hands may touch one object; of equally near ones the first.
    both = pd.DataFrame([hand, hand | {"side": RIGHT}, thing, thing])
    assert link_objects(both).tolist() == [2, 2, -1, -1]


def test_contact_of_the_detector_reaches_the_facts() -> None:
    box = [100.0, 100, 200, 200, 0.9, 3, 0.05, 0.1, 0, 1]
    thing = [150.0, 100, 250, 200, 0.8, 0, 0, 0, 0, 0]
    rows = [
        each
        for frame in range(6)
        for each in doh100.rows_of(
            detected(np.array([box]), np.array([thing])), 400, 300, "v", frame, (frame + 0.5) / 6
        )
    ]
    table = check_boxes(pa.Table.from_pylist(rows, SCHEMA), "doh100")
    facts = facts_of(table, (np.arange(6) + 0.5) / 6, video_id="v", start=0, end=1)
    assert facts.hands["right"].contact == 0
    assert facts.hands["right"].touches == "object"


def test_boxes_are_written_as_epic_kitchens_publishes_them(unit: dict[str, Tensor], tmp_path: Path) -> None:
    rows = doh100.rows_of(detected(unit["as_hand"].numpy(), unit["as_obj"].numpy()), 400, 300, "P01/P01_01", 7, 0.25)
    (path,) = detections.write_epic(pa.Table.from_pylist(rows, SCHEMA), tmp_path)
    assert path == tmp_path / "P01" / "P01_01.pkl"
    read = detections.read_epic(path, fps=30).to_pandas()
    pd.testing.assert_frame_equal(
        read.drop(columns="name"), pa.Table.from_pylist(rows, SCHEMA).to_pandas().drop(columns="name")
    )
    # By the pipeline: under the name with its folder, as egohod hod detect writes it, and by EPIC's without.
    files = make_detector("detections", {"path": str(tmp_path), "fps": 30})
    for video_id in ("P01/P01_01", "P01_01"):
        assert len(files.detect(video_id, np.array([7]), np.array([0.25]), None)) == len(rows)
    # A write that fails leaves the file as it was.
    before = path.read_bytes()
    with pytest.raises(UserError, match="cannot name a file"):
        detections.write_epic(pa.Table.from_pylist([*rows, rows[0] | {"video_id": "../x"}], SCHEMA), tmp_path)
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == ["P01_01.pkl"]


# --- Files ---


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Every weight of a checkpoint, each of one repeated number, so that files of them are small."""
    return {
        name: torch.zeros(shape, dtype=torch.int64) if name.endswith("tracked") else torch.full([], 0.01).expand(shape)
        for name, shape in shapes().items()
    }


def saved(path: Path, state: dict[str, Tensor], **more: Any) -> Path:
    """A checkpoint as the original's training code saves it."""
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    content = {"session": 1, "epoch": 8, "model": state, "optimizer": optimizer, "pooling_mode": "align"}
    torch.save(content | {"class_agnostic": False} | more, path)
    return path


def test_names_and_shapes_are_those_of_the_checkpoints() -> None:
    with torch.device("meta"):
        network = HandObjectNetwork()
    assert {name: list(value.shape) for name, value in network.state_dict().items()} == shapes()


def test_a_checkpoint_of_the_original_is_loaded(state: dict[str, Tensor], tmp_path: Path) -> None:
    value = torch.full([], 0.25).expand(3, 2048)
    whole = state | {"RCNN_cls_score.weight": value}
    # The published files are of a release of PyTorch that counted no batches.
    lean = {name: each for name, each in whole.items() if not name.endswith("num_batches_tracked")}
    torch.save({"model": lean, "pooling_mode": "align"}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    files = [saved(tmp_path / "faster_rcnn_1_8_132028.pth", whole), tmp_path / "old.pth", tmp_path / "plain.pth"]
    torch.save({f"module.{name}": each for name, each in whole.items()}, files[2])
    with torch.device("meta"):
        network = HandObjectNetwork()
    network.to_empty(device="cpu")
    for path in files:
        torch.nn.init.zeros_(network.RCNN_cls_score.weight)
        doh100.load_weights(network, path)
        assert (network.RCNN_cls_score.weight == 0.25).all()


class Malicious:
    """Runs code where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_files_that_are_no_such_checkpoint_are_refused(state: dict[str, Tensor], tmp_path: Path) -> None:
    def refuses(pattern: str, changed: dict[str, Tensor] | None = None, **more: Any) -> None:
        path = saved(tmp_path / "weights.pth", state | (changed or {}), **more)
        with pytest.raises(UserError, match=rf"^{path}: .*{pattern}"):
            make_detector("doh100", {"weights": str(path)})

    def ones(*shape: int) -> Tensor:
        return torch.ones([]).expand(shape)

    refuses("pooling_mode 'crop'; only 'align'", pooling_mode="crop")
    refuses("pooling_mode 'pool'; only 'align'", pooling_mode="pool")
    refuses(r"one box for all classes \(class_agnostic\)", class_agnostic=True)
    refuses(r"one box for all classes \(class_agnostic\)", {"RCNN_bbox_pred.weight": ones(4, 2048)})
    refuses("has 21 classes instead of 3", {"RCNN_cls_score.weight": ones(21, 2048)})
    refuses("on VGG-16; only ResNet-101", {"RCNN_base.0.weight": ones(64, 3, 3, 3)})
    refuses(r"holds more than 1 of its weights, such as RCNN_base.6.23.conv1", {"RCNN_base.6.23.conv1.weight": ones(2)})
    refuses(r"hand_lr_layer.bias is \[2\] instead of \[1\]", {"extension_layer.hand_lr_layer.bias": ones(2)})
    refuses("RCNN_base.1.bias has numbers that are not finite", {"RCNN_base.1.bias": torch.full([64], np.nan)})
    plain = {name: each for name, each in state.items() if "extension_layer" not in name}
    torch.save({"model": plain}, tmp_path / "plain.pth")
    with pytest.raises(UserError, match=r"lacks 8 of its weights, such as extension_layer\.hand_contact_state_layer"):
        make_detector("doh100", {"weights": str(tmp_path / "plain.pth")})
    torch.save({"model": {"conv1.weight": torch.ones(2)}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"no checkpoint of the 100DOH detector: .*it has conv1\.weight"):
        make_detector("doh100", {"weights": str(tmp_path / "other.pth")})
    with pytest.raises(UserError, match=r"absent\.pth: no such file"):
        make_detector("doh100", {"weights": str(tmp_path / "absent.pth")})


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_a_checkpoint_is_refused_and_not_run(state: dict[str, Tensor], is_zip: bool, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    content = {"model": state, "pooling_mode": Malicious(tmp_path / "was_run")}
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UserError, match="nothing was run"):
        make_detector("doh100", {"weights": str(path)})
    assert not (tmp_path / "was_run").exists()


def test_options_that_are_out_of_range() -> None:
    for options, pattern in (
        ({}, "needs weights"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"proposals": 0}, "proposals must be at least 1"),
        ({"min_hand_score": 1.5}, "min_hand_score must be from 0 to 1"),
        ({"min_object_score": -1}, "min_object_score must be from 0 to 1"),
        ({"precision": "float16"}, "precision is 'float16'"),
    ):
        with pytest.raises(UserError, match=pattern):
            make_detector("doh100", {"weights": "random"} | options if options else {})


# --- The whole network ---


@pytest.fixture(scope="module")
def network() -> HandObjectNetwork:
    """With the weights of the goldens."""
    with torch.device("meta"):
        network = HandObjectNetwork()
    network.to_empty(device="cpu").load_state_dict({name: weight(name, shape) for name, shape in shapes().items()})
    return network.eval()


@pytest.mark.ci
@pytest.mark.parametrize("name", ["a", "b"])
@torch.inference_mode()
def test_every_stage_of_the_network_is_the_originals(network: HandObjectNetwork, name: str) -> None:
    expected = golden(name)
    blob, scale = doh100.preprocess(torch.tensor(picture(name)[None]))
    size = blob.shape[2], blob.shape[3]
    x = blob
    for number, layer in enumerate(network.RCNN_base):
        x = layer(x)
        if stage := {0: "conv1", 3: "maxpool", 4: "layer1", 5: "layer2", 6: "base_feat"}.get(number):
            assert list(x.shape) == expected[f"{stage}_shape"].tolist()
            y = x.double()
            stats = torch.stack([y.mean(), y.std(), y.min(), y.max(), y.abs().sum()])
            torch.testing.assert_close(stats, torch.from_numpy(expected[f"{stage}_stats"]), rtol=1e-4, atol=1e-4)
            if stage == "base_feat":
                close(x[0, ::64, ::5, ::7], expected["base_feat_slice"])
            else:
                step = {"conv1": 60, "maxpool": 30, "layer1": 30, "layer2": 15}[stage]
                close(x[0, :: x.shape[1] // 8, ::step, ::step], expected[f"{stage}_slice"])
    scores, deltas = network.RCNN_rpn(x)
    close(scores[0, :, ::6, ::8], expected["rpn_cls_score_slice"])
    close(deltas[0, :, ::6, ::8], expected["rpn_bbox_pred_slice"])
    # As sets: where scores tie, their order is the machine's.
    proposed = doh100.propose(scores[0], deltas[0], size, 300)
    rois = torch.from_numpy(expected["rois"][:, 1:])
    distance = (proposed[:, None] - rois).abs().amax(dim=2)
    assert (distance.amin(dim=0) < 0.05).all()
    assert (distance.amin(dim=1) < 0.05).all()
    # The head with the original's regions.
    padded_rois = doh100.enlarge(rois, size)
    close(padded_rois, expected["rois_padded"][:, 1:], 1e-3)
    chosen = expected["roi_select"]
    close(doh100.pool(x, rois[chosen])[:, ::128], expected["pooled_slice"], 1e-3)
    close(doh100.pool(x, padded_rois[chosen])[:, ::128], expected["pooled_padded_slice"], 1e-3)
    plain, padded = network.pool_and_embed(x, rois), network.pool_and_embed(x, padded_rois)
    close(plain[:, ::64], expected["fc7_slice"], 1e-3)
    close(padded[:, ::64], expected["fc7_padded_slice"], 1e-3)
    close(network.RCNN_cls_score(plain), expected["cls_score"], 1e-3)
    close(network.RCNN_bbox_pred(plain), expected["bbox_pred"], 1e-3)
    close(network.extension_layer.hand_contact_state_layer(padded), expected["contact_logits"], 1e-3)
    close(network.extension_layer.offsets(padded), expected["mag_dxdy"], 1e-3)
    close(network.extension_layer.hand_lr_layer(plain), expected["lr_logit"], 1e-3)
    boxes = doh100.decode_detections(rois, network.RCNN_bbox_pred(plain), size) / scale
    close(boxes, expected["pred_boxes"], 0.01)


@pytest.mark.ci
@pytest.mark.parametrize(("name", "threshold"), [("a", "t50"), ("b", "t10")])
@torch.inference_mode()
def test_detections_are_the_originals(network: HandObjectNetwork, name: str, threshold: str) -> None:
    expected, score = golden(name), int(threshold[1:]) / 100
    # As the detector runs it.
    channels_last = network.to(memory_format=torch.channels_last)
    (found,) = channels_last(torch.tensor(picture(name)[None]), score, score)
    hands, objects = expected[f"hand_dets_{threshold}"], expected[f"obj_dets_{threshold}"]
    close(found.hands, hands[:, :4], 0.01)
    close(found.objects, objects[:, :4], 0.01)
    close(found.hand_scores, hands[:, 4])
    close(found.object_scores, objects[:, 4])
    assert found.states.tolist() == hands[:, 5].tolist()
    close(found.offsets, hands[:, 6:9])
    assert found.sides.tolist() == hands[:, 9].tolist()
    assert found.hand_rois.tolist() == expected[f"hand_roi_idx_{threshold}"].tolist()
    assert found.object_rois.tolist() == expected[f"obj_roi_idx_{threshold}"].tolist()
    height, width = picture(name).shape[:2]
    links = link_objects(pd.DataFrame(doh100.rows_of(found, width, height, "v", 0, 0.0)), width / height)
    matches = [each + len(hands) if each >= 0 else -1 for each in expected[f"hand_to_obj_{threshold}"].tolist()]
    assert links[: len(hands)].tolist() == matches


@pytest.mark.ci
@torch.inference_mode()
def test_bfloat16_moves_boxes_and_scores_a_little(network: HandObjectNetwork) -> None:
    """With the original's regions, since random weights rank regions by chance."""
    for name in ("a", "b"):
        expected = golden(name)
        blob, scale = doh100.preprocess(torch.tensor(picture(name)[None]))
        rois = torch.from_numpy(expected["rois"][:, 1:])
        with torch.autocast("cpu", torch.bfloat16):
            features = network.RCNN_base(blob)
        plain = network.pool_and_embed(features.float(), rois, torch.bfloat16)
        scores = (network.RCNN_cls_score(plain).softmax(dim=1) - torch.from_numpy(expected["cls_prob"])).abs()
        boxes = doh100.decode_detections(rois, network.RCNN_bbox_pred(plain), (blob.shape[2], blob.shape[3])) / scale
        moved = (boxes - torch.from_numpy(expected["pred_boxes"])).abs()
        print(name, f"scores: mean {scores.mean():.4f}, max {scores.max():.4f}")
        print(name, f"boxes: mean {moved.mean():.3f}, max {moved.max():.3f} pixels")
        assert 0 < scores.mean() < 0.02
        assert 0 < moved.mean() < 1


@pytest.mark.ci
def test_frames_of_a_clip_are_detected_as_one_by_one() -> None:
    options = {"weights": "random", "batch_size": 2, "proposals": 20, "min_hand_score": 0, "min_object_score": 0}
    detector = make_detector("doh100", options)
    pictures = np.stack([picture("a"), picture("a")[:, ::-1], picture("a")[::-1]])
    numbers, seconds = np.arange(3), np.arange(3) / 10
    together = detector.detect("v", numbers, seconds, pictures)
    check_boxes(together, "doh100")
    assert set(together["frame_number"].to_pylist()) == {0, 1, 2}
    for i in range(3):
        one = detector.detect("v", numbers[i : i + 1], seconds[i : i + 1], pictures[i : i + 1]).to_pandas()
        mine = together.to_pandas().query("frame_number == @i").reset_index(drop=True)
        pd.testing.assert_frame_equal(one, mine, atol=1e-4)


def test_random_weights_are_announced_and_detect_something(caplog: pytest.LogCaptureFixture) -> None:
    before = torch.get_rng_state()
    detector = make_detector("doh100", {"weights": "random", "proposals": 10, "min_hand_score": 0})
    assert "random weights, boxes mean nothing" in caplog.text
    assert torch.equal(torch.get_rng_state(), before)
    table = check_boxes(detector.detect("v", np.array([3]), np.array([0.1]), picture("a")[None]), "doh100")
    assert len(table)
    # A panorama of one line has no features.
    with pytest.raises(VideoError, match="2000 x 20 pixels are too narrow"):
        detector.detect("v", np.array([3]), np.array([0.1]), np.zeros((1, 20, 2000, 3), np.uint8))


@pytest.mark.ci
def test_the_pipeline_narrates_a_real_clip(shared: Path, tmp_path: Path, program: Command) -> None:
    video = "3c0dffd0-e38e-4643-bc48-d513943dc20b_012_014"
    (tmp_path / "clips.csv").write_text(
        f"video_id,start_second,end_second,text\n{video},0,2,#C C stirs the food in the pan\n"
    )
    done = program(
        *("tools/generate_hod.py", "--metadata", tmp_path / "clips.csv", "--root", shared / "media" / "lavila"),
        *("--output", tmp_path / "hod.csv", "detector.kind=doh100", "detector.options.weights=random", "frames=2"),
        *("detector.options.proposals=30", "workers=1"),
    )
    assert done.returncode == 0, done.stderr
    assert "random weights" in done.stderr
    assert "stirs" in (tmp_path / "hod.csv").read_text()
