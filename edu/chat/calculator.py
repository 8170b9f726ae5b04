"""The calculator behind the tool: bounded arithmetic on exact fractions. It walks a parsed expression; nothing is ever executed.

1. Refuse by length, then by alphabet, before anything is parsed: what is left are digits, `.`, `,`, `+ - * / %`, parentheses and spaces.
2. Drop thousands separators ("1,000") and leading zeros ("007"), then parse to Python's syntax tree.
3. Walk the tree by hand, knowing + - * / // % and the two signs, with bounds on its depth and on every value met.
4. Write the result out: whole numbers whole, decimals of up to 12 places exactly, all others rounded to 6 places, half to even.
"""

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

MAX_LENGTH = 200  # characters; GSM8K's longest annotation has 30
MAX_DEPTH = 100  # levels of the syntax tree; a sum of n terms has n
MAX_VALUE = 10**18  # of any value met on the way, in absolute terms
EXACT_PLACES, ROUNDED_PLACES = 12, 6  # decimals written exactly, and those of a result that needs more

_ALLOWED = re.compile(r"[0-9.,+\-*/%() ]+")
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
_LEADING_ZEROS = re.compile(r"(?<![0-9.])0+(?=[0-9])")
_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def calculate(expression: str) -> str:
    """Work out an arithmetic expression; ValueError on anything that is not bounded arithmetic.

    >>> calculate("48/2"), calculate("0.1 + 0.2"), calculate("1,000 * 2.5"), calculate("-(7 % 4)"), calculate("2/3")
    ('24', '0.3', '2500', '-3', '0.666667')
    >>> calculate("2**10")
    Traceback (most recent call last):
    ValueError: not in the calculator's arithmetic: '2**10'
    """
    if len(expression) > MAX_LENGTH:
        raise ValueError(f"expression of {len(expression)} characters, the limit is {MAX_LENGTH}")
    if not _ALLOWED.fullmatch(expression):
        raise ValueError(f"not arithmetic: {expression!r}")
    source = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), expression.strip())
    source = _LEADING_ZEROS.sub("", source)
    try:
        tree = ast.parse(source, mode="eval")
    except SyntaxError as error:
        raise ValueError(f"not an expression: {expression!r}") from error
    try:
        return _format(_value(tree.body, source, depth=1))
    except ZeroDivisionError as error:
        raise ValueError(f"division by zero: {expression!r}") from error


def _value(node: ast.expr, source: str, depth: int) -> Fraction:
    """The exact value of a node. Numbers are read from the source text, since the tree holds them as binary floats."""
    if depth > MAX_DEPTH:
        raise ValueError(f"expression nested deeper than {MAX_DEPTH} levels")
    match node:
        case ast.Constant():
            value = Fraction(source[node.col_offset : node.end_col_offset])
        case ast.UnaryOp(op=ast.USub()):
            value = -_value(node.operand, source, depth + 1)
        case ast.UnaryOp(op=ast.UAdd()):
            value = _value(node.operand, source, depth + 1)
        case ast.BinOp() if type(node.op) in _BINARY:
            left, right = _value(node.left, source, depth + 1), _value(node.right, source, depth + 1)
            value = Fraction(_BINARY[type(node.op)](left, right))
        case _:
            raise ValueError(f"not in the calculator's arithmetic: {source!r}")
    if abs(value) > MAX_VALUE:
        raise ValueError(f"a value beyond {MAX_VALUE:.0e} in {source!r}")
    return value


def _format(value: Fraction) -> str:
    """Decimal text without exponent, trailing zeros or "-0": exact up to 12 places, else rounded to 6, half to even."""
    places = EXACT_PLACES if 10**EXACT_PLACES % value.denominator == 0 else ROUNDED_PLACES
    scaled = round(value * 10**places)
    whole, decimals = divmod(abs(scaled), 10**places)
    text = f"{whole}.{decimals:0{places}d}".rstrip("0").rstrip(".")
    return f"-{text}" if scaled < 0 else text
