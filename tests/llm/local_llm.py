"""A dozen fixed clips narrated by the model behind an endpoint, and what the check says; see run_local_llm.sh."""

from __future__ import annotations

import collections
import json
import sys
import time
import urllib.request
from pathlib import Path

from egohod.hod.check import check
from egohod.hod.config import CheckConfig, NarratorConfig
from egohod.hod.facts import ClipFacts
from egohod.hod.narrators import Request
from egohod.hod.narrators.llm import LanguageModelNarrator
from egohod.training.telemetry import git_commit
from tests.hod.hod_facts import clip, hand
from tests.support import ROOT


def clips() -> list[tuple[str, ClipFacts]]:
    """(narration, facts): verbs of the demo and a kitchen; the other hand rests, holds the thing or is unseen."""
    wanted: list[tuple[str, str, str, tuple[str, ...], str]] = [
        ("#C C moves the sponge", "sponge", "right", ("left", "right"), "rests"),
        ("#C C opens the jar", "jar", "left", ("right",), "holds"),
        ("#C C pushes the plate", "plate", "right", ("away",), "unseen"),
        ("#C C pulls the bowl", "bowl", "left", ("closer",), "rests"),
        ("#C C picks up the cup", "cup", "right", ("up",), "unseen"),
        ("#C C puts down the bottle", "bottle", "left", ("down",), "rests"),
        ("#C C turns the lemon", "lemon", "right", ("clockwise",), "holds"),
        ("#C C shakes the box", "box", "left", ("back and forth",), "unseen"),
        ("#C C holds the knife", "knife", "right", ("still",), "rests"),
        ("#C C stirs the soup", "spoon", "right", ("counterclockwise",), "holds"),
        ("#C C cuts the onion", "knife", "right", ("down", "up"), "holds"),
        ("#C C wipes the table", "cloth", "left", ("right", "left"), "rests"),
    ]
    made = []
    for source, thing, side, ways, other in wanted:
        hands = [hand(side, *ways, touches="object", contact=0.0)]
        if other != "unseen":
            idle = {"touches": "object", "contact": 0.0} if other == "holds" else {}
            hands.append(hand({"left": "right", "right": "left"}[side], **idle))
        made.append((source, clip(*hands, acting=side, thing=thing)))
    return made


def main(endpoint: str, output: Path) -> None:
    """Narrate one clip a request, so that the small model is not asked to count; print and write what came out."""
    _wait(endpoint)
    settings = NarratorConfig(
        kind="llm",
        endpoint=endpoint,
        batch=1,
        concurrency=1,
        timeout_seconds=900,
        temperature=0.2,
        retries=1,
        answer_format="json_object_schema",
    )
    narrator = LanguageModelNarrator(settings, ROOT / "configs" / "hod" / "prompts" / "llm.jinja")
    asked = clips()
    start = time.monotonic()
    rows = []
    for number, answer in narrator.narrate([Request(source, facts, seed=i) for i, (source, facts) in enumerate(asked)]):
        source, facts = asked[number]
        reasons: tuple[str, ...] = (answer.problem or "no answer",)
        if answer.text is not None:
            reasons = check(answer.text, source, facts, CheckConfig(), narrator.instructions).reasons
        print(f"{source}\n  {answer.text}\n  {'passes' if not reasons else '; '.join(reasons)}", flush=True)
        rows.append(
            {
                "source": source,
                "caption": answer.text,
                "reasons": reasons,
                "tokens": [answer.prompt_tokens, answer.completion_tokens],
            }
        )
    wrong = collections.Counter(name for row in rows for name in {each.partition(":")[0] for each in row["reasons"]})
    result = {
        "commit": git_commit(),
        "clips": len(rows),
        "answered": sum(row["caption"] is not None for row in rows),
        "passed": sum(not row["reasons"] for row in rows),
        "refused_for": dict(wrong),
        "seconds": round(time.monotonic() - start, 1),
        "rows": rows,
    }
    output.write_text(json.dumps(result, indent=1) + "\n")
    print({key: value for key, value in result.items() if key != "rows"})


def _wait(endpoint: str) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(f"{endpoint}/models", timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    sys.exit("the server did not start; see server.log")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
