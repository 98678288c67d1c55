"""Finds hands with MediaPipe in a process of its own, which needs nothing of this project.

    python mediapipe_worker.py CONFIDENCE FOLLOWING

MediaPipe 0.10.21 needs protobuf below 5, the rest of the project's environment a newer one; one process cannot hold
both. Standard input brings, again and again, a line ``T H W`` and T * H * W * 3 bytes of pictures; standard output
answers with a line of JSON: for each picture a list of [label, score, [[x, y], ...]] in shares of the picture.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(confidence: float, following: float) -> None:
    """Answer until standard input ends."""
    if sys.platform == "linux":
        # Whoever asked may be killed while this process hangs.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # MediaPipe's C++ code may write to standard output: it is sent to standard error, and answers keep the old one.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import mediapipe
    import numpy as np

    # A hand that was seen in one picture is looked for there in the next: on a real clip this finds half as many again.
    hands = mediapipe.solutions.hands.Hands(
        max_num_hands=2, min_detection_confidence=confidence, min_tracking_confidence=following
    )
    print(json.dumps("ready"), file=answers, flush=True)
    while line := sys.stdin.buffer.readline():
        count, height, width = map(int, line.split())
        content = sys.stdin.buffer.read(count * height * width * 3)
        answer = []
        hands.reset()  # what was seen in another clip says nothing of this one
        for picture in np.frombuffer(content, np.uint8).reshape(count, height, width, 3):
            found = hands.process(picture)
            answer.append(
                [
                    (kind.classification[0].label, kind.classification[0].score, [(p.x, p.y) for p in marks.landmark])
                    for kind, marks in zip(found.multi_handedness or [], found.multi_hand_landmarks or [], strict=True)
                ]
            )
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), float(sys.argv[2]))
