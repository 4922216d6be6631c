"""Rules for values that come out of files, and the one line that says what is wrong with one.

    check("m/config.json", {"vocab_size": whole(1, 2**20)}, {"vocab_size": "9"})
    ValueError: m/config.json: vocab_size = '9': expected a whole number from 1 to 1048576
"""
import math
from collections.abc import Callable
from typing import NamedTuple


class Rule(NamedTuple):
    expected: str
    holds: Callable                         # value -> bool, for any value that JSON can hold


def whole(low, high):
    """Ask for an int. JSON's true is none, though Python says so."""
    return Rule(f"a whole number from {low} to {high}", lambda v: type(v) is int and low <= v <= high)


def number(low, high=math.inf):
    """Ask for low < value < high, so that NaN and infinity do not pass."""
    return Rule(f"a number above {low:g}" + (f" and below {high:g}" if high < math.inf else ""),
                lambda v: type(v) in (int, float) and low < v < high)


def only(*values):
    return Rule(" or ".join(map(repr, values)), lambda v: any(type(v) is type(x) and v == x for x in values))


def several(rule, count=None):
    """Ask for a list of `count` values that hold to `rule`."""
    return Rule(f"a list of {'values' if count is None else count}, each {rule.expected}",
                lambda v: type(v) is list and count in (None, len(v)) and all(map(rule.holds, v)))


def either(*rules):
    return Rule(" or ".join(rule.expected for rule in rules), lambda v: any(rule.holds(v) for rule in rules))


SWITCH = only(True, False)
OBJECT = Rule("an object, {...}", lambda v: type(v) is dict)
TOKEN = whole(0, 2**31)
TOKENS = either(TOKEN, several(TOKEN))


def check(file, table, values, prefix="", needed=()):
    """Hold a JSON object to a table, {name: Rule}; ValueError. null counts as absent; other names pass."""
    for name in needed:
        if values.get(name) is None:
            raise ValueError(f"{file}: {prefix}{name} is missing: expected {table[name].expected}")
    for name, rule in table.items():
        if values.get(name) is not None and not rule.holds(values[name]):
            raise wrong(file, prefix + name, values[name], rule.expected)


def wrong(file, name, value, expected):
    """Make the error: one line, however long the value is."""
    text = repr(value)
    text = text if len(text) <= 80 else text[:77] + "..."
    return ValueError(f"{file}: {name} = {text}: expected {expected}")
