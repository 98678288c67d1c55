"""The opposite of a caption, by rule: the same hands and objects, the motion run backwards. Nothing here needs PyTorch.

"opens the jar with the left hand" becomes "closes the jar with the left hand". A model that gives both the same
feature is blind to the order of frames, so the second is the hardest negative that a clip can have
(:class:`egohod.loss.opposites.WithOpposites`). The rules refuse rather than guess: an opposite that is true of its
clip teaches the contrary of what is meant. docs/motion.md has the share of captions that have one, and of right ones.

The HOD pipeline stores opposites: a change of the rules raises ``CheckStage.version`` in ``egohod/hod/pipeline.py``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache, lru_cache
from typing import NamedTuple

# --------------------------------------------------------------------------------------------------
# Words
# --------------------------------------------------------------------------------------------------


def word_set(text: str) -> frozenset[str]:
    """The words of a text."""
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
screw <> unscrew; screw in > unscrew; plug in <> unplug; plug > unplug; inject <> extract; aspirate > inject
aspirate up > inject; draw up > inject; draw out > inject; draw > inject
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
_CARRYING = word_set(
    "move slide shift drag pour scoop spoon tip transfer walk step climb bring carry scrape sweep jump run crawl toss "
    "throw ladle pass go push pull"
)
_TURNING = word_set("lean tilt swing bend turn roll flick wipe swipe stretch look point reach rotate spin circle twist")
# Not all of them go in every direction: "scoops up the rice", "wipes down the counter", "throws away the skin".
_UP = (_CARRYING | _TURNING) - word_set(
    "pour scoop spoon tip transfer ladle scrape sweep wipe throw toss pass run go turn"
)
_AWAY_AND_CLOSER = word_set("move push pull slide shift drag lean turn walk step look swing reach go carry")
_IN = word_set("move slide pour walk step climb lean swing bring reach push pull scoop jump crawl")
_DIRECTIONS = (
    "up down, upwards downwards, upward downward, forward backward, forwards backwards, in out, inwards outwards, "
    "inward outward, away closer, clockwise counterclockwise, left right, far near, leftwards rightwards, "
    "leftward rightward"
)
# What comes from a place; all other verbs above are about what goes to it.
_AWAY = word_set(
    "take pick grab get retrieve fetch remove pull lift raise unload detach disconnect unscrew unplug extract aspirate "
    "draw"
)
_TO, _FROM = word_set("in into inside outside on onto to at under"), word_set("from off")
# Without a place these are no motion: "draws the plunger", "returns".
_NEED_A_PLACE = frozenset(
    ["return", "hang", "store", "inject", "connect", "aspirate", "aspirate up", "draw", "draw up", "draw out"]
)
_GOALS = word_set("to into onto towards toward")
# New prepositions other than in and on.
_PREPOSITIONS = {"attach": "to", "connect": "to", "screw": "onto", "push": "into", "load": "into", "inject": "into"}
_PARTICLES = word_set("up down on off in out away back together apart closer aside over around through")
# What things are in, rather than on.
_CONTAINERS = word_set(
    "air drawer fridge freezer refrigerator cupboard cabinet bag box bowl pan pot sink cup mug glass jar bottle can "
    "tin bin basket bucket oven microwave dishwasher washer machine pocket container tube beaker wok saucepan skillet "
    "blender kettle pantry closet tank carton packet pack hole case trash dustbin basin water oil tupperware jug flask "
    "tub purse backpack wallet casserole colander sieve mixer mixture soup dish"
)
DETERMINERS = word_set("the a an his her their your my its our some this that these those both")
PRONOUNS = word_set("it them one each these those this")
_PEOPLE = word_set("c #c o #o x y he she i you we they man woman person lady boy girl guy someone who")
_SUBJECTS = _PEOPLE | word_set("hand hands which and or then also")
_BEFORE_BASE = word_set("to and or will can should must then not i you we they hands also")
_BEFORE_ING = word_set("while by before after and is are was when starts start keeps continues")
# A clause ends here, and at "and" or "to" before an action.
_ENDS = word_set("then while until as so before after but who which that when where using for with by because if")
_ACTIONS = word_set(
    "stir cut wash rinse hold mix press use shake clean wipe chop slice peel dry adjust cook fry flip check continue "
    "start begin make keep let prepare spread sprinkle knead grind crush smash break crack weigh measure taste eat "
    "drink scrub lather tap touch gather arrange separate tear dip soak coat serve stack align examine inspect drain "
    "boil scatter squeeze fill season"
)
# These are more often things than actions, unless a determiner or particle follows.
_THINGS = word_set("cover lock screw wrap fold lift cap tie button seal pack load place plug drop slide tip step roll")
# "takes a look", "gets ready", "pushes the button": nothing of it is taken or pushed away.
_IDIOMS = word_set(
    "look picture pictures photo bite sip step break note notes turn rest seat shower breath care place ready rid used "
    "button buttons switch effort pressure to"
)
# "first left, then right"
_IN_TURN = word_set("left right far near")
_TIMES = {"once": "twice", "twice": "once"}
# "rice that has been washed twice": before the clip.
_PASSIVE = word_set("been was were")
# The demo world's words for a tap and two taps within the same time.
_TOUCHES = {
    ("one", "slow", "touch"): ("two", "quick", "touches"),
    ("two", "quick", "touches"): ("one", "slow", "touch"),
}
_IRREGULAR = {
    "take": ("took", "taking"), "put": ("put", "putting"), "get": ("got", "getting"), "set": ("set", "setting"),
    "shut": ("shut", "shutting"), "lay": ("laid", "laying"), "hang": ("hung", "hanging"), "sit": ("sat", "sitting"),
    "stand": ("stood", "standing"), "tie": ("tied", "tying"), "untie": ("untied", "untying"), "go": ("went", "going"),
    "bring": ("brought", "bringing"), "throw": ("threw", "throwing"), "swing": ("swung", "swinging"),
}  # fmt: skip
_DOUBLED = re.compile(r"(?:un)?(?:zip|drop|grab|wrap|plug|cap|tip|step|drag|run|spin|swim|flip|dip|stir|cut|chop)")
# They come and go with verbs and places, and are no change of what is done.
_SMALL = DETERMINERS | PRONOUNS | _PARTICLES | word_set("with of by and then while")
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


PLACED, CHANGED = dict(_pairs(_PLACING)), dict(_pairs(_CHANGING))
_VERBS = {phrase.split()[0] for phrase in PLACED | CHANGED} | _CARRYING | _TURNING
# From the last form to the first: "put" and "set" are the base form, not the past.
FORM_OF = {_forms(verb)[form]: (verb, form) for form in (ING, PAST, THIRD, BASE) for verb in sorted(_VERBS)}
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


def opposite_fault(caption: str, other: str) -> str | None:
    """Why ``other``, written without the rules, is no opposite of ``caption``: the words at fault; None if it is one.

    It is one if the rules make either of the other. Else only words that the rules exchange may differ, besides
    particles and the like, and all directions that the rules reverse must be reversed. Where they have an opposite of
    neither, one reversed direction is enough; two that only change places ("closes the jar and opens it") are none.
    """
    before, after = _tokens(caption), _tokens(other)
    rules = [opposite(caption), opposite(other)]
    if after == _tokens(rules[0] or "") or before == _tokens(rules[1] or ""):
        return None
    lost, new = (
        set(one) - set(two) - _SMALL - set(senses_of_words()) for one, two in ((before, after), (after, before))
    )
    if lost or new:
        return f"word: {', '.join(sorted(new)) or 'nothing'} for {', '.join(sorted(lost)) or 'nothing'}"
    start, rule, end = (caption, rules[0], other) if rules[0] else (other, rules[1], caption)
    old, actual = Counter(_directions(start)), Counter(_directions(end))
    if rule is None:
        is_reverse = any((reverse, sense) in actual - old for sense, reverse in old - actual)
    else:
        # Words for one another are as good, and particles may be left out: "places" for "puts down".
        wanted = Counter(_directions(rule))
        is_reverse = all(actual[sense] <= wanted[sense] for sense in old - wanted)
        is_reverse = is_reverse and any(actual[sense] >= wanted[sense] for sense in wanted - old)
    return None if is_reverse else "direction: not the reverse"


def _tokens(text: str) -> list[str]:
    return re.findall(r"#?[\w']+", text.lower())


def _directions(text: str) -> list[tuple[str, str]]:
    """The senses of a text's direction words in order; sides of hands are none."""
    words = _tokens(text)
    pairs = zip(words, [*words[1:], ""], strict=True)
    moving = (word for word, after in pairs if word not in ("left", "right") or not after.startswith("hand"))
    return [senses_of_words()[word] for word in moving if word in senses_of_words()]


