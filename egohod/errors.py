"""The error that every part raises for what a user can fix, and the exit codes of all programs."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

# Exit codes: the run is done; something broke; the user can fix it; the user stopped it; nobody reads the output any
# more (what a shell reports of a program that SIGPIPE ended).
DONE, BROKEN, USER_ERROR, INTERRUPTED, UNREAD = 0, 1, 2, 130, 141

# A message stays readable whatever it quotes: what is longer is cut, words first (a path is rarely so long).
_LONGEST_WORD, _LONGEST_LINE = 250, 1000
# A damaged file may have any number of names, and comparing them takes time.
_MOST_COMPARED = 200


class UserError(ValueError):
    """Bad input, configuration or files: programs print it as one line and exit with code 2.

    Each argument is one line of the message: several are several problems. Messages quote files, which may hold
    anything, so what no terminal shows (line breaks, escape codes, halves of characters) is escaped and what is too
    long is cut here, at the one place that all messages pass.
    """

    def __str__(self) -> str:
        return "\n".join(_message_line(str(line)) for line in self.args)


def _message_line(text: str) -> str:
    """``text`` as one printable line of bounded length."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: 100 * _LONGEST_LINE])
    shown = " ".join(_cut(word, _LONGEST_WORD) for word in shown.split(" "))
    return _cut(shown, _LONGEST_LINE)


def _cut(text: str, longest: int) -> str:
    """Both ends: a message begins with the file and ends with the cure."""
    tail = longest // 3
    return text if len(text) <= longest else f"{text[: longest - tail - 5]} ... {text[-tail:]}"


def nearest(name: str, names: Sequence[str]) -> str:
    """The end of a message about an unknown ``name``: which of ``names`` was perhaps meant."""
    names = names[:_MOST_COMPARED]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else f" (there are: {', '.join(names)})"
