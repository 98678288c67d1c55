"""What a shard's narrations are like as a whole: a run in which every caption was refused ends as well as any."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from egohod.hod.language import sides

log = logging.getLogger(__name__)

# A larger share of captions by the stand-in, or without a hand, is not what anybody runs this for.
_MOSTLY = 0.5


class Tally:
    """Counts checked narrations of the narrator called ``narrator``."""

    def __init__(self, narrator: str) -> None:
        self._narrator = narrator
        self._worded, self._refused = Counter[str](), Counter[str]()
        self._tokens, self._handless = [0, 0], 0

    def add(self, checked: Mapping[str, Any]) -> None:
        """Count one: a :class:`~egohod.hod.narrate.Checked` as :func:`~egohod.hod.records.plain` has it."""
        again = checked["attempts"] > 1 and checked["narrator"] == self._narrator
        self._worded[f"{checked['narrator']} asked again" if again else checked["narrator"]] += 1
        self._refused.update({reason.partition(":")[0] for reason in checked["refusals"]})
        self._tokens[0] += checked["prompt_tokens"]
        self._tokens[1] += checked["completion_tokens"]
        self._handless += not sides(checked["text"])

    def say(self) -> None:
        """Log the counts, with a warning where they are mostly not as they should be."""
        narrations = self._worded.total()
        if not narrations:
            return
        parts = [f"worded by {_listed(self._worded)}"]
        if self._refused:
            parts.append(f"refused for {_listed(self._refused)}")
        if any(self._tokens):
            parts.append(f"{self._tokens[0]:,} tokens asked and {self._tokens[1]:,} answered")
        log.info("%s narrations: %s", f"{narrations:,}", "; ".join(parts))
        stood_in = self._worded["template"] if self._narrator != "template" else 0
        if stood_in > _MOSTLY * narrations:
            log.warning(
                "the template stands in for %s in %s of %s narrations: is the model good enough, and there?",
                *(self._narrator, f"{stood_in:,}", f"{narrations:,}"),
            )
        if self._handless:
            level = logging.WARNING if self._handless > _MOSTLY * narrations else logging.INFO
            log.log(level, "%s of %s narrations name no hand", f"{self._handless:,}", f"{narrations:,}")


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.most_common())