@cache
def senses_of_words() -> dict[str, tuple[str, str]]:
    """What each word means that the rules exchange, and the reverse of that: words for one another have the same."""
    senses: dict[str, tuple[str, str]] = {}
    for phrase, other in CHANGED.items():
        # By the opposite's opposite, "close" for "shut"; "turn on" differs from its opposite in the particle alone.
        sense, reverse = CHANGED[other].split()[0], other.split()[0]
        if sense != reverse:
            senses |= dict.fromkeys(_forms(phrase.split()[0]), (sense, reverse))
    for phrase in PLACED:
        verb = phrase.split()[0]
        senses |= dict.fromkeys(_forms(verb), ("take", "put") if verb in _AWAY else ("put", "take"))
    for word, other in (_OTHER_WAY | _TIMES | {"before": "after", "after": "before"}).items():
        # "up", "upward" and "upwards" are one
        sense, reverse = (re.sub(r"wards?$", "", each).replace("anti", "counter") for each in (word, other))
        senses[word] = (sense, reverse)
    senses |= dict.fromkeys(("towards", "toward"), senses["closer"])
    # Of a particle and a preposition alike: "takes out", "takes from".
    return senses | dict.fromkeys(_TO, ("to", "from")) | dict.fromkeys(_FROM | {"out"}, ("from", "to"))


