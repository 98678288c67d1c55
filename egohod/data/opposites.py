"""The opposite of a caption, by rule: the same hands and objects, the motion run backwards. Nothing here needs PyTorch.

"opens the jar with the left hand" becomes "closes the jar with the left hand". A model that gives both the same
feature is blind to the order of frames, so the second is the hardest negative that a clip can have
(:class:`egohod.loss.opposites.WithOpposites`). The rules refuse rather than guess: an opposite that is true of its
clip teaches the contrary of what is meant. docs/motion.md has the share of captions that have one, and of right ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

# --------------------------------------------------------------------------------------------------
# Words
# --------------------------------------------------------------------------------------------------


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Verbs with their particles. <> goes both ways; > goes one way, where several share an opposite. These are about a
# place: what is put into it is taken from it, so that its preposition changes with the verb.
_PLACING = """
put down <> pick up; set down > pick up; lay down > pick up; place down > pick up; drop > pick up; put > take
put on <> take off; put back > take; take out > put back; take away > put back; put in > take out; put away > take out
take > put; pick > put; grab > put; get > put; retrieve > put; fetch > put; get out > put back; pick out > put back
return > take; place > remove; remove > put back; insert > remove; add > remove; install > remove; store > take out
hang up > take down; hang > take down; take down > hang up; pull out <> push in; pull off > put on; push <> pull
lower <> lift; raise > lower; lift up > lower; load <> unload; attach <> detach; connect <> disconnect
screw <> unscrew; plug in <> unplug; plug > unplug; inject <> extract; aspirate > inject
"""
# Here the rest of the clause stays as it is.
_CHANGING = """
open <> close; shut > open; open up > close; close up > open; lock <> unlock; fold <> unfold; fold up > unfold
wrap <> unwrap; wrap up > unwrap; cover <> uncover; zip <> unzip; zip up > unzip; button <> unbutton; tie <> untie
roll up <> unroll; cap <> uncap; seal <> unseal; tighten <> loosen; increase <> decrease; reduce > increase
pack <> unpack; assemble <> disassemble; fasten <> unfasten; turn on <> turn off; switch on <> switch off
turn up <> turn down; stand up <> sit down; put together <> take apart; push away <> pull closer; enter <> exit
pull up <> pull down; push up <> push down; inflate <> deflate; extend <> retract; buckle <> unbuckle
"""
# Verbs that stay, while their direction changes; first those that go into a place and out of it.
_CARRYING = _words(
    "move slide shift drag pour scoop spoon tip transfer walk step climb bring carry scrape sweep jump run crawl toss "
    "throw ladle pass go push pull"
)
_TURNING = _words("lean tilt swing bend turn roll flick wipe swipe stretch look point reach rotate spin circle twist")
# "scoops up the rice", "wipes down the counter"
_NEVER_UP = _words("pour scoop spoon tip transfer ladle scrape sweep wipe throw toss pass run go twist turn")
_IN_AND_OUT = _words("move slide pour walk step climb lean swing bring reach push pull scoop jump crawl")
_DIRECTIONS = (
    "up down, upwards downwards, upward downward, forward backward, forwards backwards, in out, inwards outwards, "
    "inward outward, away closer, clockwise counterclockwise, left right, leftwards rightwards, leftward rightward"
)
# What comes from a place; all other verbs above are about what goes to it.
_AWAY = _words(
    "take pick grab get retrieve fetch remove pull lift raise unload detach disconnect unscrew unplug extract aspirate"
)
_TO, _FROM = _words("in into inside on onto to at under"), _words("from off")
# New prepositions other than in and on.
_PREPOSITIONS = {"attach": "to", "connect": "to", "screw": "onto", "push": "into", "load": "into", "inject": "into"}
_PARTICLES = _words("up down on off in out away back together apart closer aside over around through")
# What things are in, rather than on.
_CONTAINERS = _words(
    "air drawer fridge freezer refrigerator cupboard cabinet bag box bowl pan pot sink cup mug glass jar bottle can tin "
    "bin basket bucket oven microwave dishwasher washer machine pocket container tube beaker wok saucepan skillet "
    "blender kettle pantry closet tank carton packet pack hole case trash dustbin basin water oil tupperware jug flask "
    "tub purse backpack wallet casserole colander sieve mixer mixture soup dish"
)
_DETERMINERS = _words("the a an his her their your my its our some this that these those both")
_PRONOUNS = _words("it them one each these those this")
_PEOPLE = _words("c #c o #o x y he she i you we they man woman person lady boy girl guy someone who")
_SUBJECTS = _PEOPLE | _words("hand hands which and or then also")
_BEFORE_BASE = _words("to and or will can should must then not i you we they hands also")
_BEFORE_ING = _words("while by before after and is are was when starts start keeps continues")
# A clause ends here, and at "and" or "to" before an action.
_ENDS = _words("then while until as so before after but who which that when where using for with by because if")
_ACTIONS = _words(
    "stir cut wash rinse hold mix press use shake clean wipe chop slice peel dry adjust cook fry flip check continue "
    "start begin make keep let prepare spread sprinkle knead grind crush smash break crack weigh measure taste eat "
    "drink scrub lather tap touch gather arrange separate tear dip soak coat serve stack align examine inspect"
)
# These are more often things than actions, unless a determiner or particle follows.
_THINGS = _words("cover lock screw wrap fold lift cap tie button seal pack load place plug drop slide tip step roll")
# "takes a look", "gets ready", "pushes the button": nothing of it is taken or pushed away.
_IDIOMS = _words(
    "look picture pictures photo bite sip step break note notes turn rest seat shower breath care place ready rid used "
    "button buttons switch effort pressure to"
)
_IRREGULAR = {
    "take": ("took", "taking"), "put": ("put", "putting"), "get": ("got", "getting"), "set": ("set", "setting"),
    "shut": ("shut", "shutting"), "lay": ("laid", "laying"), "hang": ("hung", "hanging"), "sit": ("sat", "sitting"),
    "stand": ("stood", "standing"), "tie": ("tied", "tying"), "untie": ("untied", "untying"), "go": ("went", "going"),
    "bring": ("brought", "bringing"), "throw": ("threw", "throwing"), "swing": ("swung", "swinging"),
}  # fmt: skip
_DOUBLED = re.compile(r"(?:un)?(?:zip|drop|grab|wrap|plug|cap|tip|step|drag|run|spin|swim|flip|dip|stir|cut|chop)")
BASE, THIRD, PAST, ING = range(4)


def _forms(verb: str) -> tuple[str, str, str, str]:
    """A verb's base form, third person, past and -ing."""
    third = re.sub(r"(?<=[^aeiou])y$", "ie", verb) + ("es" if re.search(r"(?:s|sh|ch|x|z|o)$", verb) else "s")
    stem = verb + verb[-1] if _DOUBLED.fullmatch(verb) else verb
    past = re.sub(r"(?<=[^aeiou])y$", "i", stem.removesuffix("e")) + "ed"
    return verb, third, *_IRREGULAR.get(verb, (past, stem.removesuffix("e") + "ing"))


