"""The words and patterns of the check: ``vocabulary.yml``, and files of users that add to it or replace parts of it.

:func:`load_vocabulary` reads and validates both. A user's file may be a stranger's: its patterns are
refused where the number of ways to match, and with it the time, could explode.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from egohod.config import parse_yaml
from egohod.errors import UserError, nearest
from egohod.hod.facts import (
    AWAY,
    CLOCKWISE,
    CLOSER,
    COUNTERCLOCKWISE,
    DOWN,
    LEFT,
    MIRRORED,
    PARALLEL,
    RIGHT,
    SHAKING,
    STILL,
    UP,
)
from egohod.runtime import content_hash

PACKAGED = Path(__file__).with_name("vocabulary.yml")

# What a statement about a hand may be, besides the directions of facts.py.
TWICE, ONCE, ABSENT, CONTACT, RELEASE = "twice", "once", "out of sight", "contact", "release"
CLOSING, PARTING = "closing", "parting"
REGRASP, DISTANCE, TO_LEFT_HAND, TO_RIGHT_HAND = "regrasp", "distance", "to the left hand", "to the right hand"
SIDE = "side"  # the side that the statement itself names: "to the left"
STATEMENTS = (
    *(LEFT, RIGHT, SIDE, UP, DOWN, AWAY, CLOSER, CLOCKWISE, COUNTERCLOCKWISE, SHAKING, STILL),
    *(ONCE, TWICE, ABSENT, CONTACT, RELEASE, REGRASP, CLOSING, PARTING),
    *(PARALLEL, MIRRORED, TO_LEFT_HAND, TO_RIGHT_HAND, DISTANCE),
)

# --- The sections of a file, by their form ---

_GROUPS = ("verbs", "things", "different_verbs", "different_things")  # a group of words a line
_WORDS = (
    *("function_words", "shapes", "kinds", "tools", "generic", "motion", "light", "plain", "placing", "shared"),
    *(
        "before_things",
        "after_things",
        "actors",
        "before_verbs",
        "determiners",
        "being",
        "perfect",
        "of_places",
        "of_means",
        "adjective_endings",
    ),
)
_PATTERNS = ("orders", "talk", "breaks", "means", "negations")  # lists of them
_HANDS = ("left_and_right", "right_and_left", "side", "other")
_MAPS = ("tools_of_actions", "implied_verbs", "lemmas", "phrases", "pieces", "hands")
_SECTIONS = (*_GROUPS, *_WORDS, *_MAPS, *_PATTERNS, "claims")

_WORD = re.compile(r"[^\W\d_A-Z]+(?:[-'][^\W\d_A-Z]+)*|[.,;:()]")
_PIECE = re.compile(r"\{([a-z_]+)\}")
_LONGEST_PATTERN, _LONGEST_WHOLE = 400, 2000  # in characters, before and after pieces are inserted
_TEXT, _MOST_WAYS = 100, 10**6  # in how many ways a pattern may match from one place of a text of so many characters
_REFERENCE = re.compile(r"\\[1-9]|\(\?(?:P=|\()")  # to a group, whose number changes when patterns are joined
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")

Groups = dict[str, frozenset[int]]


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Word lists and patterns, ready for use. Equal to itself alone, so that caches can hold results of each."""

    version: str  # of the packaged file, and of the user's after it
    content_hash: str  # of all words and patterns: other comments and another order of keys do not change it
    verbs: Groups  # by word the numbers of its groups
    things: Groups
    different: frozenset[frozenset[str]]  # pairs that share a group and yet are different
    words: Mapping[str, frozenset[str]]  # by name of the section
    tools_of_actions: Mapping[str, frozenset[str]]
    implied_verbs: Mapping[str, frozenset[str]]
    lemmas: Mapping[str, str]
    phrases: re.Pattern[str]  # with a group for each phrase, whose number is its place in ``phrase_words``
    phrase_words: tuple[str, ...]
    orders: re.Pattern[str]
    talk: re.Pattern[str]
    breaks: re.Pattern[str]
    means: re.Pattern[str]  # a group of its own for each {side}
    negations: re.Pattern[str]
    hands: re.Pattern[str]  # groups named as in the file; s0 is the {side} of ``side``
    claims: re.Pattern[str]  # groups c0, c1, ... and s0, s1, ... for the {side} of each
    claim_kinds: tuple[tuple[str, ...], ...]

    @property
    def identity(self) -> str:
        """What results are stored under."""
        return f"{self.version}-{self.content_hash}"


