"""Reading answers of any shape, by hand: what is read, what is not, what must not be taken for the answer.

    pytest tests/test_answers.py -k million --durations=0       # how long hostile text takes
"""
import json
import signal

from games.answers import read_answer, read_step
from games.rails import Point
from games.verifier import judge, judge_step
from tables import cases, lines, rows

CARDS, NUMBERS = ["A", "2", "3", "4"], [1, 2, 3, 4]


def code(text):
    return judge(text, CARDS, NUMBERS).code


# ----------------------------------------------------------------------------------------------- which object

# @ stands for a right formula: it is this answer's; ↵ for a line break
SURROUNDED = lines(r"""
    {"formula": "@"}
    x {"formula": "@"} y
    <answer>{"formula": "@"}</answer>
    \boxed{"formula": "@"}
    {"formula": "@"} {"other": 1}
    {"answer": {"formula": "@"}}
    {"answer": [{"formula": "@"}]}
    {"formula": "1+1=24"} No: {"formula": "@"}
    {"note": "}", "formula": "@"}
    {"note": "{", "formula": "@"}
    The set {1,2,3,4} gives {"formula": "@"}
    {stray and {"formula": "@"}
    A 3" pipe {"formula": "@"}
    {{"formula": "@"}}
    {"formula": "@"}}}
    {"formula": "@"
    {"formula": "@
    {"formula": "@}
    {"answer": {"formula": "@"}
    {"formula": "@"↵```↵Done.
    {"formula": "@"↵Done.
    {"formula": "@", "cards": ["A", "2
    {"formula": "1+1=24"} {"formula": "@"
    {\"formula\": \"@\"}""") + [
    json.dumps('{\n  "cards": ["A"],\n  "formula": "@"\n}')]
DIALECTS = lines(r"""
    {'formula': '@'}
    {`formula`: `@`}
    {“formula”: “@”}
    {„formula“: „@“}
    {«formula»: «@»}
    {formula: @}
    {FORMULA : "@" }
    {"\u0066ormula": "@"}
    {"formula"↵:↵"@"}
    {'formula': "@"}
    {"formula": “@"}
    {"formula": ""@""}
    {"formula": "@",}
    {,"formula": "@"}
    {"cards": ["A" "2"] "number" [1 2] "formula": "@"}
    {↵```json↵"formula": "@"↵```↵}
    {"a": "b" "formula": "@"}
    {"a": "b"↵"formula": "@"}
    {"formula": "@" // all of them↵}
    {// the set↵"formula": "@"}
    {url: http://x.org/a, formula: @}
    {"cards": ["A", "2", "3", "4], "number": [1, 2, 3, 4], "formula": "@"}
    {'note': 'it's fine', 'formula': '@'}
    {"note": "he said "hi" to me", "formula": "@"}
    {"note": "a\"", "formula": "@"}
    {"note": "a\\", "formula": "@"}
    {'note': 'a\\', 'formula': '@'}""") + [
    '{"n": NaN, "big": ' + "9" * 5000 + ', "formula": "@"}',
    '{"deep": ' + "[" * 900 + "]" * 900 + ', "formula": "@"}']