def _pairs(rules: str) -> Iterator[tuple[str, str]]:
    for rule in re.split(r"[;\n]", rules.strip()):
        one, arrow, other = re.split(r" (<?>) ", rule.strip())
        yield from [(one, other), (other, one)][: 2 if arrow == "<>" else 1]


_PLACED, _CHANGED = dict(_pairs(_PLACING)), dict(_pairs(_CHANGING))
_VERBS = {phrase.split()[0] for phrase in _PLACED | _CHANGED} | _CARRYING | _TURNING
# From the last form to the first: "put" and "set" are the base form, not the past.
_FORM_OF = {_forms(verb)[form]: (verb, form) for form in (ING, PAST, THIRD, BASE) for verb in sorted(_VERBS)}
_NEXT_ACTION = {_forms(verb)[form] for verb in (_VERBS | _ACTIONS) - _THINGS for form in (BASE, THIRD)}
_OTHER_WAY = dict(pair.split() for pair in _DIRECTIONS.split(", "))
_OTHER_WAY |= {other: word for word, other in _OTHER_WAY.items()} | {"anticlockwise": "clockwise"}

# --------------------------------------------------------------------------------------------------
# Rules
# --------------------------------------------------------------------------------------------------


class _Word(NamedTuple):
    text: str  # in lower case
    start: int
    end: int
    clause: int  # counts marks of punctuation


