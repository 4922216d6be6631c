"""Judge the observation, the part of a navigation answer that says what is seen. The landmark's name and the
intersection must be right; wording and sides (left, right) do not matter.

    python -c "from games.observations import claims; print(claims('I see Joe’s Bar, but no intersection'))"

An observation is cut into clauses. Words that name nothing ("I can see the", "is on your left") are taken off
both ends of a clause. The rest is one name and must equal the landmark's: a list, a longer name that contains
it, or an extra guess is wrong. A negated clause denies its subject instead of claiming it.
"""
import re
import unicodedata

HERE, ELSEWHERE = "\ue000", "\ue001"    # stand for the landmark's name and for other names of the route
MAX_OBSERVATION = 2_000     # characters; one that says so much more than the truth claims too much

_QUOTES = str.maketrans("“”„‟«»″" "‘’‚‛`´′" + HERE + ELSEWHERE, '"' * 7 + "'" * 7 + " " * 2)

# Words that name nothing. Beside a name only some of them end it: in "I see Park" the name is Park, in
# "Corner Park" it is not.
_ARTICLES = frozenset("a an the another".split())
_DENYING = frozenset("""
    no not none nothing never neither nor without cannot nowhere non n/a na null unable fail fails
    failed absent absence lack lacks lacking false isnt arent wasnt dont doesnt didnt cant couldnt
""".split())
_VERBS = _DENYING | frozenset("""
    : = i we you it they there here is are am was were be been being has have had do does did can could
    may might must will seem seems appear appears there's it's i'm i've you're you've we're we've that's
    here's see sees saw seen seeing observe observes observed observing notice noticed spot spotted find
    found view viewing look looks looking think say says located situated standing stands stand stop
    stopped know facing with that which where and or yes true show shows showing based
""".split())
_PLACES = frozenset("""
    on to at in of by near nearby next from for as like my your our its this toward towards around along
    across some any just only also still now currently clearly directly immediately ahead visible
""".split())
_NOUNS = frozenset("""
    these those what who when up down into through then so straight forward close else other more
    further additional anything something one two three four front left right behind rear back side hand
    corner direction slightly landmark landmarks image images picture pictures photo photos views street
    streets road roads building buildings tree trees car cars traffic light lights crosswalk sidewalk
    sky city way ways junction crossroads four-way three-way 4-way 3-way empty quiet busy large small
    observation walking walk moving move going go heading continue continuing maybe perhaps possibly
    probably current both sides middle continues me us
""".split())
_IDLE = _ARTICLES | _VERBS | _PLACES | _NOUNS
_LANDMARK = {"landmark", "landmarks"}
# "No other landmarks" contradicts no landmark.
_BESIDES = frozenset("other else more further additional".split())
# A clause with one of these stands for itself: "no landmarks and an intersection" claims the second.
_OWN = _ARTICLES | frozenset("i we you it this there there's it's is are see observe".split())

_SIDE = r"on (?:your|my|the|our) (?:\w+ )?(?:front|right|left|behind)\b"
_POSITIVE = re.compile(r"\b(?:no doubt|not only|can(?:no|')t miss)\b")      # these deny nothing
# A denial ends here: "no landmarks nearby you observe ...", "no landmarks at this intersection".
_PAUSE = re.compile(r"\bno landmarks? nearby\b(?! n?or\b)|"
                    r"\blandmarks?(?= (?:at|near|by) (?:an?|the|this)\b[^;]*intersect)")
# Parts two clauses; "or" does not, as a denial goes on across it.
_JOINT = re.compile(r"(\band\b|[;,!|•()\n]|\.(?!\d)| [-–—] |—|"
                    r"\b(?:but|while|although|though|however|yet|whereas)\b)|(?=\bwith(?:out| no)\b)")
# "You have reached a wide intersection": whatever the verb and the adjective are, they are no name.
_VERB = (r"(?:(?:have|are|am|will|now|just|also|can) )*"
         rf"(?!(?:{'|'.join(_DENYING)})\b)[a-z]+ (?:(?:at|to|into|near|by|upon|in|on) )*")
_CROSSING = r"(?:an?|another|the|this) (?:[\w-]+ )?intersection"
_REACHED = re.compile(
    rf"^(?:(?:i|we|you)(?:'m|'re|'ve)? {_VERB}(?={_CROSSING}|(?:the )?[{HERE}{ELSEWHERE}])|"
    rf"(?:[a-z]+(?:ing|ed) |(?:it|this) (?:is |has )?)(?:(?:at|to) )*(?={_CROSSING}))")
_ADJECTIVE = re.compile(r"\b(an?|another) [a-z0-9-]+ (?=intersection)")


