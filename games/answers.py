r"""Parse any text into the fields of an answer, in linear time and without ever raising an exception.

    python -c "from games.answers import read_answer; print(read_answer('{cards: (a, 2), formula: 2×1=2}'))"

The answer is an object in braces that has the key `formula` or `action` itself, not in an object inside it.
If there are several, the one that ends last counts, so of two nested ones the outer. An object in a string
does not count. What follows a key is decoded as JSON if it is valid JSON. What is not valid JSON is accepted
as on the left, and not as on the right:

| accepted                                                | not accepted                                 |
|---------------------------------------------------------|----------------------------------------------|
| prose and code fences around it, no brace at its end    | no brace at its start                        |
| keys in any case; quotes of any kind or none            | an answer in a string of another answer      |
| too many or too few commas, // comments, line breaks    | over MAX_TOKENS braces, strings and words    |
| the whole answer encoded as a JSON string               |                                              |
| formula: white space of all kinds, a final full stop    | digits spaced (1 2) or in other scripts, 1.5 |
| full-width, small and bold signs and digits             | 2² 3½ ② ⒋, which are no plain digits         |
| x × · ∙ ∗ ✖ ÷ ∕ – − and the like                        | words, ^ ! // **, [ ] { } as parentheses     |
| \times \cdot \ast \div \left \right                     | \frac and other LaTeX                        |
| cards: "Ace of Spades", q, T, 10                        |                                              |
| action: capitals, quotes, spaces around parentheses     | two actions, a full stop                     |

A formula is the whole string, to its end: "(7+8-7)*3=24, no wait, =25" claims 25.
"""
import json
import re
import unicodedata
from contextlib import suppress
from itertools import pairwise

MAX_TOKENS = 2_000      # braces, strings, words between commas; an answer has some 30
MAX_FORMULA = 200       # characters; bounds the verifier's recursion and the size of its integers

# A quote ends a string if what comes next may follow a string; an apostrophe or a quotation inside does not.
# In JSON a quote without a backslash does. The quantifiers are possessive (*+): nothing is tried twice.
_QUOTES = "\"'`“”„«»‘’"
_KEY = rf"[{_QUOTES}][\w ]{{1,40}}[{_QUOTES}]\s*+:"
_ENDS = rf"(?=[ \t\r]*+(?:\n|\Z)|\s*+(?:[][,:{{}})`]|//|{_KEY}))"
_QUOTED = "|".join(
    rf"[{opening}](?:[^{closing}\\]|\\(?:.|\Z)|[{closing}](?!{_ENDS}))*+([{closing}]|\Z)"
    for opening, closing in (('"', '"'), ("'", "'"), ("“”„«»", "“”«»\""), ("‘’`", "‘’`'")))
_WORD = rf"[^\s{{}},:\[\]{_QUOTES}][^{{}},:\[\]\n]*+"
_STRING = re.compile(rf"(?:{_QUOTED})(?=\s*(?://|\n|\Z))", re.DOTALL)     # and nothing else on its line
_TOKEN = re.compile(rf"(?:[\s,\[\]]|```\w*+|(?<!:)//[^\n]*+)*+"
                    rf"(?:(?P<brace>[{{}}])|(?P<name>{_QUOTED}|{_WORD})\s*+(?P<colon>:)?|:|\Z)", re.DOTALL)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|.)", re.DOTALL)     # \x: of Python
_EDGES = " \t\r\n,`"
_MARKS = _QUOTES + "\\"     # a backslash: of a string in a string


def _unescape(match):
    code = match[1]
    if len(code) > 1:
        return chr(int(code[1:], 16))
    return {"n": "\n", "t": "\t", "r": "\r"}.get(code, code if code in _MARKS + "/" else match[0])


def _key(name):
    """Return a key in lower case, without quotes and escapes."""
    key = _ESCAPE.sub(_unescape, name).strip(_MARKS + " \n").lower()
    return " ".join(key.split())


def _objects(text, keys):
    """Return {key: the object that ends last among those that have it} in one pass; an object is a list of
    its own (key, start of the key, start of the value), and at last ("", its end, its end)."""
    found, unclosed, at = {}, [], 0

    def close(end):
        entries = [*unclosed.pop(), ("", end, end)]
        found.update(dict.fromkeys(keys & {key for key, *_ in entries}, entries))
    for _ in range(MAX_TOKENS):
        if not unclosed:        # quotes in prose mean nothing: go on at the next brace
            at = text.find("{", at)
            if at < 0:
                return found
        token = _TOKEN.match(text, at)      # matches anywhere, if only nothing at the end
        at = token.end()
        if token["brace"] == "{":
            unclosed.append([])
        elif token["brace"]:
            close(at - 1)
        elif token["colon"]:
            unclosed[-1].append((_key(token["name"]), token.start("name"), at))
        elif at == len(text):
            break
    else:
        return {}
    while unclosed:     # all of them end here, the outermost last
        close(at)
    return found


