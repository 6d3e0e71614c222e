"""A parser of closed forms: LaTeX, plain mathematics, and what Python and sympy print, for any algebra.

The algebra makes the values: exact arithmetic decides most answers in our own process, sympy the rest in the sandbox.
Notation with more than one meaning (`1/2x`, `\\sin x/2`) is not read here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Generic, Protocol, Self, TypeVar

from rstar.grading.tables import FUNCTIONS, INVERSE, PLAIN_SYMBOLS, SYMBOLS
from rstar.grading.work import charge

MAX_CHARS = 1000
MAX_DEPTH = 24


class Unreadable(Exception):
    """Not in the fragment that is decided here; another path may know."""


class Hopeless(Exception):
    """Beyond the bounds, or no mathematics at all (1/0, an open bracket, `1 2`): equal to nothing but its text."""


class Value(Protocol):
    """What an algebra computes with."""

    def __add__(self, other: Self, /) -> Self: ...
    def __mul__(self, other: Self, /) -> Self: ...
    def __truediv__(self, other: Self, /) -> Self: ...
    def __neg__(self) -> Self: ...


V = TypeVar("V", bound=Value)


@dataclass(frozen=True)
class Algebra(Generic[V]):
    """How numbers, names, powers and functions become values. Each may raise Unreadable or Hopeless."""

    constant: Callable[[Fraction], V]
    symbol: Callable[[str], V]  # i, e, \\pi and variables
    power: Callable[[V, V], V]
    function: Callable[[str, Sequence[V]], V]  # names: the keys of _ARGUMENTS
    rational: Callable[[V], Fraction | None]


_ARGUMENTS = dict.fromkeys(FUNCTIONS.values(), 1) | {"root": 2, "log": 2, "binomial": 2}


def read(text: str, algebra: Algebra[V]) -> V:
    """Parse a cleaned expression (see text.clean).

    Raises:
        Unreadable: outside the grammar, or notation with two meanings.
        Hopeless: beyond the bounds, or no mathematics.
    """
    if len(text) > MAX_CHARS:
        raise Hopeless(f"{len(text)} characters")
    charge(4 * len(text))
    tokens = _tokens(text)
    if "\\infty" in tokens and [token for token in tokens if token not in "+-"] != ["\\infty"]:
        raise Hopeless("arithmetic with infinity")
    parser = _Parser(tokens, algebra)
    value = parser.sum(0)
    if parser.peek():
        raise Unreadable(parser.peek())
    return value


_TOKEN = re.compile(
    r"\s*(?:([0-9]+\.?[0-9]*|\.[0-9]+)|\\([a-zA-Z]+)|(log(?:10|2)(?=\()|[a-zA-Z]+)|(\*\*|[-+*/^_(){}\[\]!|,]))"
)


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    position, text = 0, text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            if text[position] in ";:=<>&'?\\":
                raise Unreadable(text[position])
            raise Hopeless(text[position])
        number, command, word, sign = match.groups()
        if number:
            if (
                tokens
                and tokens[-1][0].isdigit()
                and text[position].isspace()
                and tokens[-2:-1] not in (["\\frac"], ["_"], ["^"])
            ):
                raise Unreadable("a command before a number") if "\\" in text else Hopeless("two numbers side by side")
            tokens.append("0" + number if number[0] == "." else number)
        elif command:
            tokens.append("\\" + FUNCTIONS.get(command, command))
        elif word in PLAIN_SYMBOLS:
            tokens.append(PLAIN_SYMBOLS[word])
        elif word in FUNCTIONS:  # Python's log is the natural one
            natural = word == "log" and text.startswith("(", match.end())
            tokens.append("\\ln" if natural else "\\" + FUNCTIONS[word])
        elif word:
            if len(word) > 3:
                raise Unreadable(word)
            tokens.extend(word)
        else:
            tokens.append("^" if sign == "**" else sign)
        position = match.end()
    return tokens


class _Parser(Generic[V]):
    """Recursive descent; one method a level of precedence."""

    def __init__(self, tokens: list[str], algebra: Algebra[V]) -> None:
        self._tokens = tokens
        self._algebra = algebra
        self._at = 0
        self._arguments = 0  # functions whose arguments are being read: degrees are angles there
        self._bars = 0  # open absolute values

    def peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self._at += 1
        return token

    def expect(self, token: str) -> None:
        found = self.take()
        if not found:
            raise Hopeless(f"no {token}")
        if found != token:
            raise Unreadable(found)

    def sum(self, depth: int) -> V:
        if depth > MAX_DEPTH:
            raise Hopeless("nesting")
        total = self._signed(self.product, depth)
        while self.peek() in ("+", "-"):
            total = total + self._signed(self.product, depth)
        return total

    def _signed(self, part: Callable[[int], V], depth: int) -> V:
        negative = False
        while self.peek() in ("+", "-"):
            negative ^= self.take() == "-"
        value = part(depth)
        return -value if negative else value

    def product(self, depth: int) -> V:
        value = self.power(depth)
        divided = False
        while True:
            token = self.peek()
            if token in ("*", "\\times", "\\cdot", "\\ast"):
                self.take()
                value, divided = value * self._signed(self.power, depth), False
            elif token in ("/", "\\div"):
                self.take()
                value, divided = value / self._signed(self.power, depth), True
            elif self._starts_factor(token):
                if divided or token[0].isdigit():
                    raise Unreadable("ambiguous product")
                value = value * self.power(depth)
            else:
                return value

    def _starts_factor(self, token: str) -> bool:
        if not token or (token == "|" and self._bars):
            return False
        return token[0].isalnum() or token in _OPENING or token[1:] in SYMBOLS or _is_function(token)

    def power(self, depth: int) -> V:
        base = self.atom(depth + 1)
        while self.peek() in ("!", "\\degree"):
            if self.take() == "!":
                base = self._algebra.function("factorial", [base])
            elif self._arguments:
                base = base * self._algebra.symbol("\\pi") / self._number(180)
            else:
                raise Unreadable("an angle outside a function")
        if self.peek() != "^":
            return base
        self.take()
        exponent = self._signed(self.atom, depth + 1)
        if self.peek() == "^":
            raise Hopeless("a tower of powers")
        return self._algebra.power(base, exponent)

    def atom(self, depth: int) -> V:
        if depth > MAX_DEPTH:
            raise Hopeless("nesting")
        token = self.take()
        if not token:
            raise Hopeless("the end")
        if token[0].isdigit():
            return self._digits(token, depth)
        if token in ("(", "{"):
            value = self.sum(depth + 1)
            self.expect(")" if token == "(" else "}")
            return value
        if token == "|":
            self._bars += 1
            value = self._algebra.function("abs", [self.sum(depth + 1)])
            self._bars -= 1
            self.expect("|")
            return value
        if token in ("\\lfloor", "\\lceil"):
            value = self._algebra.function("floor" if token == "\\lfloor" else "ceil", [self.sum(depth + 1)])
            self.expect("\\r" + token[2:])
            return value
        if token == "\\frac":
            top = self._argument(depth)
            return top / self._argument(depth)
        if token == "\\binomial" and self.peek() != "(":
            return self._algebra.function("binomial", [self._argument(depth), self._argument(depth)])
        if token == "\\sqrt":
            return self._root(depth)
        if _is_function(token):
            return self._function(token[1:], depth)
        if token[1:] in SYMBOLS or (token.isalpha() and len(token) == 1):
            return self._algebra.symbol(f"{token}_{self._subscript()}" if self.peek() == "_" else token)
        raise Unreadable(token)

    def _number(self, value: Fraction | int) -> V:
        return self._algebra.constant(Fraction(value))

    def _digits(self, token: str, depth: int) -> V:
        if self.peek() == "_":  # digits in a stated base are that base's, equal to nothing else
            return self._algebra.symbol(f"{token}_{self._subscript()}")
        if self.peek() != "\\frac" or not token.isdigit():
            return self._number(Fraction(token))
        self.take()
        part = self._argument(depth) / self._argument(depth)
        value = self._algebra.rational(part)
        if value is None or not 0 < value < 1:
            raise Unreadable("a number beside a fraction")
        return self._number(Fraction(token)) + part

    def _subscript(self) -> str:
        self.take()
        part = self.take()
        if part != "{":
            return part
        part = ""
        while self.peek() not in ("}", ""):
            part += self.take()
        self.expect("}")
        return part

    def _argument(self, depth: int) -> V:
        """What \\frac and \\sqrt take: a group, or one digit or letter (\\frac12 is a half)."""
        token = self.peek()
        if token[:1].isdigit():
            if len(token) > 1:
                self._tokens[self._at] = token[1:]
            else:
                self.take()
            return self._number(int(token[0]))
        return self.atom(depth + 1)

    def _root(self, depth: int) -> V:
        if self.peek() != "[":
            return self._algebra.function("sqrt", [self._argument(depth)])
        self.take()
        degree = self.sum(depth + 1)
        self.expect("]")
        return self._algebra.function("root", [self._argument(depth), degree])

    def _function(self, name: str, depth: int) -> V:
        """`\\sin^2 2x`, `\\log_2 8`, `log(5, 2)`, `Fraction(1, 2)`."""
        base = exponent = None
        self._arguments += 1
        for _ in range(2):
            if self.peek() == "_" and name == "log":
                self.take()
                base = self._argument(depth)
            elif self.peek() == "^":
                self.take()
                exponent = self._signed(self._argument, depth)
        if exponent is not None and name in INVERSE and self._algebra.rational(exponent) == -1:
            name, exponent = INVERSE[name], None
        values = self._values(depth) + ([base] if base is not None else [])
        self._arguments -= 1
        match name, len(values):
            case "fraction", 1 | 2:
                return values[0] / (values[1] if len(values) == 2 else self._number(1))
            case "ln" | "log", 2:
                name = "log"
            case "log" | "lg" | "log2", 1:
                name, values = "log", [values[0], self._number(2 if name == "log2" else 10)]
            case "cbrt", 1:
                name, values = "root", [values[0], self._number(3)]
        if _ARGUMENTS.get(name) != len(values):
            raise Unreadable(name)
        value = self._algebra.function(name, values)
        return value if exponent is None else self._algebra.power(value, exponent)

    def _values(self, depth: int) -> list[V]:
        if self.peek() == "(":
            self.take()
            values = [self.sum(depth + 1)]
            while self.peek() == ",":
                self.take()
                values.append(self.sum(depth + 1))
            self.expect(")")
            return values
        value = self.power(depth + 1)
        while self._starts_factor(self.peek()) and not _is_function(self.peek()):
            value = value * self.power(depth + 1)
        if self.peek() in ("/", "*", "\\cdot", "\\times", "\\div"):
            raise Unreadable("a function of how much?")
        return [value]


_OPENING = ("(", "{", "|", "\\frac", "\\sqrt", "\\binomial", "\\lfloor", "\\lceil")


def _is_function(token: str) -> bool:
    return token[:1] == "\\" and token[1:] in FUNCTIONS and token != "\\sqrt"
