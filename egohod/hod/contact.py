"""When a hand touches something: as the detector says, or where it is silent by overlap and joint motion."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from egohod.data.detections import NO_CONTACT, UNKNOWN_STATE
from egohod.hod.tracks import Track


@dataclass(frozen=True)
class ContactParams:
    """What counts as touching."""

    overlap: float = 0.15
    """Least share of the smaller box that both cover."""
    apart: float = 0.35
    """Most that hand and object may move apart between two samples, as a share of the way that the hand goes."""
    jitter: float = 0.02
    """The same for hands that hardly move, in shares of the picture."""
    reach: float = 0.12
    """How far a hand's offset may miss the box that it points to, in shares of the picture."""


def touching(hand: Track, objects: list[Track], params: ContactParams) -> np.ndarray:
    """Whether the hand touches anything at each sample, bool [T]."""
    told = hand.state != UNKNOWN_STATE
    if told.any():
        return _bridged(hand.state > NO_CONTACT, told)
    touched = np.zeros(len(hand.state), dtype=bool)
    for each in objects:
        touched |= (overlap(hand, each) >= params.overlap) & _together(hand, each, params)
    return touched


def attached(hand: Track, thing: Track, touched: np.ndarray, params: ContactParams) -> np.ndarray:
    """Where a hand that is ``touched`` [T] touches this thing, bool [T]: it points there, else their boxes overlap."""
    miss = np.abs(hand.target - thing.centre) - thing.extent / 2
    points = np.isfinite(hand.target[:, 0])
    hits = (miss <= params.reach).all(axis=1)
    return touched & np.where(points, hits, (overlap(hand, thing) >= params.overlap) & _together(hand, thing, params))


def overlap(one: Track, other: Track) -> np.ndarray:
    """Common area of two things over the smaller one's [T]; 0 where either is unknown."""
    low = np.maximum(one.centre - one.extent / 2, other.centre - other.extent / 2)
    high = np.minimum(one.centre + one.extent / 2, other.centre + other.extent / 2)
    common = np.clip(high - low, 0, None).prod(axis=1)
    smaller = np.minimum(one.extent.prod(axis=1), other.extent.prod(axis=1))
    return np.nan_to_num(common / np.maximum(smaller, 1e-9))


def _together(hand: Track, thing: Track, params: ContactParams) -> np.ndarray:
    """Where the two do not move against each other, towards the next or from the last sample [T]."""
    own, relative = np.diff(hand.centre, axis=0), np.diff(hand.centre - thing.centre, axis=0)
    joint = np.hypot(*relative.T) <= np.maximum(params.apart * np.hypot(*own.T), params.jitter)
    if not len(joint):
        return np.ones(len(hand.centre), dtype=bool)
    return np.append(joint, False) | np.insert(joint, 0, False)


def _bridged(flags: np.ndarray, told: np.ndarray) -> np.ndarray:
    """``flags`` where nothing is told follow their neighbours if those agree."""
    places, known = np.arange(len(flags)), np.flatnonzero(told)
    before = known[np.clip(np.searchsorted(known, places, side="right") - 1, 0, None)]
    after = known[np.clip(np.searchsorted(known, places), None, len(known) - 1)]
    return np.where(told, flags, flags[before] & flags[after])
