"""LaTeX or plain mathematics -> exact.Quotient, within bounds."""

from __future__ import annotations

import re
from fractions import Fraction

from rstar.grading import exact
from rstar.grading.exact import Hopeless, Quotient, Unreadable
from rstar.grading.work import charge

MAX_CHARS = 1000
MAX_DEPTH = 24


def read(text: str) -> Quotient:
    """Parse a cleaned expression (see text.clean).

    Raises:
        Unreadable: outside the fragment: functions, higher roots, ambiguous notation such as `1/2x`.
        Hopeless: beyond the bounds, or no mathematics.
    """
    if len(text) > MAX_CHARS:
        raise Hopeless(f"{len(text)} characters")
    charge(4 * len(text))
    parser = _Parser(_tokens(text))
    value = parser.sum(0)
    if parser.peek():
        raise Unreadable(parser.peek())
    return value


_TOKEN = re.compile(r"\s*(?:([0-9]+\.?[0-9]*|\.[0-9]+)|\\([a-zA-Z]+)|([a-zA-Z]+)|(\*\*|[-+*/^_(){}\[\]!|]))")
_SYMBOL_COMMANDS = frozenset(
    re.findall(
        r"\w+",
        "alpha beta gamma delta epsilon varepsilon zeta eta theta lambda mu nu xi rho sigma tau phi varphi chi psi "
        "omega Gamma Delta Theta Lambda Sigma Phi Psi Omega pi infty ell",
    )
)
_PLAIN_WORDS = {"pi": "\\pi", "sqrt": "\\sqrt", "inf": "\\infty", "oo": "\\infty", "infinity": "\\infty"}
_FUNCTIONS = frozenset(
    {"sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "max", "min", "mod", "gcd", "lcm"} | {"ln", "lg"}
)


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    position, text = 0, text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            if text[position] in ",;:=<>&'?\\":
                raise Unreadable(text[position])
            raise Hopeless(text[position])
        number, command, word, sign = match.groups()
        if number:
            if tokens and tokens[-1][0].isdigit() and text[position].isspace() and tokens[-2:-1] != ["\\frac"]:
                raise Unreadable("a command before a number") if "\\" in text else Hopeless("two numbers side by side")
            tokens.append("0" + number if number[0] == "." else number)
        elif command:
            tokens.append("\\" + command)
        elif word in _PLAIN_WORDS:
            tokens.append(_PLAIN_WORDS[word])
        elif word:
            if len(word) > 3 or word in _FUNCTIONS:
                raise Unreadable(word)
            tokens.extend(word)
        else:
            tokens.append("^" if sign == "**" else sign)
        position = match.end()
    return tokens


class _Parser:
    """Recursive descent; one method a level of precedence."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._at = 0

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

    def sum(self, depth: int) -> Quotient:
        if depth > MAX_DEPTH:
            raise Hopeless("nesting")
        sign = self._sign()
        total = self._signed(self.product(depth), sign)
        while self.peek() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            sign *= self._sign()
            total = total + self._signed(self.product(depth), sign)
        return total

    @staticmethod
    def _signed(value: Quotient, sign: int) -> Quotient:
        return value if sign > 0 else -value

    def _sign(self) -> int:
        sign = 1
        while self.peek() in ("+", "-"):
            sign = -sign if self.take() == "-" else sign
        return sign

    def product(self, depth: int) -> Quotient:
        value = self.power(depth)
        divided = False
        while True:
            token = self.peek()
            if token in ("*", "\\times", "\\cdot", "\\ast"):
                self.take()
                value, divided = value * self._signed_power(depth), False
            elif token in ("/", "\\div"):
                self.take()
                value, divided = value / self._signed_power(depth), True
            elif self._starts_factor(token):
                if divided or token[0].isdigit():
                    raise Unreadable("ambiguous product")
                value = value * self.power(depth)
            else:
                return value

    def _signed_power(self, depth: int) -> Quotient:
        sign = self._sign()
        return self._signed(self.power(depth), sign)

    def _starts_factor(self, token: str) -> bool:
        if not token:
            return False
        return token[0].isalnum() or token in ("(", "{", "\\frac", "\\sqrt", "\\binom") or token[1:] in _SYMBOL_COMMANDS

    def power(self, depth: int) -> Quotient:
        base = self.atom(depth + 1)
        while self.peek() == "!":
            self.take()
            base = exact.factorial(base)
        if self.peek() != "^":
            return base
        self.take()
        sign = self._sign()
        exponent = self._signed(self.atom(depth + 1), sign)
        if self.peek() == "^":
            raise Hopeless("a tower of powers")
        return exact.power(base, exponent)

    def atom(self, depth: int) -> Quotient:
        if depth > MAX_DEPTH:
            raise Hopeless("nesting")
        token = self.take()
        if not token:
            raise Hopeless("the end")
        if token[0].isdigit():
            return self._number(token, depth)
        if token in ("(", "{"):
            value = self.sum(depth + 1)
            self.expect(")" if token == "(" else "}")
            return value
        if token == "\\frac":
            top = self._argument(depth)
            return top / self._argument(depth)
        if token == "\\sqrt":
            if self.peek() == "[":
                return self._root(depth)
            return exact.square_root(self.atom(depth + 1) if self.peek() in ("(", "{") else self._argument(depth))
        if token == "\\binom":
            top, bottom = self._argument(depth), self._argument(depth)
            return exact.binomial(top, bottom)
        if token == "\\pi" or token[1:] in _SYMBOL_COMMANDS or (token.isalpha() and len(token) == 1):
            return self._symbol(token)
        raise Unreadable(token)

    def _number(self, token: str, depth: int) -> Quotient:
        if self.peek() == "_":  # digits in a stated base are that base's, equal to nothing else
            self.take()
            return exact.symbol(f"{token}_{self._subscript()}")
        value = exact.constant(Fraction(token))
        if self.peek() == "\\frac" and token.isdigit():
            self.take()
            top, bottom = self._argument(depth).rational(), self._argument(depth).rational()
            if top is None or bottom is None or not 0 < top < bottom:
                raise Unreadable("a number beside a fraction")
            charge(2 * exact.price(top, bottom))
            return exact.constant(Fraction(token) + top / bottom)
        return value

    def _symbol(self, token: str) -> Quotient:
        if token == "i":
            return exact.symbol(token)
        if self.peek() != "_":
            return exact.symbol(token)
        self.take()
        return exact.symbol(f"{token}_{self._subscript()}")

    def _subscript(self) -> str:
        part = self.take()
        if part != "{":
            return part
        part = ""
        while self.peek() not in ("}", ""):
            part += self.take()
        self.expect("}")
        return part

    def _argument(self, depth: int) -> Quotient:
        """What \\frac and \\sqrt take: a group, or one digit or letter (\\frac12 is a half)."""
        token = self.peek()
        if token == "{":
            return self.atom(depth + 1)
        if token[:1].isdigit() and len(token) > 1:
            self._tokens[self._at] = token[1:]
            return exact.constant(int(token[0]))
        if token[:1].isdigit():
            return exact.constant(int(self.take()))
        return self.atom(depth + 1)

    def _root(self, depth: int) -> Quotient:
        self.expect("[")
        degree = self.sum(depth + 1).rational()
        self.expect("]")
        radicand = self._argument(depth).rational()
        if degree == 2 and radicand is not None:
            return exact.square_root(exact.constant(radicand))
        if degree is None or radicand is None or degree.denominator != 1 or not 2 < degree <= 64:
            raise Unreadable("a root")
        top, bottom = (exact.integer_root(n, int(degree)) for n in (radicand.numerator, radicand.denominator))
        if top is None or bottom is None:
            raise Unreadable("a root that is not rational")
        return exact.constant(Fraction(top, bottom))