def _clause_end(words: list[_Word], i: int) -> int:
    """The number of the first word after the clause of the verb ``i``."""
    for j in range(i + 1, len(words)):
        if words[j].text in _ENDS or (words[j].clause != words[j - 1].clause and not _goes_on(words, j)):
            return j
        # "the plate and the cup" is one thing more, "the plate and stirs" another action.
        if words[j].text in ("and", "or") and _begins_action(words, j + 1):
            return j
        if words[j].text == "to" and not _is_to_a_place(words, j):
            return j
    return len(words)


def _begins_action(words: list[_Word], i: int) -> bool:
    i += i < len(words) and words[i].text.endswith("ly")
    return i < len(words) and words[i].text in _NEXT_ACTION


def _goes_on(words: list[_Word], i: int) -> bool:
    """Whether a list of things goes on after a comma before word ``i``: "the salt, the sugar, and the oil"."""
    texts = [word.text for word in words[i : i + 8]]
    last = next((j for j, text in enumerate(texts) if text in ("and", "or")), None)
    if last is None or _begins_action(words, i + last + 1) or _begins_action(words, i):
        return False
    # Another action, or the other hand's.
    return not (set(texts[: last + 3]) & (_ENDS | _TO | _FROM | {"hand", "hands", "use", "one"})) and all(
        text not in FORM_OF or text in _THINGS for text in texts[:last]
    )


def _is_to_a_place(words: list[_Word], i: int) -> bool:
    """Whether a "to" is followed by a place, and not by a verb ("to season it")."""
    after = words[i + 1].text if i + 1 < len(words) else ""
    if after in DETERMINERS | {"left", "right", "another", "it", "them", "one", "two", "far"}:
        return True
    # Who writes "from sink to counter" writes no determiners; elsewhere a bare word is a verb of any kind.
    is_telegraphic = not any(word.text in ("the", "a", "an", "your") for word in words)
    return bool(after) and after not in _NEXT_ACTION and (is_telegraphic or (i > 1 and words[i - 2].text == "from"))


def _place_end(words: list[_Word], start: int, end: int) -> int:
    """Where the place that begins at ``start`` ends."""
    stops = _TO | _FROM | {"back", "again"}
    return next((j for j in range(start + 1, end) if words[j].text in stops), end)


def _in_or_on(place: list[_Word]) -> str:
    return "in" if _CONTAINERS & {each for word in place for each in (word.text, word.text.removesuffix("s"))} else "on"


def _swap_places(words: list[_Word], caption: str, new: dict[int, str]) -> None:
    """Exchange A and B in "from A to B"."""
    for i, word in enumerate(words):
        if word.text != "from":
            continue
        end = _clause_end(words, i)
        to = next((j for j in range(i + 2, min(i + 11, end)) if words[j].text in ("to", "into", "onto")), end)
        stop = _place_end(words, to + 1, end)
        stop = next((j for j in range(to + 1, stop) if words[j].clause != word.clause or words[j].text == "held"), stop)
        between = {each.text for each in words[i + 1 : to]}
        # "from the board and placed it onto the knife" are two actions.
        if to + 1 >= stop or stop - to > 10 or between & (PRONOUNS | set(FORM_OF)) - _THINGS:
            continue
        one, other = (caption[words[a].start : words[b - 1].end] for a, b in ((i + 1, to), (to + 1, stop)))
        if one.lower() != other.lower():
            new |= dict.fromkeys((*range(i + 1, to), *range(to + 1, stop)), "")
            new |= {i: "from", i + 1: other, to + 1: one}
            # "from the counter into the air", "from the air onto the counter"
            new[to] = "to" if words[to].text == "to" else _in_or_on(words[i + 1 : to]) + "to"


