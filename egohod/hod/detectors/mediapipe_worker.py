"""Run MediaPipe's hand detector in a process of its own, which imports nothing of this project.

    python -P mediapipe_worker.py CONFIDENCE FOLLOWING

MediaPipe 0.10.21 needs protobuf below 5, the rest of the project's environment a newer one; one process cannot import
both. A request on standard input is a line ``T H W`` and T * H * W * 3 bytes of pictures; the answer on standard output
is a line of JSON: for each picture a list of [label, score, [[x, y], ...]] in shares of the picture.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(confidence: float, following: float) -> None:
    """Answer requests until standard input ends."""
    if sys.platform == "linux":
        # Die with the parent, even if it is killed while this process hangs and reads nothing.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # MediaPipe's C++ code may write to standard output, which would mix with the answers: it goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import mediapipe
    import numpy as np

    # Tracking from one picture to the next finds half as many hands again on a real clip.
    hands = mediapipe.solutions.hands.Hands(
        max_num_hands=2, min_detection_confidence=confidence, min_tracking_confidence=following
    )
    print(json.dumps("ready"), file=answers, flush=True)
    while line := sys.stdin.buffer.readline():
        count, height, width = map(int, line.split())
        content = sys.stdin.buffer.read(count * height * width * 3)
        answer = []
        hands.reset()  # no tracking from one clip into the next
        for picture in np.frombuffer(content, np.uint8).reshape(count, height, width, 3):
            result = hands.process(picture)
            answer.append(
                [
                    (kind.classification[0].label, kind.classification[0].score, [(p.x, p.y) for p in marks.landmark])
                    for kind, marks in zip(
                        result.multi_handedness or [], result.multi_hand_landmarks or [], strict=True
                    )
                ]
            )
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), float(sys.argv[2]))