def _value(text):
    """Return the str or list after a key: by JSON, else a string in any quotes, else the text itself."""
    text = text.strip(_EDGES)
    with suppress(ValueError, RecursionError):      # numbers stay text: int() refuses 5,000 digits
        value = json.loads(text, strict=False, parse_int=str, parse_float=str, parse_constant=str)
        return value if isinstance(value, (str, list)) else ""
    if string := _STRING.match(text):
        closed = string[string.lastindex]
        text = string[0][1:-1] if closed else string[0].strip(_EDGES + _MARKS + "}]")
        text = re.sub(rf"\A([{_QUOTES}])(.*)\1\Z", r"\2", text, flags=re.DOTALL)        # ""1+1=2""
    else:
        text = text.strip(_EDGES + _MARKS)
    return _ESCAPE.sub(_unescape, text)


def _fields(text, *keys):
    """Return the values of `keys`, the most wanted first, all from one object; None where it lacks a key."""
    if text.lstrip()[:1] == '"':        # json.dumps of an answer
        with suppress(ValueError):
            text = json.loads(text, strict=False)
    objects = _objects(text, set(keys))     # without an action the observation is judged all the same
    entries = next((objects[key] for key in keys if key in objects), [])
    own = {key: _value(text[start:end])
           for (key, _, start), (_, end, _) in pairwise(entries) if key in keys}
    return [own.get(key) for key in keys]


def _items(value):
    """Return the strings of a list, or of a text that looks like one."""
    if isinstance(value, list):
        return [item if isinstance(item, str) else "" for item in value]
    return [part for part in value.strip("[]() \n").split(",") if part.strip()]


_RANKS = {"ACE": "A", "T": "10", "TEN": "10", "JACK": "J", "QUEEN": "Q", "KING": "K"}
_SIGNS = str.maketrans("xX×·•∙⋅∗⁎✕✖⨉⨯" "÷∕⁄➗" "−–—‐‑‒➖" "➕。\ufe0f",     # U+FE0F: shown as an emoji
                       "*" * 13 + "/" * 4 + "-" * 7 + "+. ")
_LATEX = {"times": "*", "cdot": "*", "ast": "*", "div": "/", "left": " ", "right": " "}
_LATEX_SIGN = re.compile(rf"(?<!\\)\\++({'|'.join(_LATEX)})(?![A-Za-z])")
_FORMS = ("<wide>", "<narrow>", "<small>", "<font>")     # NFKC of <super>, <fraction>, ... changes the value


def _plain(character):
    shown = unicodedata.decomposition(character).startswith(_FORMS)
    return unicodedata.normalize("NFKC", character) if shown else character


def _formula(text):
    """Return a formula with plain signs and digits and no full stop; one that is too long as it is."""
    if len(text := text.strip()) > MAX_FORMULA:
        return text
    text = " ".join("".join(map(_plain, text)).translate(_SIGNS).split())
    return text.removesuffix(".").rstrip()


def read_answer(text):
    """Return (cards, formula) of an answer to GeneralPoints; None for a field that is not there.

    cards: ranks in capitals ("A", "10", "Q"); formula: in plain signs, "" if not text."""
    text = _LATEX_SIGN.sub(lambda sign: _LATEX[sign[1]], text)      # JSON makes a tab and "imes" of \times
    formula, cards = _fields(text, "formula", "cards")
    if cards is not None:   # "Ace of Spades", 'q', 10, T
        words = [re.search("[A-Z0-9]+|$", item.upper())[0] for item in _items(cards)]
        cards = [_RANKS.get(word, word) for word in words]
    if formula is not None:
        formula = _formula(formula) if isinstance(formula, str) else ""
    return cards, formula


def read_step(text):
    """Return (current observation, action) of an answer to Navigation.

    None for a field that is not there, "" for one that is not a string. The action is in lower case, without
    quotes and without needless spaces."""
    fields = _fields(text, "action", "current observation")
    action, observation = ["" if isinstance(value, list) else value for value in fields]
    if action is not None:
        action = re.sub(rf"[\s{_QUOTES}\\]+", " ", action.lower()).strip()
        action = re.sub(" ?([()]) ?", r"\1", action)
    return observation, action