def _is_verb(words: list[_Word], i: int, verb: str, form: int) -> bool:
    """Whether a word that may be a verb is one, by its neighbours."""
    following = words[i + 1].text if i + 1 < len(words) and words[i + 1].clause == words[i].clause else ""
    if verb in _THINGS and i and following not in DETERMINERS | PRONOUNS | _PARTICLES:
        return False
    j = i - 1
    while j >= 0 and (words[j].text.endswith("ly") or words[j].text in ("then", "also", "again", "still", "just")):
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


def _is_last(words: list[_Word], j: int, end: int | None = None) -> bool:
    """Whether the clause (of a verb, up to ``end``) is over after word ``j``, but for a place."""
    if j + 1 >= (len(words) if end is None else end) or words[j + 1].clause != words[j].clause:
        return True
    return words[j + 1].text in _TO | _FROM | _ENDS | {"and", "again"}


def _swap_verbs(words: list[_Word], new: dict[int, str]) -> bool:
    """Exchange verbs, their particles and the preposition of their place; False if one undoes another."""
    done: list[tuple[str, bool, set[str]]] = []
    for i, word in enumerate(words):
        verb, form = FORM_OF.get(word.text, ("", BASE))
        if not verb or not _is_verb(words, i, verb, form):
            continue
        end = _clause_end(words, i)
        texts = [each.text for each in words[:end]]
        # A particle follows at once ("puts down the cup"), or at the end of the clause ("puts the cup down on ...").
        particles = (
            j for j in range(i + 1, end)
            if texts[j] in _PARTICLES and j not in new and texts[j + 1 : j + 2] != ["of"]
            and (j == i + 1 or _is_last(words, j, end))
        )  # fmt: skip
        at = next(particles, end)
        if at == i + 1 < end - 1 and texts[at] in ("in", "on") and _in_or_on(words[end - 1 : end]) == "in":
            # "put in fridge" names the place alone.
            at = end
        phrase = f"{verb} {texts[at]}" if at < end else verb
        result = PLACED.get(phrase) or CHANGED.get(phrase)
        thing = [text for text in texts[i + 1 : i + 4] if text not in DETERMINERS]
        if result is None or _IDIOMS & set(thing[:1]) or (thing[:1] in (["left"], ["right"]) and "hand" in thing):
            continue
        # "takes it from the table to the sink" is reversed already.
        if any(j in new for j in range(i + 1, end)):
            continue
        is_placing, is_away, place = phrase in PLACED, verb in _AWAY, end
        if is_placing:
            start = at + 1 if at < end else i + 1
            places = (j for j in range(start, end - 1) if _is_place(texts, j, _FROM if is_away else _TO))
            place = next(places, end)
        if place == end and (phrase in _NEED_A_PLACE or (is_away and _GOALS & set(texts[i:end]))):
            # "takes the pan to the sink": it is not put there.
            continue
        if verb == "push" and place < end and texts[place] not in ("in", "into", "inside"):
            place = end
        things = set(texts[i + 1 : place]) - DETERMINERS - _PARTICLES
        for earlier, was_away, before in done:
            is_undone = phrase in (PLACED.get(earlier), CHANGED.get(earlier)) or (is_placing and was_away != is_away)
            if is_undone and (not things or not before or things & (before | PRONOUNS)):
                return False
        done.append((phrase, is_away, things))
        other, _, particle = result.partition(" ")
        new[i] = _forms(other)[form]
        if at < end:
            new[at] = particle
        elif particle or (other == "put" and place == end):
            # "takes the cup", "puts down the cup"
            new[i] += f" {particle or 'down'}"
        if place < end:
            where = place + (2 if texts[place + 1] == "of" else 1)
            new |= dict.fromkeys(range(place, where), "")
            to = _PREPOSITIONS.get(other) or _in_or_on(words[where : _place_end(words, where, end)])
            new[place] = "from" if other in _AWAY else to
        for j in range(i + 1, end - 1):
            # "takes the cup in the right hand", "puts down the cup with the right hand"
            if is_away and texts[j] == "in" and {"hand", "hands"} & set(texts[j + 1 : j + 4]):
                new[j] = "with"
    return True


def _is_place(texts: list[str], j: int, prepositions: frozenset[str]) -> bool:
    """Whether the place of a verb begins with word ``j``, to which or from which something is moved."""
    if texts[j : j + 2] == ["out", "of"]:
        return prepositions is _FROM
    # "the glass next to the sink", "the lid attached to it"
    is_of_thing = texts[j] == "to" and (texts[j - 1] in ("next", "close") or texts[j - 1].endswith("ed"))
    return texts[j] in prepositions and not is_of_thing


