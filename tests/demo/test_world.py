"""The demo world's annotations must match its pictures."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest

from egohod.data.detections import NO_CONTACT, PORTABLE_OBJECT
from egohod.demo import world
from egohod.demo.render import CANVAS, MARGIN, PICTURE, SHRINK, Stage, frame_time
from egohod.demo.world import (
    CLIP_FRAMES,
    CLIPS_PER_VIDEO,
    DEFAULT,
    EVENT_SECONDS,
    FEW,
    FPS,
    SPLITS,
    VERBS,
    VERSIONS,
    Clip,
    Variant,
    event_range,
    make_split,
    make_video,
    phrase,
)
from egohod.demo.write import questions

PAIRED = sorted({(verb.name, verb.opposite) for verb in VERBS.values() if verb.opposite and not verb.backwards})


def _take(verb: str, noun: str, **changes: object) -> Clip:
    """A clip of a verb, alike in all but what is changed."""
    base = make_video(0, "train", 0).clips[0]
    brief = VERBS[verb].brief
    plain = {
        "verb": verb,
        "noun": noun,
        "hand": "right",
        "other": "absent",
        "distractors": (),
        "frames": 30,
        "speed": 1,
    }
    return dataclasses.replace(
        base, **(plain | {"begin": 0.9 if brief else 0.243, "end": 0.243, "size": 1.0} | changes)
    )


def _states(clip: Clip, times: np.ndarray) -> np.ndarray:
    """All that a frame shows of the motion, one row a moment."""
    rows = [world.pose(clip, float(t)) for t in times]
    return np.array(
        [
            (*p.hand, *p.object, p.depth, p.turn, *(p.lid or (0, 0)), p.height, p.touching, p.grip == "open")
            for p in rows
        ]
    )


def test_there_are_as_many_verbs_nouns_and_actions_as_promised() -> None:
    assert len(VERBS) == 18
    assert len({noun for _, noun in DEFAULT.actions}) == 12
    assert 100 <= len(DEFAULT.actions) <= 130
    assert len(PAIRED) == 8


@pytest.mark.parametrize("verbs", [pair for pair in PAIRED if pair[0] != "tap once"])
def test_the_second_verb_of_a_pair_is_the_first_one_backwards(verbs: tuple[str, str]) -> None:
    first, second = (_take(verb, VERBS[verb].nouns[0]) for verb in verbs)
    times = np.array([frame_time(i) for i in range(first.frames)])
    if VERBS[first.verb].brief:  # the event in the middle, as its mirror image is
        first, second = (dataclasses.replace(c, begin=(c.seconds - EVENT_SECONDS) / 2) for c in (first, second))
    forward, backward = _states(first, times), _states(second, times)
    np.testing.assert_allclose(backward, forward[::-1], atol=1e-9)
    assert np.abs(forward - backward)[:, :4].max() > 0.2  # and still they differ, by a fifth of the picture or more


@pytest.mark.parametrize("verbs", [pair for pair in PAIRED if VERBS[pair[0]].brief])
def test_a_single_frame_tells_nothing_about_the_direction_of_a_brief_event(verbs: tuple[str, str]) -> None:
    columns = []
    for verb in verbs:
        clip = _take(verb, VERBS[verb].nouns[0])
        times = clip.begin + (np.arange(20_000) + 0.5) / 20_000 * EVENT_SECONDS
        columns.append(np.sort(_states(clip, times), axis=0))
    np.testing.assert_allclose(columns[0][:, :-2], columns[1][:, :-2], atol=2e-3)
    np.testing.assert_allclose(columns[0].mean(0), columns[1].mean(0), atol=2e-3)  # contact and grip are yes or no


@pytest.mark.parametrize("verb", [verb.name for verb in VERBS.values() if verb.brief])
def test_a_brief_event_ends_where_it_began(verb: str) -> None:
    clip = _take(verb, VERBS[verb].nouns[0])
    before, after = _states(clip, np.array([0.0, clip.seconds]))
    np.testing.assert_allclose(before, after, atol=1e-9)


@pytest.mark.parametrize("verb", [verb.name for verb in VERBS.values() if verb.kind != "none"])
def test_motions_are_large(verb: str) -> None:
    for noun in VERBS[verb].nouns:
        clip = _take(verb, noun, size=0.9)
        hand = _states(clip, np.linspace(0, clip.seconds, 400))[:, :2]
        assert max(np.ptp(hand, axis=0)) >= 0.24, (verb, noun)


def _segments(frames: int, n: int) -> list[int]:
    """Uniform frames of a clip, as all evaluations take them."""
    step = (frames - 1) / n
    return [(round(step * i) + round(step * (i + 1))) // 2 for i in range(n)]


@pytest.mark.parametrize("frames", range(CLIP_FRAMES[0], CLIP_FRAMES[1] + 1))
def test_four_frames_miss_a_brief_event_that_sixteen_see(frames: int) -> None:
    few, many = ([frame_time(i) for i in _segments(frames, n)] for n in (4, 16))
    for begin in np.linspace(*event_range(frames), 97):
        inside = [sum(begin + 1e-9 < t < begin + EVENT_SECONDS - 1e-9 for t in times) for times in (few, many)]
        assert inside[0] <= 1
        assert inside[1] >= 3


@pytest.mark.parametrize("verbs", [pair for pair in PAIRED if VERBS[pair[0]].brief])
@pytest.mark.parametrize("frames", range(CLIP_FRAMES[0], CLIP_FRAMES[1] + 1))
def test_none_of_four_frames_hints_at_the_direction(frames: int, verbs: tuple[str, str]) -> None:
    """Over all moments at which the event may happen, each of the four frames shows the same under both verbs."""
    noun = VERBS[verbs[0]].nouns[0]
    begins = np.linspace(*event_range(frames), 401)
    for index in _segments(frames, 4):
        seen = []
        for verb in verbs:
            clip = _take(verb, noun, frames=frames)
            clips = (dataclasses.replace(clip, begin=float(begin)) for begin in begins)
            poses = [world.pose(clip, frame_time(index)) for clip in clips]
            seen.append(np.sort([(*pose.hand, *pose.object) for pose in poses], axis=0))
        np.testing.assert_allclose(seen[0], seen[1], atol=0.01)


def test_narrations_tell_the_truth() -> None:
    vague = total = 0
    for video in make_split(0, "val", 1.0):
        for clip in video.clips:
            verb = VERBS[clip.verb]
            assert clip.noun in verb.nouns
            assert clip.hod.startswith("#C C ")
            assert clip.narration.startswith("#C C ")
            colour = video.kitchen.nouns[clip.noun]
            words = phrase(clip.verb, clip.noun).removeprefix("#C C ")
            assert words in clip.hod.replace(f"the {colour} {clip.noun}", f"the {clip.noun}")
            assert f"the {clip.hand} hand" in clip.hod
            assert len(clip.hod.split()) <= 32
            other = "left" if clip.hand == "right" else "right"
            if f"the {other} hand" in clip.hod:
                assert {"rest": "rests", "absent": "stays out of sight"}.get(
                    clip.other, f"holds the {clip.other}"
                ) in clip.hod
            telling = {"left", "right", "clockwise", "counterclockwise", "away", "back", "once", "twice", "up", "down"}
            assert not telling & set(clip.narration.split())
            vague += not clip.narration.startswith("#C C " + verb.coarse.split()[0])
            total += 1
    assert 0.35 < vague / total < 0.65


def test_splits_share_no_looks_and_no_seed() -> None:
    looks = {split: [v.kitchen for v in make_split(0, split, 1.0)] for split in SPLITS}
    for part in ("name", "seed", "counter", "sleeve"):
        values = [{getattr(kitchen, part) for kitchen in looks[split]} for split in SPLITS]
        assert not (values[0] & values[1] | values[0] & values[2] | values[1] & values[2]), part
    hands = [{(kitchen.skin, kitchen.sleeve) for kitchen in looks[split]} for split in SPLITS]
    assert not (hands[0] & hands[1] | hands[0] & hands[2] | hands[1] & hands[2])


@pytest.mark.parametrize(("split", "least"), [("train", 800), ("val", 120), ("test", 200)])
def test_a_split_has_its_clips_and_enough_of_each_kind(split: str, least: int) -> None:
    clips = [clip for video in make_split(0, split, 1.0) for clip in video.clips]
    assert len(clips) == SPLITS[split]
    kinds = [VERBS[clip.verb].kind for clip in clips]
    assert kinds.count("state_changing") >= least
    assert kinds.count("transient") >= least
    hands = [clip.hand for clip in clips]
    assert 0.35 < hands.count("left") / len(hands) < 0.65
    if split == "train":
        assert {(clip.verb, clip.noun) for clip in clips} == set(DEFAULT.actions)


def test_both_verbs_of_a_pair_come_equally_often() -> None:
    clips = [clip for video in make_split(3, "train", 0.1) for clip in video.clips]
    assert len(clips) % CLIPS_PER_VIDEO == 0
    for first, second in PAIRED:
        assert sum(c.verb == first for c in clips) == sum(c.verb == second for c in clips)


def test_frames_follow_from_the_seed() -> None:
    def first_frames(seed: int) -> np.ndarray:
        frames = Stage(make_video(seed, "val", 0, 1)).frames()
        return np.stack([next(frames) for _ in range(3)])

    once, again, other = first_frames(5), first_frames(5), first_frames(6)
    assert once.shape == (3, CANVAS[1] // SHRINK, CANVAS[0] // SHRINK, 3)
    np.testing.assert_array_equal(once, again)
    assert np.abs(once.astype(int) - other).mean() > 5


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("number", range(3))
def test_true_boxes_enclose_what_is_drawn(number: int, version: int) -> None:
    """The hands are painted in a colour that nothing else has; its pixels are then the hand."""
    video, grey = make_video(1, "train", number, 6, Variant(version=version)), (90, 90, 90)
    looks = {"skin": (255, 0, 255), "sleeve": (0, 90, 0), "counter": grey, "wall": grey, "patches": ()}
    kitchen = dataclasses.replace(video.kitchen, **looks, nouns=dict.fromkeys(video.kitchen.nouns, "green"))
    clips = tuple(dataclasses.replace(clip, other="absent", distractors=()) for clip in video.clips)
    # Blur would widen a hand; its box is that of the middle of the exposure.
    sharp = dataclasses.replace(video.realism, exposure=0.0)
    stage = Stage(dataclasses.replace(video, kitchen=kitchen, clips=clips, realism=sharp))
    for clip in clips:
        for t in (0.3, 1.1, 1.9):
            picture = np.asarray(stage.draw(clip, t)).astype(int)
            hand = (picture[..., 0] > picture[..., 1] + 50) & (picture[..., 2] > picture[..., 1] + 50)
            rows, columns = np.nonzero(hand)
            moment = stage.moment(clip, t)
            seen = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            box = np.multiply(moment.box(clip.hand) or np.nan, (*PICTURE, *PICTURE))
            assert (box[:2] <= np.add(seen[:2], 1)).all()
            assert (box[2:] >= np.subtract(seen[2:], 1)).all()
            # A turned fingertip at the border is too thin to be seen in full.
            np.testing.assert_allclose(box, seen, atol=1 if version == 5 else 2)
            assert moment.box("left" if clip.hand == "right" else "right") is None


def test_truth_tells_boxes_contact_and_what_is_touched() -> None:
    video = make_video(2, "test", 0)
    truth = pd.DataFrame(Stage(video).truth())
    clip = next(clip for clip in video.clips if VERBS[clip.verb].path in ("slide", "push"))
    of_clip = truth[truth["frame_number"].between(clip.start, clip.start + clip.frames - 1)]
    acting = of_clip[(of_clip["kind"] == "hand") & (of_clip["side"] == ("left", "right").index(clip.hand))]
    states = dict(zip(acting["frame_number"] - clip.start, acting["state"], strict=True))
    assert states[0] == states[clip.frames - 1] == NO_CONTACT
    assert states[clip.frames // 2] == PORTABLE_OBJECT
    touching = acting[acting["state"] == PORTABLE_OBJECT].set_index("frame_number")
    assert touching[["offset_x", "offset_y"]].notna().all(axis=None)
    objects = of_clip[of_clip["kind"] == "object"].set_index("frame_number").loc[touching.index]
    for offset, low, high in (("offset_x", "left", "right"), ("offset_y", "top", "bottom")):
        pointed = (touching[low] + touching[high]) / 2 + touching[offset]
        np.testing.assert_allclose(pointed, (objects[low] + objects[high]) / 2)
    assert (truth.groupby("frame_number")["kind"].value_counts().unstack()["object"] == 1).all()
    assert truth[["left", "top", "right", "bottom"]].stack().between(0, 1).all()


def test_a_variant_has_fewer_objects_and_longer_motions() -> None:
    few, far = Variant(objects=4), Variant(reach=1.5)
    assert {noun for clip in clips_of(few) for noun in (clip.noun, *(name for name, *_ in clip.distractors))} == set(
        FEW
    )
    assert {verb for verb, _ in few.actions} == set(VERBS)
    assert [(clip.verb, clip.noun) for clip in clips_of(far)] == [(clip.verb, clip.noun) for clip in clips_of(DEFAULT)]
    for short, long in zip(clips_of(DEFAULT), clips_of(far), strict=True):
        assert long.size == pytest.approx(1.5 * short.size)


@pytest.mark.parametrize("frames", range(CLIP_FRAMES[0], CLIP_FRAMES[1] + 1))
def test_without_spread_four_frames_see_nothing_of_a_brief_event(frames: int) -> None:
    begin, latest = event_range(frames, spread=0)
    assert begin == latest
    few, many = (np.array([frame_time(i) for i in _segments(frames, n)]) - begin for n in (4, 16))
    assert not ((few > 1e-9) & (few < EVENT_SECONDS - 1e-9)).any()
    assert ((many > 0) & (many < EVENT_SECONDS)).sum() >= 3


def test_without_spread_four_frames_see_nothing_in_any_version() -> None:
    for clip in clips_of(Variant(event_spread=0)):
        if VERBS[clip.verb].brief:
            few = np.array([frame_time(i) for i in _segments(clip.frames, 4)]) - clip.begin
            assert not ((few > 1e-9) & (few < clip.event_seconds - 1e-9)).any()


def test_a_variant_can_leave_nothing_but_the_motion_to_tell_of() -> None:
    assert {clip.other for clip in clips_of(Variant(idle_rests=True))} == {"rest"}
    assert len({clip.other for clip in clips_of(DEFAULT)}) > 2


def test_few_objects_ask_no_object_question_without_an_alternative() -> None:
    """With four objects there is a verb that only one of them suits."""
    videos = [make_video(0, "val", number, variant=Variant(objects=4)) for number in range(10)]
    kinds = [question["kind"] for question in questions(videos, np.random.default_rng(0))]
    holding = sum(clip.verb == "hold" for video in videos for clip in video.clips)
    assert holding > 0
    assert kinds.count("object") == sum(len(video.clips) for video in videos) - holding


def clips_of(variant: Variant) -> list[Clip]:
    return [clip for number in range(4) for clip in make_video(0, "train", number, variant=variant).clips]


def test_the_camera_never_leaves_the_counter() -> None:
    for number in range(5):
        for clip in make_video(0, "train", number).clips:
            assert max(clip.sway[:2]) * CANVAS[0] < MARGIN
    # The worst case of version 6, in which a pixel beyond the counter would be black.
    shift, counter = (0.012, 0.012, 0.0, 0.0), (255, 255, 255)
    ways = itertools.product((Variant(), Variant(roll=20, zoom=30)), (-1, 1), (-1, 1), (-1, 1))
    for variant, turn, side, down in ways:
        video = make_video(0, "train", 0, 1, variant)
        kitchen = dataclasses.replace(video.kitchen, counter=counter, wall=counter, patches=())
        lens = (turn * video.realism.roll, video.realism.zoom[0], *[0.0] * 6)
        sway = (*shift, side * math.pi / 2, down * math.pi / 2)
        clip = dataclasses.replace(video.clips[0], lens=lens, sway=sway, other="absent", distractors=())
        stage = Stage(dataclasses.replace(video, kitchen=kitchen, clips=(clip,)))
        picture = np.asarray(stage.draw(clip, 0.0))
        assert picture[0].min() > 0
        assert picture[:, 0].min() > 0
        assert picture[:, -1].min() > 0
        assert picture[:20].min() > 0


# --------------------------------------------------------------------------------------------------
# Versions
# --------------------------------------------------------------------------------------------------


def _differences(version: int) -> Iterator[tuple[Clip, Clip]]:
    """Each clip in version 5 and in another."""
    for number in range(5):
        old, new = (make_video(0, "train", number, variant=Variant(version=v)) for v in (5, version))
        yield from zip(old.clips, new.clips, strict=True)


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (5, ["d11f470f623ca5a5", "9ee5f0d147bd6577", "5b64602a14124875"]),
        (6, ["3cf8bd0a5ace004c", "85d3a11dd76ccc01", "a09c2388310bf436"]),
    ],
)
def test_frames_are_unchanged(version: int, expected: list[str]) -> None:
    digests = []
    for seed, split, number in ((0, "train", 0), (1, "val", 3), (4, "test", 0)):
        digest = hashlib.sha256()
        for frame in Stage(make_video(seed, split, number, 4, Variant(version=version))).frames():
            digest.update(frame.tobytes())
        digests.append(digest.hexdigest()[:16])
    assert digests == expected


def test_versions_have_the_same_takes_and_captions() -> None:
    for old, new in _differences(6):
        for name in ("uid", "start", "frames", "verb", "noun", "hand", "other", "narration", "hod", "centre", "sway"):
            assert getattr(old, name) == getattr(new, name)


def test_version_6_varies_speed_and_moment_and_keeps_events_inside() -> None:
    lengths, begins, shares = list[float](), list[float](), list[float]()
    for old, new in _differences(6):
        verb, (slowest, fastest) = VERBS[new.verb], VERSIONS[6].speed
        assert slowest <= new.speed <= (1 if verb.path == "tap" else fastest)
        assert old.speed == 1
        if verb.brief:
            few = [frame_time(i) for i in _segments(new.frames, 4)]
            assert few[0] - 1e-9 <= new.begin
            assert new.begin + new.event_seconds <= few[-1] + 1e-9
            before, after = _states(new, np.array([0.0, new.seconds]))
            np.testing.assert_allclose(before, after, atol=1e-9)
            lengths.append(new.event_seconds)
            begins.append(new.begin)
        elif verb.kind == "state_changing":
            assert min(new.begin, new.end) >= 0.15 - 1e-9
            shares.append(1 - new.begin - new.end)
    assert min(lengths) < 0.5 < 0.75 < max(lengths)
    assert np.ptp(begins) > 0.8
    assert min(shares) < 0.4 < 0.6 < max(shares)


def test_version_6_has_clutter_and_a_camera_within_its_bounds() -> None:
    more, rolls, zooms = 0, list[float](), list[float]()
    for old, new in _differences(6):
        nouns = [noun for noun, *_ in new.distractors]
        assert not {new.noun, new.other} & set(nouns)
        assert len(set(nouns)) == len(nouns) <= 5
        assert set(old.distractors) <= set(new.distractors)
        more += len(nouns) - len(old.distractors)
        for t in np.linspace(0, new.seconds, 9):
            roll, zoom = world.lens(new, float(t))
            rolls.append(math.degrees(roll))
            zooms.append(zoom)
        assert world.lens(old, 0.0) == (0.0, 1.0)
    assert more > 100
    assert -10 <= min(rolls) < -6 < 6 < max(rolls) <= 10
    assert 0.9 <= min(zooms) < 0.95 < 1.1 < max(zooms) <= 1.15
    patches = [len(make_video(0, "train", number).kitchen.patches) for number in range(10)]
    assert 3 <= min(patches) < max(patches) <= 6


def test_a_head_that_turns_and_zooms_farther_in_the_same_world() -> None:
    for number in range(3):
        usual, far = (make_video(0, "val", number, variant=each) for each in (DEFAULT, Variant(roll=12, zoom=20)))
        still = make_video(0, "val", number, variant=Variant(roll=0, zoom=0))
        assert usual.kitchen == far.kitchen == still.kitchen
        for old, new, fixed in zip(usual.clips, far.clips, still.clips, strict=True):
            assert new == dataclasses.replace(old, lens=(*old.lens[:2], 12, 0.2, *old.lens[4:]))
            rolls, zooms = zip(*(world.lens(new, t) for t in np.linspace(0, new.seconds, 30)), strict=True)
            # At the slowest a bit more than a third of a period.
            assert np.ptp(np.degrees(rolls)) > 2
            assert np.abs(np.diff(np.degrees(rolls))).max() < 12 * 2 * math.pi * 0.45 * new.seconds / 29
            assert far.realism.zoom[0] <= min(zooms) < max(zooms) <= far.realism.zoom[1]
            assert max(map(abs, np.degrees(rolls))) <= far.realism.roll == 19
            assert world.lens(fixed, 0.0) == world.lens(fixed, 2.0)


@pytest.mark.parametrize("variant", [DEFAULT, Variant(roll=15, zoom=20)])
def test_boxes_turn_and_zoom_with_the_camera(variant: Variant) -> None:
    """Checked against every marked pixel, transformed separately."""
    for number in range(3):
        video = make_video(2, "val", number, 6, variant)
        stage = Stage(video)
        for clip in video.clips:
            for t in (0.4, 1.3):
                moment, (roll, zoom), shift = stage.moment(clip, t), world.lens(clip, t), world.sway(clip, t)
                view, corner, _ = next(each for each in moment.placed if each[2] == clip.noun)
                y, x = np.nonzero(np.asarray(view.marked))
                x, y = x + 0.5 + corner[0] - CANVAS[0] / 2, y + 0.5 + corner[1] - CANVAS[1] / 2
                columns = (zoom * (math.cos(roll) * x - math.sin(roll) * y) + shift[0] * CANVAS[0]) / CANVAS[0] + 0.5
                rows = (zoom * (math.sin(roll) * x + math.cos(roll) * y) + shift[1] * CANVAS[0]) / CANVAS[1] + 0.5
                ends = np.clip((columns.min(), rows.min(), columns.max(), rows.max()), 0, 1)
                np.testing.assert_allclose(moment.box(clip.noun), ends, atol=1.5 / CANVAS[1])


def test_only_what_moves_is_blurred() -> None:
    video = make_video(0, "train", 0)
    still = Stage(dataclasses.replace(video, realism=dataclasses.replace(video.realism, exposure=0.0)))
    blurred = Stage(video)
    clip = next(clip for clip in video.clips if VERBS[clip.verb].path in ("wipe", "flick"))
    for t, differs in ((clip.begin - 0.1, False), (clip.begin + 0.5 * clip.event_seconds, True)):
        pictures = [np.asarray(stage.draw(clip, t)).astype(int) for stage in (still, blurred)]
        share = (np.abs(pictures[0] - pictures[1]).max(2) > 4).mean()
        assert (0.02 < share < 0.6) if differs else share == 0


def test_blur_does_not_show_how_often_something_is_tapped() -> None:
    """At the same place the hand of two taps is twice as fast as that of one; a single frame must not show it."""
    pictures = []
    for verb, shares in (("tap once", (0.25, 0.8)), ("tap twice", (0.125, 0.4))):
        clip = _take(verb, VERBS[verb].nouns[0], speed=0.8, lens=(3, 1, *[0] * 6), sway=(0,) * 6)
        stage = Stage(dataclasses.replace(make_video(0, "train", 0), clips=(clip,)))
        pictures.append([np.asarray(stage.draw(clip, clip.begin + share * clip.event_seconds)) for share in shares])
    once, twice = np.array(pictures, int)
    assert np.abs(once - twice).max() <= 2
    assert np.abs(once[0] - once[1]).max() > 50


def _way(clip: Clip, stage: Stage) -> np.ndarray:
    """Centres of the object's box in the frames of a clip, [T, 2] in picture widths."""
    boxes = np.array([stage.moment(clip, frame_time(i)).box(clip.noun) or [np.nan] * 4 for i in range(clip.frames)])
    return (boxes[:, :2] + boxes[:, 2:]) / 2 * (1, 0.75)


