"""Check values read from files against rules, and say in one line what is wrong with a value.

    check("m/config.json", {"vocab_size": integer(1, 2**18)}, {"vocab_size": "9"})
    ValueError: m/config.json: vocab_size = '9': expected an integer from 1 to 262144
"""
from collections.abc import Callable
from typing import NamedTuple

from harness.ranges import integer


class Rule(NamedTuple):                     # a ranges.Kind serves as one, too
    expected: str
    holds: Callable                         # value -> bool, for any value that JSON can hold


def multiple(of, name):
    """Ask for a whole number that `of`, the value called `name`, divides."""
    return Rule(f"a multiple of {name} = {of}", lambda v: v % of == 0)


def below(end, name):
    """Ask for less than `end`, the value called `name`."""
    return Rule(f"a number below {name} = {end}", lambda v: v < end)


def equal(value, name):
    """Ask for `value`, which is called `name` elsewhere."""
    return Rule(f"{name} = {value}", lambda v: v == value)


def only(*values):
    """Ask for one of these, of the same type: 0 is not False."""
    texts = [repr(value) for value in values]
    return Rule(" or ".join(texts), lambda v: repr(v) in texts)


def list_of(rule, count=None):
    """Ask for a list of `count` values that hold to `rule`."""
    return Rule(f"a list of {count or 'values'}, each {rule.expected}",
                lambda v: type(v) is list and count in (None, len(v)) and all(map(rule.holds, v)))


SWITCH = only(True, False)
OBJECT = Rule("an object, {...}", lambda v: type(v) is dict)
TOKEN = integer(0, 2**31)
TOKENS = Rule(TOKEN.expected + ", or a list of them", lambda v: TOKEN.holds(v) or list_of(TOKEN).holds(v))
SPECIAL = {"bos_token_id": TOKEN, "eos_token_id": TOKENS, "pad_token_id": TOKEN}


def check(file, table, values, prefix="", needed=()):
    """Hold a JSON object to a table, {name: Rule}; ValueError, one line however long a value is. null counts
    as absent; other names pass."""
    for name, rule in table.items():
        value = values.get(name)
        if value is None and name in needed:
            raise ValueError(f"{file}: {prefix}{name} is missing: expected {rule.expected}")
        if value is not None and not rule.holds(value):
            raise ValueError(f"{file}: {prefix + name:.80} = {value!r:.80}: expected {rule.expected}")