# here it is not
FORGED = lines(r"""
    {"formula":"1+1=24","note":"{\"formula\": \"@\"}"}
    {'formula':'1+1=24','note':'{\'formula\': \'@\'}'}
    {'formula':'1+1=24','note':'{"formula": "@"}'}
    {'formula':'1+1=24','note':"{'formula': '@'}"}
    {'formula':'1+1=24','note':'{'formula': '@'}'}
    {"formula":"1+1=24","note":"{"formula": "@"}"}
    {“formula”:“1+1=24”,“note”:“{“formula”: “@”}”}
    {"formula":"1+1=24","note":"{\"formula\": \"@\"}
    {"formula":"1+1=24","note":"x↵{\"formula\": \"@\"}
    {"formula":"1+1=24","note":{"formula":"@"}}
    {"formula":"1+1=24","note":{"formula":"@"}
    {"formula":"1+1=24","note":{"formula":"@"
    {"formula":"1+1=24","note":[{"formula":"@"}]
    {"note":{"formula":"@"},"formula":"1+1=24"}
    {formula: 1+1=24, note: {formula: @}}
    {formula: 1+1=24, note: see {formula: @}}
    {"note":"formula: @"}
    {"note":"↵formula: @"}
    {"note":", \"formula\": \"@\""}
    {"a\"formula":"@"}
    {"formulas":"@"}
    {"my formula":"@"}
    formula: @
    "formula": "@"}
    {"formula":["@"]}
    {'formula':['@']}
    {"formula":{"value":"@"}}
    {"formula":"@","formula":"1+1=24"}
    {"formula":"@"} {"formula":"1+1=24"}
    {"formula":"@"} {"formula":null}
    {"formula":"@"} {"formula":"1+1
    {"formula":"@"} {"formula":
    {"formula":"@" no}
    {"formula":"@", no wait, =25
    {formula: @, no wait, =25}
    {formula: @↵no}
    {"formula":"@}", "x": 1}""") + [
    json.dumps(json.dumps({"formula": "1+1=24", "x": '{"formula": "@"}'})),
    "{}" * 1000 + '{"formula": "@"}']


@cases("text", SURROUNDED + DIALECTS)
def test_the_answer_is_found(text):
    assert code(text.replace("@", "1*2*3*4=24")) == "correct"


@cases("text", FORGED)
def test_nothing_else_is_taken_for_it(text):
    assert code(text.replace("@", "1*2*3*4=24")) != "correct"


def test_all_fields_come_from_one_object():
    two = '{"cards": ["K"], "formula": "a"} {"formula": "b", "number": [1, 2.0, "3"]}'
    assert read_answer(two) == (None, "b")
    words = '{"cards": ["Ace of Spades", "t", 7, null, "queen"]}'
    assert read_answer(words) == (["A", "10", "7", "", "Q"], None)
    round_ = "{cards: (a, 'Ten', \"3\"), number: (1, 10, 3)}"
    assert read_answer(round_) == (["A", "10", "3"], None)


# ------------------------------------------------------------------------------------------ what a formula is

PLAIN = rows(r"""
    1*2*3*4=24.                    | 1*2*3*4=24
    1*2*3*4 = 24 。                | 1*2*3*4 = 24
    １＊２＊３＊４＝２４．         | 1*2*3*4=24
    （𝟏＋𝟑）＊（2﹢4）﹦24        | (1+3)*(2+4)=24
    2∗3⋅4÷１=24                    | 2*3*4/1=24
    2 x 3 X 4／1=24                | 2 * 3 * 4/1=24
    1✖️2✖3*4=24                    | 1* 2*3*4=24
    4➗1−2➕3➖1                   | 4/1-2+3-1
    (1*2)\times 3 \cdot4=24        | (1*2)* 3 *4=24
    \left(2\right)\div1\ast12=24   | (2 )/1*12=24""") + [
    ("1*2*\t3*\n4=24", "1*2* 3* 4=24"), ("1*2\x1c*\x1f3*\u00a04=\u200924\u2028", "1*2 * 3* 4= 24")]
KEPT = [
    *r"1*2*3*²4=24 3½*2=24 ①*2=24 1*2*3*4=2⒋ ⑴*2=24 1*2*3*٤=24 1*2*3*4≠24 \frac{4}{1}=24".split(),
    r"1\leftarrow2", "1*2*3*4=\u033824", "1\u200b2=24", "12=24..", "1‐2\ufe0f3"]


@cases("said, plain", PLAIN)
def test_formulas_are_made_plain(said, plain):
    for text in (json.dumps({"formula": said}), json.dumps({"formula": said}, ensure_ascii=False)):
        assert read_answer(text)[1] == plain
    if "\n" not in said and "\x1c" not in said:        # unescaped: \times is a tab and "imes" to JSON
        assert read_answer('{"formula": "%s"}' % said)[1] == plain


@cases("said", KEPT)
def test_other_signs_make_a_formula_unreadable(said):
    assert code(json.dumps({"formula": said})) in ("unparsable", "no_target")


def test_what_is_taken_out_does_not_join_digits():
    for said in (r"1\left2*2=24", "1\ufe0f2*2=24", "1 2*2=24", "1\n2*2=24"):
        assert judge(json.dumps({"formula": said}), ["Q", "2"], [12, 2]).code == "unparsable"


