"""Templates for prompts and for the verifier's messages, which `--prompts FILE` replaces.

    python -c "from games.prompts import PROMPTS; print(PROMPTS['gp-l'])"

A field is a plain {name}. All other syntax of str.format is refused: a width of 999999999 would fill the
memory, and an attribute or an index would look into objects.
"""
import json
import string
from pathlib import Path

_ANSWER = ('Answer with one JSON object: {{"cards": [the {count} ranks, as in "A", "10", "Q"], '
           '"number": [their values], "formula": "an equation that ends in ={target}"}}')
_RULE = (" with + - * / and parentheses, to make {target}. A counts as 1. {rule} "
         "Other cards count as printed.\n")
_ACTIONS = "Actions: forward(), stop() and {actions}.\nObservations (O) and actions (A) so far:\n{history}\n"
_STEP = ('Answer with one JSON object: {{"current observation": what is seen here, '
         '"current instruction": the sentence to follow now, "action": the action to take}}')
PROMPTS = {
    "gp-l": "Use the values of the {count} cards, each exactly once," + _RULE + "Cards: {cards}\n" + _ANSWER,
    "gp-vl": "The image shows {count} playing cards. Use their values, each exactly once," + _RULE + _ANSWER,
    "rule_same": "J, Q and K all count as {J}.",                # {rule}, when the three are worth the same
    "rule_each": "J counts as {J}, Q as {Q} and K as {K}.",     # {rule}, otherwise
    "no_json": "There is no JSON with a formula.",
    "no_target": "The formula must end in ={target}.",
    "unparsable": "The formula cannot be read.",
    "foreign_number": "{number} is not one of the numbers.",
    "used_twice": "{number} is used too often.",
    "left_out": "{number} is left out.",
    "division_by_zero": "The formula divides by zero.",
    "wrong_value": "The formula gives {number}, not {target}.",
    "unfinished": "The formula cannot be read.",
    "float_miss": ".",                                          # all that the released code says
    "misread": "The cards are misread.",
    "correct": "Correct.",
    "virl-l": "Find the way by these instructions:\n{instructions}\n" + _ACTIONS + _STEP,
    "virl-vl": "Find the way by these instructions:\n{instructions}\n"
               "The image shows four street views: front, right / back, left.\n" + _ACTIONS + _STEP,
    "describe_cards": "The image shows {count} playing cards. What are they?",
    "describe": "The image shows four street views: front, right / back, left. What is seen here?",
    "absolute": "turn_direction(x), where x is north, northeast, east, southeast, south, southwest, west or "
                "northwest",
    "relative": "turn_direction(x), where x is left, right, slightly left or slightly right",
    "no_action": "There is no JSON with an action.",
    "unknown_action": "There is no such action.",
    "wrong_action": "The action is wrong.",
    "right_action": "Correct.",
    "no_observation": "There is no current observation.",
    "missed_landmark": "A landmark here is not in the observation.",
    "false_landmark": "There is no such landmark here.",
    "missed_intersection": "This is an intersection.",
    "false_intersection": "This is no intersection.",
}


def _fields(template):
    """Return the set of a template's fields, each with its conversion and format, if it has them."""
    parts = string.Formatter().parse(template)
    return {":".join(filter(None, (name, conversion, spec)))
            for _, name, spec, conversion in parts if name is not None}


def load_prompts(path):
    """Return PROMPTS with the templates replaced that a JSON file {key: template} has.

    ValueError (one line) that names the file and the key: an unknown key, not a template, a field that its
    default has not, or a task prompt ("gp-l", ...) that lacks a field of its default. Only {count} may be
    left out."""
    try:
        prompts = dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (TypeError, ValueError, RecursionError) as error:        # not JSON, not UTF-8, or [[[[[...
        raise ValueError(f"{path}: not a JSON object of templates: {error}") from None
    for key, template in prompts.items():
        if key not in PROMPTS:
            raise ValueError(f"{path}: unknown key {key!r:.80}, expected one of {', '.join(PROMPTS)}")
        known = _fields(PROMPTS[key])
        try:
            used = _fields(template)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {key!r} is not a template ({{{{ and }}}} stand for braces): {error}"
                             ) from None
        if foreign := used - known - {"target"}:
            raise ValueError(f"{path}: {key!r} knows the fields {sorted(known | {'target'})}, "
                             f"not {min(foreign)!r:.80}")
        if "-" in key and known - used - {"count"}:
            raise ValueError(f"{path}: {key!r} lacks the fields {sorted(known - used - {'count'})}")
    return PROMPTS | prompts