def test_captions_name_the_direction_in_the_picture() -> None:
    """200 clips of version 6: the object's box moves in the direction of the caption, camera motion included."""
    counts = Counter[str]()
    for number in itertools.count():
        video = make_video(7, "train", number)
        stage = Stage(video)
        for clip in video.clips:
            verb = VERBS[clip.verb]
            if verb.path not in ("lift", "push", "slide", "wipe", "flick", "circle"):
                continue
            counts[clip.verb] += 1
            way = _way(clip, stage)
            moved = way[-1] - way[0]
            # Of a brief event: from its first to its second quarter, when it is farthest on either side.
            at = [round((clip.begin + share * clip.event_seconds) * FPS - 0.5) for share in (0.25, 0.75)]
            leg = way[at[1]] - way[at[0]]
            sign = 1 if verb.backwards else -1
            if verb.path in ("lift", "push"):  # up and away are up in the picture
                assert moved[1] * sign > abs(moved[0]), clip
            elif verb.path == "slide":
                assert moved[0] * sign > 2 * abs(moved[1]), clip
            elif verb.path == "wipe":  # first one side, then the other
                assert -leg[0] * sign > 2 * abs(leg[1]), clip
            elif verb.path == "flick":
                assert -leg[1] * sign > 2 * abs(leg[0]), clip
            else:
                # Twice the area that the way encloses: in a picture, whose y points down, positive is clockwise.
                round_trip = way[at[0] - 3 : at[1] + 4]
                x, y = (round_trip - round_trip.mean(0)).T
                assert (np.roll(y, -1) * x - np.roll(x, -1) * y).sum() * -sign > 0.02, clip
        if counts.total() >= 200:
            break
    assert len(counts) == 12
    assert min(counts.values()) >= 5