def load_vocabulary(path: str | None = None, fresh: bool = False) -> Vocabulary:
    """The packaged vocabulary, with the changes of a user's file.

    Each section of the file is added to the packaged one, before it where the order counts (patterns: the first that
    matches), unless the file's list ``replace`` names the section. It is read once, and again if ``fresh``: in between
    an edit changes nothing, so that a run's results are those of the words that they are stored under. Raises
    :class:`UserError` that names the file and the section at fault.
    """
    if fresh:
        _load.cache_clear()
    return _load(path)


@functools.cache
def _load(path: str | None) -> Vocabulary:
    # The loader in C where PyYAML has it: milliseconds instead of a tenth of a second.
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    content: dict[str, Any] = yaml.load(PACKAGED.read_text(encoding="utf-8"), Loader=loader)
    version = content.pop("version")
    if path is None:
        return _compile(str(PACKAGED), version, content)
    own = _read(path)
    own_version = own.pop("version")
    replaced = own.pop("replace", [])
    # By itself: what is wrong with the file should not be hidden by what the packaged one has.
    _check_form(path, own)
    for name, section in own.items():
        content[name] = section if name in replaced else _added(name, section, content.get(name))
    return _compile(path, f"{version}+{own_version}", content)


def _read(path: str) -> dict[str, Any]:
    """A user's file, whose keys are known."""
    try:
        tree = parse_yaml(Path(path).read_bytes())
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise UserError(f"check.vocabulary: {path}: {reason}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a vocabulary is a mapping of sections such as verbs: and things:")
    for name in tree:
        if name not in (*_SECTIONS, "version", "replace"):
            raise UserError(f"{path}: no section '{name}'{nearest(name, [*_SECTIONS, 'version', 'replace'])}")
    if not isinstance(tree.get("version"), str) or not re.fullmatch(r"[\w.-]{1,40}", tree["version"]):
        raise UserError(f"{path}: version must be a short word such as 1 or kitchen-2")
    replaced = tree.get("replace", [])
    if not isinstance(replaced, list):
        raise UserError(f"{path}: replace must be a list of sections")
    for name in replaced:
        if name not in _SECTIONS or name not in tree:
            raise UserError(f"{path}: replace names '{name}', which is no section of this file")
    return tree


def _added(name: str, section: Any, packaged: Any) -> Any:
    """A user's section and the packaged one as one."""
    if packaged is None:
        return section
    if isinstance(section, str):
        return f"{section.strip()}\n{packaged.strip()}"
    if isinstance(section, list):
        return [*section, *packaged]
    if name in ("tools_of_actions", "implied_verbs"):
        return packaged | {word: f"{words} {packaged.get(word, '')}" for word, words in section.items()}
    if name == "pieces":  # which may have packaged ones in them
        return packaged | section
    # The user's first: the order of phrases counts.
    return section | {key: value for key, value in packaged.items() if key not in section}


# --- Validation ---


