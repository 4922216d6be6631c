"""Find all formulas that reach a target with each given number used exactly once, by + - * / and parentheses.

    python -c "from games.solver import solve; print(*solve([3, 3, 8, 8]))"
"""
import math
from functools import lru_cache


def arith(a, op, b):
    """Return the exact `a op b` of fractions held as reduced pairs (n, d > 0): much faster than Fraction.

    None stands for undefined, and stays undefined."""
    if a is None or b is None or (op == "/" and b[0] == 0):
        return None
    (n, d), (m, e) = a, b
    if op == "-":
        m = -m
    if op == "/":
        m, e = e, m
    n, d = (n * e + m * d if op in "+-" else n * m), d * e
    g = math.gcd(n, d) if d > 0 else -math.gcd(n, d)    # the sign goes to the numerator
    return n // g, d // g


# An expression is the sorted tuple of its operands, each behind its sign: ("+1", "+2*3", "-4") is the sum
# 1+2*3-4, ("*(1+2)", "/3") the product (1+2)/3, ("+7",) a number. + sorts before -, and * before /. Equal up
# to commuting and associating means equal.
_INVERSE = dict(zip("+-*/", "-+/*"))


def _text(expression):
    return "".join(expression)[1:]


def _operands(expression, kind):
    """Return the operands of an expression looked at as a sum ("+") or as a product ("*")."""
    if expression[0][0] == kind:
        return expression
    text = _text(expression)
    return (f"*({text})" if kind == "*" and len(expression) > 1 else kind + text),


def _join(a, op, b):
    kind = "+" if op in "+-" else "*"
    right = _operands(b, kind)
    if op in "-/":
        right = tuple(_INVERSE[operand[0]] + operand[1:] for operand in right)
    return tuple(sorted(_operands(a, kind) + right))


def _splits(numbers):
    """Return the distinct ways to deal a sorted tuple into two non-empty ones, each in both orders."""
    return {tuple(tuple(n for i, n in enumerate(numbers) if mask >> i & 1 == side) for side in (1, 0))
            for mask in range(1, 2 ** len(numbers) - 1)}        # neither part may be empty


@lru_cache(maxsize=4096)
def _reachable(numbers, wanted=None):
    """Return {value: the set of expressions that make it} over all ways to use up a sorted tuple of numbers.
    wanted: of this value alone; the parts still take all values.

    Values below zero are left out, and nothing is lost: where x-y is negative, y-x and the opposite sign one
    step later will do."""
    if len(numbers) == 1:
        return {(numbers[0], 1): {(f"+{numbers[0]}",)}}
    table = {}
    for left, right in _splits(numbers):
        for v, ways_v in _reachable(left).items():
            for w, ways_w in _reachable(right).items():
                for op in "+-*/" if left <= right else "-/":
                    value = arith(v, op, w)
                    if value and value[0] >= 0 and wanted in (None, value):
                        table.setdefault(value, set()).update(_join(a, op, b) for a in ways_v for b in ways_w)
    return table


def solve(numbers, target=24):
    """Return all formulas ("(10-2)*(1+2)=24") that make the positive integer `target`, sorted.

    Each uses every one of `numbers` (positive integers) exactly once. They are exact, and distinct up to
    commuting and associating: a-(b-c) and c+a-b are one. No step goes below zero, so (a-b)*(c-d) and
    (b-a)*(d-c) are one too. Four numbers take about a millisecond, six about a second."""
    made = (target, 1)
    ways = _reachable(tuple(sorted(numbers)), made).get(made, ())
    return [f"{text}={target}" for text in sorted(map(_text, ways))]


def miss(numbers, target, rng):
    """Return some formula of all `numbers` that claims to make the target and does not."""
    while True:
        parts = [((n, 1), (f"+{n}",)) for n in numbers]
        while len(parts) > 1:
            (v, a), (w, b) = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
            op = rng.choice("++--**/")
            parts.append((arith(v, op, w), _join(a, op, b)))
        value, expression = parts[0]
        if value not in (None, (target, 1)):
            return f"{_text(expression)}={target}"