def _swap_directions(words: list[_Word], new: dict[int, str]) -> None:
    """Exchange directions, of all verbs and of those that stay; once and twice, before and after."""
    texts = [word.text for word in words]
    # "up and down" is the same backwards.
    way = {word: other for word, other in _OTHER_WAY.items() if other not in texts or word in _IN_TURN}
    for i, text in enumerate(texts):
        before, after = texts[i - 1] if i else "", texts[i + 1] if i + 1 < len(texts) else ""
        is_first = i == 0 or words[i - 1].clause != words[i].clause
        if i in new:
            continue
        if re.search(r"wards?$|clockwise$", text) and text in way:
            new[i] = way[text]
        elif text in _TIMES and not is_first and _is_last(words, i) and not _PASSIVE & set(texts[max(0, i - 7) : i]):
            new[i] = _TIMES[text]
        elif text in ("before", "after") and after.endswith("ing") and not is_first:
            # At the start of a sentence it names what came earlier, which the clip does not show.
            new[i] = "after" if text == "before" else "before"
        elif (before, text, after) in _TOUCHES:
            new |= dict(zip(range(i - 1, i + 2), _TOUCHES[before, text, after], strict=True))
        elif before in ("first", "then") and text in _IN_TURN:
            new[i] = way[text]
        elif text in ("left", "right") and after not in ("hand", "hands", "of"):
            # "to the left", "over the left side"
            j = i - 2 if before in DETERMINERS else i - 1
            leads = texts[j] in ("to", "towards", "toward") or (texts[j], after) == ("over", "side")
            if leads and j >= 0 and j not in new and texts[i + 1 : i + 3] != ["side", "of"]:
                new[i] = way[text]
    for i, word in enumerate(words):
        verb, form = FORM_OF.get(word.text, ("", BASE))
        if i not in new and verb in _CARRYING | _TURNING and _is_verb(words, i, verb, form):
            end = _clause_end(words, i)
            # One change is enough: "slides it to the left into the box".
            changes = ({} if j in new else _direction(verb, texts[:end], i, j, words, way) for j in range(i + 1, end))
            fresh = not any(j in new for j in range(i + 1, end))
            new |= next((change for change in changes if change), {}) if fresh else {}


def _direction(verb: str, texts: list[str], i: int, j: int, words: list[_Word], way: dict[str, str]) -> dict[int, str]:
    """What changes if word ``j`` is the direction of the verb ``i`` or leads to its place; nothing if it is neither."""
    text, after, rest = texts[j], texts[j + 1] if j + 1 < len(texts) else "", set(texts[j + 1 :])
    is_last = _is_last(words, j, len(texts))
    if verb == "flick" and text in ("away", "back") and is_last:
        return {j: "back" if text == "away" else "away"}
    if verb in _AWAY_AND_CLOSER and (text, after) in (("away", "from"), ("closer", "to")):
        return {j: "towards", j + 1: ""} if text == "away" else {j: "away", j + 1: "from"}
    if text in ("towards", "toward") and after:
        return {j: "away from"}
    if text in way and (is_last or j == i + 1):
        # "pours in the milk" has a direction, "walks in the park" a place.
        is_place = after and (text in ("in", "out") and (verb != "pour" or rest & {"of", "from", "in", "into"}))
        is_place = is_place or (text in ("left", "right") and after in DETERMINERS)
        verbs = {"up": _UP, "down": _UP, "away": _AWAY_AND_CLOSER, "closer": _AWAY_AND_CLOSER, "in": _IN, "out": _IN}
        return {} if is_place or verb not in verbs.get(text, (verb,)) else {j: way[text]}
    if verb not in _CARRYING or not after:
        return {}
    pours_in = verb == "pour" and text in ("in", "on") and "into" not in rest
    if text in ("into", "onto") or pours_in:
        return {j: "out of" if text in ("in", "into") else "off"}
    if (text, after) == ("out", "of"):
        return {j: "into", j + 1: ""}
    if text == "from":
        # "scoops out the rice from the pot"
        out = {texts.index("out", i): ""} if "out" in texts[i:] else {}
        return out | {j: _in_or_on(words[j + 1 : _place_end(words, j + 1, len(texts))]) + "to"}
    if (
        _is_place(texts, j, frozenset(("to",)))
        and after in DETERMINERS
        and texts[j + 2 : j + 3] not in (["boil"], ["left"], ["right"])
    ):
        return {j: "away from"} if "into" not in rest else {}
    return {}