def _check_form(where: str, content: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` for the first section that is not of its form."""
    for name, section in content.items():
        is_list = name in (*_PATTERNS, "claims")
        expected: Any
        expected, form = (dict, "a mapping") if name in _MAPS else (list, "a list") if is_list else (str, "text")
        if not isinstance(section, expected) or not section:
            raise UserError(f"{where}: {name} must be {form} that is not empty")
        if name in _GROUPS:
            for number, line in enumerate(section.strip("\n").split("\n"), 1):
                _check_words(where, f"{name}, line {number}", line)
                if name.startswith("different") and len(line.split()) < 2:
                    raise UserError(f"{where}: {name}, line {number}: needs a word and those that it differs from")
        elif name in _WORDS:
            _check_words(where, name, section)
        elif name in ("tools_of_actions", "implied_verbs", "lemmas"):
            for word, others in section.items():
                _check_words(where, f"{name}: {word}", word, most=1)
                _check_words(where, f"{name}: {word}", others, most=1 if name == "lemmas" else None)
        elif name == "phrases":
            for word in section.values():
                if word != "":
                    _check_words(where, name, word)
        elif name == "hands":
            for kind in section:
                if kind not in _HANDS:
                    raise UserError(f"{where}: hands: no kind '{kind}'{nearest(kind, _HANDS)}")
            if SIDE in section and "{side}" not in str(section[SIDE]):
                raise UserError(f"{where}: hands: side: needs {{side}}")
        elif name == "means":
            if not all("{side}" in str(pattern) for pattern in section):
                raise UserError(f"{where}: means: each pattern needs {{side}}")
        elif name == "claims":
            for claim in section:
                if not isinstance(claim, dict) or set(claim) != {"what", "pattern"}:
                    raise UserError(f"{where}: claims: each needs the keys what and pattern, and no other")
                for what in _kinds(claim):
                    if what not in STATEMENTS:
                        raise UserError(f"{where}: claims: what is '{what}'{nearest(str(what), STATEMENTS)}")


def _kinds(claim: Mapping[str, Any]) -> tuple[str, ...]:
    """What the pattern of ``claims`` states: one thing, or several."""
    what = claim["what"]
    return tuple(what) if isinstance(what, list) and what else (what,)


def _check_words(where: str, place: str, text: Any, most: int | None = None) -> None:
    words = text.split() if isinstance(text, str) else []
    if not words or (most is not None and len(words) > most):
        raise UserError(f"{where}: {place}: needs {'words' if most is None else 'one word'}, has {text!r}")
    for word in words:
        if not _WORD.fullmatch(word):
            raise UserError(f"{where}: {place}: '{word}' is no lower-case word")


def _checked_pattern(
    where: str,
    place: str,
    pattern: Any,
    pieces: Mapping[str, str],
    side: str | None = None,
    is_piece: bool = False,
) -> str:
    """A pattern with its pieces inserted, and the group ``side`` for {side}."""
    if not isinstance(pattern, str) or not pattern.strip():
        raise UserError(f"{where}: {place}: a pattern must be text that is not empty")
    pattern = pattern.strip()

    def fault(why: str) -> UserError:
        return UserError(f"{where}: {place}: the pattern '{pattern}' {why}")

    if len(pattern) > _LONGEST_PATTERN:
        raise fault(f"has {len(pattern)} characters, more than {_LONGEST_PATTERN}")

    def insert(match: re.Match[str]) -> str:
        name = match[1]
        if name == SIDE and side is not None:
            return f"(?P<{side}>{LEFT}|{RIGHT})"
        if name not in pieces:
            near = nearest(name, list(pieces)) if pieces else ""
            raise fault(f"has the piece '{name}', which does not exist{near}")
        return f"(?:{pieces[name]})"  # as one: what follows it, or alternatives of it, concern the whole piece

    if pattern.count("{side}") > 1:
        raise fault("has {side} more than once")
    whole = _PIECE.sub(insert, pattern)
    if len(whole) > _LONGEST_WHOLE:
        raise fault(f"has {len(whole)} characters with its pieces, more than {_LONGEST_WHOLE}")
    try:
        compiled = re.compile(whole)
        re.compile(f"(?:{whole})")  # as it is joined with others: a flag for all of them may not be in it
        tree = re._parser.parse(whole)  # type: ignore[attr-defined] # the standard library shows its tree nowhere else
    except (re.error, OverflowError, RecursionError) as error:
        raise fault(f"does not compile: {error}") from error
    has_side = side is not None and "{side}" in pattern
    if compiled.groups > has_side or _REFERENCE.search(pattern):
        raise fault("has a group that captures, or refers to one; write (?:...)")
    if has_side and not _always_has_group(tree):
        raise fault("has {side} in a part that may be absent")
    if not is_piece and compiled.match("") is not None:
        raise fault("matches empty text")
    if _ways(tree) > _MOST_WAYS:
        raise fault(f"may take for ever: it can match in more than {_MOST_WAYS:,} ways")
    return whole


def _parts(value: Any) -> Iterator[Any]:
    """The sub-patterns in the tuples and lists of an operation of a parsed pattern."""
    if isinstance(value, re._parser.SubPattern):  # type: ignore[attr-defined]
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _parts(each)


def _always_has_group(tree: Any) -> bool:
    """Whether every match has the group that captures: it is in no alternative, optional part or lookaround."""
    for operation, value in tree:
        if str(operation) == "SUBPATTERN" and (value[0] is not None or _always_has_group(value[-1])):
            return True
        if str(operation) in _REPEATS and int(value[0]) > 0 and _always_has_group(value[-1]):
            return True
    return False


def _ways(tree: Any) -> float:
    """An upper bound of the ways in which a parsed pattern matches from one place of a text of ``_TEXT`` characters.

    Backtracking tries all of them in the worst case: parts after one another multiply, alternatives add up. Only those
    that begin with different characters exclude each other.
    """
    ways = 1.0
    for operation, value in tree:
        if str(operation) in _REPEATS:
            low, high, inside = int(value[0]), min(int(value[1]), _TEXT), _ways(value[2])
            if high == 1:
                ways *= inside + (low == 0)
            else:  # limits that are far above what is refused, and below what a float holds
                ways *= max(1, high - low + 1) * min(inside, 2.0 * _MOST_WAYS) ** min(high, 40)
        elif str(operation) == "BRANCH":
            by_first: dict[int | None, float] = {}
            for part in value[1]:
                first = _first_character(part)
                by_first[first] = by_first.get(first, 0) + _ways(part)
            ways *= by_first.pop(None, 0) + max(by_first.values(), default=0)
        else:
            for part in _parts(value):
                ways *= _ways(part)
    return ways


def _first_character(tree: Any) -> int | None:
    """The code of the character, in lower case, that every match begins with; None where there is more than one."""
    for operation, value in tree:
        if str(operation) == "LITERAL":
            return ord(chr(value).lower()[0])
        if str(operation) == "SUBPATTERN":
            return _first_character(value[-1])
        if str(operation) != "AT":  # \b, which matches no character
            break
    return None


# --- Compilation ---


def _compile(where: str, version: str, content: dict[str, Any]) -> Vocabulary:
    _check_form(where, content)
    pieces: dict[str, str] = {}
    for name, text in content["pieces"].items():  # each may have those before it
        pieces[name] = _checked_pattern(where, f"pieces: {name}", text, pieces, is_piece=True)

    def joined(name: str) -> str:
        return "|".join(
            f"(?:{_checked_pattern(where, name, pattern, pieces, f's{number}' if name == 'means' else None)})"
            for number, pattern in enumerate(content[name])
        )

    phrases = [
        f"(?P<p{number}>{_checked_pattern(where, 'phrases', pattern, pieces)})"
        for number, pattern in enumerate(content["phrases"])
    ]
    hands = [
        f"(?P<{kind}>{_checked_pattern(where, f'hands: {kind}', pattern, pieces, 's0' if kind == SIDE else None)})"
        for kind, pattern in sorted(content["hands"].items(), key=lambda item: _HANDS.index(item[0]))
    ]
    claims = []
    for number, claim in enumerate(content["claims"]):
        place = f"claims: {', '.join(_kinds(claim))}"
        pattern = _checked_pattern(where, place, claim["pattern"], pieces, f"s{number}")
        if (SIDE in _kinds(claim)) != ("{side}" in claim["pattern"]):
            raise UserError(f"{where}: claims: what is side where the pattern has {{side}}, and only there")
        claims.append(rf"(?P<c{number}>\b(?:{pattern}))")
    lists = {
        name: {word: frozenset(others.split()) for word, others in content[name].items()}
        for name in ("tools_of_actions", "implied_verbs")
    }
    different = [
        line.split()
        for name in ("different_verbs", "different_things")
        for line in content.get(name, "").strip().splitlines()
    ]
    return Vocabulary(
        version=version,
        verbs=_groups(content["verbs"]),
        things=_groups(content["things"]),
        different=frozenset(frozenset((first, other)) for first, *others in different for other in others),
        words={name: frozenset(content[name].split()) for name in _WORDS},
        lemmas=content["lemmas"],
        phrases=re.compile(rf"(?<![a-z])(?:{'|'.join(phrases)})(?![a-z])"),
        phrase_words=tuple(content["phrases"].values()),
        hands=re.compile(rf"\b(?:{'|'.join(hands)})"),
        claims=re.compile("|".join(claims)),
        claim_kinds=tuple(map(_kinds, content["claims"])),
        orders=re.compile(joined("orders"), re.IGNORECASE),
        talk=re.compile(joined("talk"), re.IGNORECASE),
        breaks=re.compile(joined("breaks")),
        means=re.compile(joined("means")),
        negations=re.compile(joined("negations")),
        tools_of_actions=lists["tools_of_actions"],
        implied_verbs=lists["implied_verbs"],
        # Last: every section has been checked by now.
        content_hash=content_hash(repr(_normal(content)), length=12),
    )


def _groups(text: str) -> Groups:
    groups: dict[str, set[int]] = {}
    for number, line in enumerate(text.strip().splitlines()):
        for word in line.split():
            groups.setdefault(word, set()).add(number)
    return {word: frozenset(numbers) for word, numbers in groups.items()}


def _normal(content: Any) -> Any:
    """Without what changes no verdict: the order of sections, and spaces."""
    if isinstance(content, dict):
        # The order of phrases counts, that of sections does not; no two sections compare equal either way.
        return [(key, _normal(value)) for key, value in content.items()]
    if isinstance(content, list):
        return [_normal(value) for value in content]
    return [line.split() for line in content.strip().splitlines()]