# Narrations repeat; a worker meets each of them every epoch.
@lru_cache(32768)
def opposite(caption: str) -> str | None:
    """The caption with its motion run backwards, or None where no rule is sure of one.

    Exchanged are verbs with their particles and the preposition of their place ("takes the cup from the shelf", "puts
    the cup on the shelf"), directions ("to the left", "clockwise", "upwards"), the places in "from A to B", once and
    twice, and before and after. Hands stay, and sides that are no direction. A caption that undoes what it does ("opens
    the jar and closes it") has no opposite: backwards it is the same.
    """
    words, clause, last = list[_Word](), 0, 0
    for match in re.finditer(r"#?[\w']+", caption):
        clause += bool(re.search(r"[^\s\-]", caption[last : match.start()]))
        words.append(_Word(match.group().lower(), match.start(), match.end(), clause))
        last = match.end()
    # New text by the number of a word; an empty one removes it.
    new: dict[int, str] = {}
    # In this order: a place in "from A to B" is no longer that of a verb, and a particle no longer a direction.
    _swap_places(words, caption, new)
    if not _swap_verbs(words, new):
        return None
    _swap_directions(words, new)
    result, last = "", 0
    for i, word in enumerate(words):
        text = new.get(i, caption[word.start : word.end])
        if i in new and caption[word.start].isupper():
            text = text[:1].upper() + text[1:]
        # The blank before a removed word goes with it.
        result += caption[last : word.start] + text if text else ""
        last = word.end
    result += caption[last:]
    return result if result != caption else None


def _clause_end(words: list[_Word], i: int) -> int:
    """The number of the first word after the clause of the verb ``i``."""
    for j in range(i + 1, len(words)):
        if words[j].clause != words[i].clause or words[j].text in _ENDS:
            return j
        # "the plate and the cup" is one thing more, "the plate and stirs" another action.
        if words[j].text in ("and", "or", "to") and j + 1 < len(words):
            after = words[j + 2].text if words[j + 1].text.endswith("ly") and j + 2 < len(words) else words[j + 1].text
            if after in _NEXT_ACTION:
                return j
    return len(words)


def _np_end(words: list[_Word], start: int, end: int) -> int:
    """Where the thing that begins at ``start`` ends."""
    stops = _TO | _FROM | {"and", "or", "back", "again"}
    return next((j for j in range(start + 1, end) if words[j].text in stops), end)


def _in_or_on(place: list[_Word]) -> str:
    return "in" if _CONTAINERS & {each for word in place for each in (word.text, word.text.removesuffix("s"))} else "on"


def _swap_places(words: list[_Word], caption: str, new: dict[int, str]) -> None:
    """Exchange A and B in "from A to B"."""
    for i, word in enumerate(words):
        if word.text != "from":
            continue
        end = _clause_end(words, i)
        to = next((j for j in range(i + 2, min(i + 7, end)) if words[j].text in ("to", "into", "onto")), end)
        stop = _np_end(words, to + 1, end)
        if to + 1 >= end or stop - to > 6:
            continue
        one, other = (caption[words[a].start : words[b - 1].end] for a, b in ((i + 1, to), (to + 1, stop)))
        if one.lower() != other.lower():
            new |= dict.fromkeys((*range(i + 1, to), *range(to + 1, stop)), "")
            new[i + 1], new[to + 1] = other, one
            # "from the counter into the air", "from the air onto the counter"
            new[to] = "to" if words[to].text == "to" else _in_or_on(words[i + 1 : to]) + "to"


def _is_verb(words: list[_Word], i: int, verb: str, form: int) -> bool:
    """Whether a word that may be a verb is one, by its neighbours."""
    following = words[i + 1].text if i + 1 < len(words) and words[i + 1].clause == words[i].clause else ""
    if verb in _THINGS and i and following not in _DETERMINERS | _PRONOUNS | _PARTICLES:
        return False
    j = i - 1
    while j >= 0 and (words[j].text.endswith("ly") or words[j].text in ("then", "also", "again")):
        j -= 1
    if j < 0 or words[j].clause != words[i].clause:
        # "The plate, covered with foil"
        return form != PAST
    before = words[j].text
    if before == "to" and j and words[j - 1].text in ("next", "close", "according", "due"):
        return False
    people = before in _PEOPLE or (len(before) == 1 and before != "a")
    if form == BASE:
        return before in _BEFORE_BASE or people
    return {THIRD: people or before in _SUBJECTS, PAST: people, ING: before in _BEFORE_ING}[form]