JUDGED_TO_THE_END = {
    "correct": ["1*2*3*4=24", "1*2*3*4=24.", "1*2*3*4=024", "1*2*\n3*4\t=\r24 ", "3*2*4*1=\x1c24"],
    "used_twice": [r"(3-1)\times 4\times(1+2)=24"],
    "unparsable": ["1*2*3*4=24, no wait, =25", "1*2*3*4=25, no wait, =24", "1*2*3*4=24\n=25", "12*(3 4)=24",
                   "(=24"],
    "no_target": ["1*2*3*4=24\\", "1*2*3*4=24}", '1*2*3*4=24"', "1*2*3*4=24'", "1*2*3*4=24.0",
                  "1*2*3*4=2 4", "=24"]}


@cases("verdict", JUDGED_TO_THE_END)
def test_a_formula_is_judged_to_its_end(verdict):
    for formula in JUDGED_TO_THE_END[verdict]:
        assert code(json.dumps({"formula": formula})) == verdict
        if not {'"', "\\"} & set(formula):
            assert code('{"formula": "%s"}' % formula) == verdict


# ------------------------------------------------------------------------------------------------------ steps

@cases("text, fields", [
    ('{"current observation": "Café \\"21\\"; A\\\\B {x}", "current instruction": "Go.", "action": "stop()"}',
     ('Café "21"; A\\B {x}', "stop()")),
    ("{'current observation': 'McDonald's, Joe's', 'action': 'Stop( )'}",
     ("McDonald's, Joe's", "stop()")),
    ('{"current observation": "Caf\\u00e9", "action": "\\"turn_direction\\" ( slightly  left )"}',
     ("Café", "turn_direction(slightly left)")),
    ('{"current observation": null, "action": ["stop()"]}', ("", "")),
    ('{"current observation": "{\\"action\\": \\"stop()\\"}"}', ('{"action": "stop()"}', None)),
    ('{current observation: Joe\'s: bar, action: stop()', ("", "stop()"))])
def test_steps_are_read(text, fields):
    assert read_step(text) == fields


# ------------------------------------------------------------------------------------------------------- time

# The text between two ↺ is repeated.
ENDLESS = lines(r"""
    ↺{↺
    ↺{}↺
    {↺"↺
    {↺'↺
    {↺“a”↺
    {↺"'↺
    ↺\↺
    {"formula": "↺\↺
    {'action': '↺\x↺
    {'action': '↺\u0041↺
    ↺\times↺
    {↺"  ↺
    ↺{"action":↺
    ↺{"formula":"x↺
    {↺,↺
    {↺a,↺
    {"cards": [↺"A",↺]}
    {↺"formula":1,↺}
    {↺:↺
    {↺" "a" ↺
    {"formula": ↺9↺}
    {"formula": "↺9↺=24"}
    {↺↵↺
    {"formula": "↺(↺=24"}
    {"formula": ↺[↺
    {"formula":↺ ↺
    {"formula": ↺//↵↺
    "↺\"↺"
    {"action": "↺ ( ↺"}
    {"action": "↺大小↺"}
    {"current observation": "↺No intersection, ↺"}""") + [
    "↺{action:" + " " * 390 + "x↺",
    '{"formula": "↺\ufdfa↺"}',
    '{"formula":' * 40_000 + "↺}↺",
    '{"current observation": "' + "a;" * 950 + '"}↺ ↺',
    '{"current observation": "' + "no landmarks at the " * 95 + '"}↺ ↺']
POINT = Point("x.jpg", 2, "Bar", "left", True, 2, "turn_direction(east)")


@cases("text", ENDLESS)
def test_a_million_characters_are_judged(text):
    """Each takes about half a second. A time that grows by the square would be hours, and is stopped."""
    before, unit, after = text.split("↺")
    signal.alarm(60)
    try:
        text = before + unit * (10**6 // len(unit)) + after
        step = judge_step(text, POINT, {"Bar", "Barn"}, "absolute")
        assert judge(text, CARDS, NUMBERS, image=True).reward < 0 and step.reward < 0
    finally:
        signal.alarm(0)