def fold(text):
    """Return a text as it is compared: one case, one kind of quotes and of white space, composed (NFC)."""
    text = unicodedata.normalize("NFC", text).casefold().translate(_QUOTES)     # casefold takes some apart
    return " ".join(unicodedata.normalize("NFC", text).split())


def _denying(word):
    return word in _DENYING or word.endswith("n't")


def _idle(word):
    return (word in _IDLE or "intersection" in word or _denying(word)
            or re.fullmatch("(o_)?[0-9]+", word))       # O_4: of the history


def _words(text):
    return [*filter(None, (part.strip("\"'[]{}<>*?-") for part in re.findall(r"[:=]|[^\s:=]+", text)))]


def _hide(said, name, mark):
    """Put `mark` where a name stands as a whole; one of idle words ("The Corner") only where it is told."""
    name = fold(name)
    end = r"(?= is on your )" if all(map(_idle, _words(name))) else r"(?!\w)"
    return re.sub(rf"(?<!\w){re.escape(name)}{end}", mark, said) if name else said


def _name(words, told):
    """Return (the words before a name, the name). told: "is on your left" follows, and ends the name."""
    telling = [i for i, word in enumerate(words) if not _idle(word)]
    if not telling:
        return words, ""
    first, last = telling[0], telling[-1] + 1
    # A verb, or a verb and a place, leads to a name: "I am at the Park". Other words before it belong to it.
    lead = words[:first]
    while lead and lead[-1] in _ARTICLES:
        lead.pop()
    verbs = [i for i, word in enumerate(lead) if word in _VERBS or _denying(word)]
    if lead and not (verbs and (verbs[-1] == len(lead) - 1 or lead[-1] in _PLACES)):
        first = verbs[-1] + 1 if verbs else 0
    # So do those that follow, unless a verb or a place ends it: "Park on the left", but "Park Street".
    if told or words[last:] and words[last] not in _VERBS | _PLACES and not _denying(words[last]):
        last = len(words)
    return words[:first], re.split(r" (?:is|are) ", " ".join(words[first:last]))[0]


def _clauses(said):
    """Yield (words, name, whether it is denied, whether a side is told) of each clause."""
    parts, denied = ["", *_JOINT.split(_PAUSE.sub(r"\g<0>;", _POSITIVE.sub(" ", said)))], False
    for joint, clause in zip(parts[::2], parts[1::2]):
        clause = _ADJECTIVE.sub(r"\1 ", _REACHED.sub("there is ", clause.strip()))
        words, told = _words(clause), re.search(rf" is {_SIDE}", clause)
        lead, name = _name(_words(clause[:told.start()]) if told else words, told)
        shared = joint == "and" and denied and not _OWN & {*words}      # "no landmarks and intersections"
        denied = any(map(_denying, lead if told else words)) or shared  # not in "Bar None is on your left"
        yield {*words}, name, denied, re.search(rf"\b{_SIDE}", clause)


def claims(observation, landmark="", others=()):
    """Return (names, is the landmark denied?, is an intersection claimed?, is one denied?).

    names: the landmarks that are claimed; HERE stands for `landmark`, "" for one without a name."""
    said = fold(re.sub(r"[\r\n]+", " ; ", observation))
    said = _hide(said, landmark, HERE)
    for name in sorted(others, key=len, reverse=True):      # one may hold another
        said = _hide(said, name, ELSEWHERE)
    names, unseen, claimed, refused = set(), False, False, False
    for words, name, denied, side in _clauses(said):
        if any("intersection" in word for word in words):
            claimed, refused = claimed or not denied, refused or denied
        if not denied and (name or side or words & _LANDMARK):      # "it is on your left" claims, too
            names.add(name)
        if denied and not words & _BESIDES:
            unseen |= name == HERE or bool(words & _LANDMARK) or words in ({"none"}, {"nothing"})
    return names, unseen, claimed, refused


def wrong_observation(observation, truth, landmark, intersection, others=()):
    """Return what is wrong with an observation, as keys of PROMPTS: of the landmark and of the intersection.

    truth: the observation in the expert's words; landmark: the name here, or None; others: of the route."""
    if observation is None:
        return ["no_observation"]
    if fold(observation).strip(" .;") == fold(truth).strip(" .;"):
        return []
    if len(observation) > MAX_OBSERVATION:      # the time that clauses take is bounded here
        return ["missed_landmark" if landmark else "false_landmark"]
    names, unseen, claimed, refused = claims(observation, landmark or "", {*others} - {landmark})
    wrong = []
    if landmark and (HERE not in names or unseen):
        wrong.append("missed_landmark")
    elif names - {HERE, ""} or names and not landmark:
        wrong.append("false_landmark")
    if claimed != intersection or claimed and refused:
        wrong.append("missed_intersection" if intersection else "false_intersection")
    return wrong