def _is_last(words: list[_Word], j: int, end: int) -> bool:
    """Whether the clause is over after word ``j``, but for a place."""
    return j + 1 >= end or words[j + 1].text in _TO | _FROM | {"and", "again"}


def _swap_verbs(words: list[_Word], new: dict[int, str]) -> bool:
    """Exchange verbs, their particles and the preposition of their place; False if one undoes another."""
    done: list[tuple[str, bool, set[str]]] = []
    for i, word in enumerate(words):
        verb, form = _FORM_OF.get(word.text, ("", BASE))
        if not verb or not _is_verb(words, i, verb, form):
            continue
        end = _clause_end(words, i)
        texts = [each.text for each in words[:end]]
        # A particle follows at once ("puts down the cup"), or at the end of the clause ("puts the cup down on ...").
        at = next(
            (
                j for j in range(i + 1, end)
                if texts[j] in _PARTICLES and j not in new and texts[j + 1 : j + 2] != ["of"]
                and (j == i + 1 or _is_last(words, j, end))
            ), end,
        )  # fmt: skip
        if at == i + 1 < end - 1 and texts[at] in ("in", "on") and _in_or_on(words[end - 1 : end]) == "in":
            at = end  # "put in fridge" names the place alone
        phrase = f"{verb} {texts[at]}" if at < end else verb
        is_placing = phrase in _PLACED
        result = _PLACED.get(phrase) or _CHANGED.get(phrase)
        thing = [text for text in texts[i + 1 : i + 3] if text not in _DETERMINERS]
        if result is None or (thing and thing[0] in _IDIOMS) or (phrase == "open" and thing[:1] == ["and"]):
            continue
        other, _, particle = result.partition(" ")
        is_away, place = verb in _AWAY, end
        if is_placing:
            start = at + 1 if at < end else i + 1
            sought = _FROM if is_away else _TO
            place = next(
                (j for j in range(start, end) if texts[j] in sought or (is_away and texts[j : j + 2] == ["out", "of"])),
                end,
            )
            if place + 1 >= end:
                place = end
        # "takes it from the table to the sink" is turned round already.
        if any(j in new for j in range(i + 1, end)):
            continue
        # "takes the pan to the sink", "takes it towards him": nothing is put there.
        if is_away and verb != "pull" and place == end and {"to", "towards", "toward"} & set(texts[i:end]):
            continue
        if verb in ("return", "hang", "store", "inject", "aspirate", "connect") and place == end and at == end:
            continue
        if verb == "push" and place < end and texts[place] not in ("in", "into", "inside"):
            place = end
        things = set(texts[i + 1 : place]) - _DETERMINERS - _PARTICLES
        for earlier, was_away, before in done:
            same = not things or bool(things & (before | _PRONOUNS))
            undone = _PLACED.get(earlier) == phrase or _CHANGED.get(earlier) == phrase or (is_placing and was_away != is_away)
            if same and undone:
                return False
        done.append((phrase, is_away, things))
        new[i] = _forms(other)[form]
        if at < end:
            new[at] = particle
        elif particle:
            new[i] += f" {particle}"
        elif other == "put" and place == end:
            new[i] += " down"
        if place < end:
            length = 2 if texts[place + 1] == "of" else 1
            where = words[place + length : _np_end(words, place + length, end)]
            new |= dict.fromkeys(range(place, place + length), "")
            new[place] = "from" if other in _AWAY else _PREPOSITIONS.get(other, _in_or_on(where))
        # "takes the cup in the right hand", "puts down the cup with the right hand"
        for j in range(i + 1, end - 1):
            if is_away and texts[j] == "in" and {"hand", "hands"} & set(texts[j + 1 : j + 4]):
                new[j] = "with"
    return True


def _swap_directions(words: list[_Word], new: dict[int, str]) -> None:
    """Exchange directions, of all verbs and of those that stay, and once and twice, before and after."""
    texts = [word.text for word in words]
    here = set(texts)

    def is_two_way(word: str) -> bool:
        # "up and down" is the same backwards
        return word in here and _OTHER_WAY[word] in here

    for i, text in enumerate(texts):
        before, after = texts[i - 1] if i else "", texts[i + 1] if i + 1 < len(texts) else ""
        last = i + 1 == len(words) or words[i + 1].clause != words[i].clause or after in _ENDS | _TO | _FROM | {"and"}
        if i in new:
            continue
        if re.search(r"wards?$|clockwise$", text) and text in _OTHER_WAY and not is_two_way(text):
            new[i] = _OTHER_WAY[text]
        elif text in ("once", "twice") and last and before not in ("at", "for", "than", "") and "once" not in here & {"twice"}:
            new[i] = "twice" if text == "once" else "once"
        elif text in ("before", "after") and after.endswith("ing"):
            new[i] = "after" if text == "before" else "before"
        elif texts[i : i + 2] in (["slow", "touch"], ["quick", "touches"]) and before in ("one", "two"):
            # The demo world's words for a tap and two taps within the same time.
            new |= dict(zip(range(i - 1, i + 2), ("two", "quick", "touches") if before == "one" else ("one", "slow", "touch")))
        elif text in ("left", "right", "far", "near") and before in ("first", "then"):
            new[i] = {"far": "near", "near": "far"}.get(text) or _OTHER_WAY[text]
        elif text in ("left", "right") and after not in ("hand", "hands", "of"):
            # "to the left", "over the left side"
            j = i - 2 if before in _DETERMINERS else i - 1
            leads = j >= 0 and j not in new and (texts[j] in ("to", "towards", "toward") or (texts[j], after) == ("over", "side"))
            if leads and not (after == "side" and texts[i + 2 : i + 3] == ["of"]):
                new[i] = _OTHER_WAY[text]

    for i, word in enumerate(words):
        verb, form = _FORM_OF.get(word.text, ("", BASE))
        if i in new or verb not in _CARRYING | _TURNING or not _is_verb(words, i, verb, form):
            continue
        end = _clause_end(words, i)
        for j in range(i + 1, end):
            text, after = texts[j], texts[j + 1] if j + 1 < end else ""
            if j in new:
                # One change is enough: "slides it to the left into the box".
                break
            if text in ("away", "back") and verb == "flick" and _is_last(words, j, end):
                new[j] = "back" if text == "away" else "away"
            elif text == "away" and after == "from" and verb in _CARRYING | {"turn", "lean"}:
                new |= {j: "towards", j + 1: ""}
            elif text in ("towards", "toward") and after:
                new[j] = "away from"
            elif text == "closer" and after == "to":
                new |= {j: "away", j + 1: "from"}
            elif text in _OTHER_WAY and not is_two_way(text) and (j == i + 1 or _is_last(words, j, end)):
                if (text in ("up", "down") and verb in _NEVER_UP) or (text in ("in", "out") and verb not in _IN_AND_OUT):
                    continue
                # "pours in the milk" has a direction, "walks in the park" a place.
                if (text in ("in", "out") and after and (after == "of" or verb != "pour")) or (text in ("left", "right") and after in _DETERMINERS):
                    continue
                new[j] = _OTHER_WAY[text]
            elif verb in _CARRYING and after and (text == "into" or (text == "in" and verb == "pour")):
                new[j] = "out of"
            elif verb in _CARRYING and text == "out" and after == "of":
                new |= {j: "into", j + 1: ""}
            elif verb in _CARRYING and after and (text == "onto" or (text == "on" and verb == "pour")):
                new[j] = "off"
            elif verb in _CARRYING and text == "from" and after:
                new[j] = _in_or_on(words[j + 1 : _np_end(words, j + 1, end)]) + "to"
            elif verb in _CARRYING and text == "to" and after in _DETERMINERS and texts[j + 2 : j + 3] not in (["left"], ["right"]):
                new[j] = "away from"
            else:
                continue
            break
