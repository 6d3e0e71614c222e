"""Exact arithmetic on closed forms: LaTeX or plain text -> a quotient of polynomials that is compared without rounding.

A polynomial maps monomials to rational coefficients; a monomial is (squarefree radicand, power of i, symbols with
integer exponents). Square roots of different squarefree integers are linearly independent over the rationals, so two
quotients n1/d1 and n2/d2 are equal exactly if n1*d2 - n2*d1 has no term left: `\\frac{1}{\\sqrt3}` is
`\\frac{\\sqrt3}{3}`, and `(2x+3)(2x-3)` is `4x^2-9`. pi, e and infinity are symbols. Everything is bounded: length,
nesting, terms, bits.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

MAX_CHARS = 1000
MAX_DEPTH = 24
MAX_TERMS = 128
MAX_BITS = 16_384  # 3^2007 has 3,182
MAX_RADICAND = 10**12
MAX_POLY_POWER = 12
MAX_FACTORIAL = 200

Monomial = tuple[int, int, tuple[tuple[str, int], ...]]
Poly = dict[Monomial, Fraction]

_ONE: Monomial = (1, 0, ())


class Unreadable(Exception):
    """Not in the fragment that is decided here; another path may know."""


class TooLarge(Exception):
    """A number or expression beyond the bounds; nobody is to evaluate it."""


@dataclass(frozen=True)
class Quotient:
    """numerator / denominator, the denominator never zero."""

    numerator: Poly
    denominator: Poly

    def equals(self, other: Quotient) -> bool:
        """Exact equality by cross-multiplication."""
        if self.denominator == other.denominator:
            return self.numerator == other.numerator
        return _times(self.numerator, other.denominator) == _times(other.numerator, self.denominator)

    def proportional(self, other: Quotient) -> bool:
        """Whether the two differ by a rational factor other than zero: the same equation when set to zero."""
        left, right = _times(self.numerator, other.denominator), _times(other.numerator, self.denominator)
        if left.keys() != right.keys() or not left:
            return not left and not right
        some = next(iter(left))
        factor = left[some] / right[some]
        return all(coefficient == factor * right[monomial] for monomial, coefficient in left.items())

    def rational(self) -> Fraction | None:
        """Its value if it is a rational number."""
        top, bottom = _rational(self.numerator), _rational(self.denominator)
        return None if top is None or bottom is None else top / bottom

    def real(self) -> float | None:
        """Its value as a float if it is a real constant."""
        top, bottom = _real(self.numerator), _real(self.denominator)
        return None if top is None or not bottom else top / bottom


def constant(value: Fraction | int) -> Quotient:
    """A rational number as a quotient."""
    return Quotient(_poly(Fraction(value)), {_ONE: Fraction(1)})


def read(text: str) -> Quotient:
    """Parse a cleaned expression (see text.clean).

    Raises:
        Unreadable: outside the fragment: functions, higher roots, ambiguous notation such as `1/2x`.
        TooLarge: beyond the bounds.
    """
    if len(text) > MAX_CHARS:
        raise TooLarge(f"{len(text)} characters")
    parser = _Parser(_tokens(text))
    value = parser.sum(0)
    if parser.peek():
        raise Unreadable(parser.peek())
    return value


def subtract(left: Quotient, right: Quotient) -> Quotient:
    """left - right."""
    return _add(left, right, -1)


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
            raise Unreadable(text[position])
        number, command, word, sign = match.groups()
        if number:
            if tokens and tokens[-1][0].isdigit() and text[position].isspace():
                raise Unreadable("two numbers side by side")
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
        if self.take() != token:
            raise Unreadable(f"no {token}")

    def sum(self, depth: int) -> Quotient:
        if depth > MAX_DEPTH:
            raise TooLarge("nesting")
        sign = self._sign()
        total = _scale(self.product(depth), sign)
        while self.peek() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            sign *= self._sign()
            total = _add(total, self.product(depth), sign)
        return total

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
                value, divided = _multiply(value, self._signed_power(depth)), False
            elif token in ("/", "\\div"):
                self.take()
                value, divided = _divide(value, self._signed_power(depth)), True
            elif self._starts_factor(token):
                if divided or token[0].isdigit():
                    raise Unreadable("ambiguous product")
                value = _multiply(value, self.power(depth))
            else:
                return value

    def _signed_power(self, depth: int) -> Quotient:
        sign = self._sign()
        return _scale(self.power(depth), sign)

    def _starts_factor(self, token: str) -> bool:
        if not token:
            return False
        return token[0].isalnum() or token in ("(", "{", "\\frac", "\\sqrt", "\\binom") or token[1:] in _SYMBOL_COMMANDS

    def power(self, depth: int) -> Quotient:
        base = self.atom(depth + 1)
        while self.peek() == "!":
            self.take()
            base = _factorial(base)
        if self.peek() != "^":
            return base
        self.take()
        sign = self._sign()
        exponent = _scale(self.atom(depth + 1), sign)
        if self.peek() == "^":
            raise TooLarge("a tower of powers")
        return _power(base, exponent)

    def atom(self, depth: int) -> Quotient:
        if depth > MAX_DEPTH:
            raise TooLarge("nesting")
        token = self.take()
        if not token:
            raise Unreadable("the end")
        if token[0].isdigit():
            return self._number(token, depth)
        if token in ("(", "{"):
            value = self.sum(depth + 1)
            self.expect(")" if token == "(" else "}")
            return value
        if token == "\\frac":
            top = self._argument(depth)
            return _divide(top, self._argument(depth))
        if token == "\\sqrt":
            if self.peek() == "[":
                return self._root(depth)
            return _square_root(self.atom(depth + 1) if self.peek() in ("(", "{") else self._argument(depth))
        if token == "\\binom":
            top, bottom = self._argument(depth), self._argument(depth)
            return _binomial(top, bottom)
        if token == "\\pi" or token[1:] in _SYMBOL_COMMANDS or (token.isalpha() and len(token) == 1):
            return self._symbol(token)
        raise Unreadable(token)

    def _number(self, token: str, depth: int) -> Quotient:
        if self.peek() == "_":  # digits in a stated base are that base's, equal to nothing else
            self.take()
            base = self.take() if self.peek() != "{" else "".join((self.take(), self.take(), self.take()))
            return _from_poly(_symbol(f"{token}_{base.strip('{}')}"))
        value = constant(Fraction(token))
        if self.peek() == "\\frac" and token.isdigit():
            self.take()
            top, bottom = self._argument(depth).rational(), self._argument(depth).rational()
            if top is None or bottom is None or not 0 < top < bottom:
                raise Unreadable("a number beside a fraction")
            return constant(Fraction(token) + top / bottom)
        return value

    def _symbol(self, token: str) -> Quotient:
        if token == "i":
            return _from_poly({(1, 1, ()): Fraction(1)})
        name = token
        if self.peek() == "_":
            self.take()
            if self.take() != "{":
                name += "_" + self._tokens[self._at - 1]
            else:
                part = ""
                while self.peek() not in ("}", ""):
                    part += self.take()
                self.expect("}")
                name += "_" + part
        return _from_poly(_symbol(name))

    def _argument(self, depth: int) -> Quotient:
        """What \\frac and \\sqrt take: a group, or one digit or letter (\\frac12 is a half)."""
        token = self.peek()
        if token == "{":
            return self.atom(depth + 1)
        if token[:1].isdigit() and len(token) > 1:
            self._tokens[self._at] = token[1:]
            return constant(int(token[0]))
        if token[:1].isdigit():
            return constant(int(self.take()))
        return self.atom(depth + 1)

    def _root(self, depth: int) -> Quotient:
        self.expect("[")
        degree = self.sum(depth + 1).rational()
        self.expect("]")
        radicand = self._argument(depth).rational()
        if degree == 2 and radicand is not None:
            return _square_root(constant(radicand))
        if degree is None or radicand is None or degree.denominator != 1 or not 2 < degree <= 64:
            raise Unreadable("a root")
        top, bottom = (_exact_root(n, int(degree)) for n in (radicand.numerator, radicand.denominator))
        if top is None or bottom is None:
            raise Unreadable("a root that is not rational")
        return constant(Fraction(top, bottom))


def _poly(value: Fraction) -> Poly:
    return {_ONE: value} if value else {}


def _symbol(name: str) -> Poly:
    return {(1, 0, ((name, 1),)): Fraction(1)}


def _from_poly(poly: Poly) -> Quotient:
    return Quotient(poly, {_ONE: Fraction(1)})


def _rational(poly: Poly) -> Fraction | None:
    if not poly:
        return Fraction(0)
    return poly.get(_ONE) if len(poly) == 1 else None


def _real(poly: Poly) -> float | None:
    total = 0.0
    for (radicand, imaginary, symbols), coefficient in poly.items():
        if imaginary or any(name not in ("\\pi", "e") for name, _ in symbols):
            return None
        try:
            value = float(coefficient) * math.sqrt(radicand)
            for name, exponent in symbols:
                value *= (math.pi if name == "\\pi" else math.e) ** exponent
        except OverflowError:
            return None
        total += value
    return total


def _bounded(poly: Poly) -> Poly:
    if len(poly) > MAX_TERMS:
        raise TooLarge("terms")
    for coefficient in poly.values():
        if coefficient.numerator.bit_length() > MAX_BITS or coefficient.denominator.bit_length() > MAX_BITS:
            raise TooLarge("digits")
    return poly


def _times(left: Poly, right: Poly) -> Poly:
    if len(left) * len(right) > MAX_TERMS * 8:
        raise TooLarge("terms")
    product: Poly = {}
    for (radicand1, i1, symbols1), c1 in left.items():
        for (radicand2, i2, symbols2), c2 in right.items():
            common = math.gcd(radicand1, radicand2)
            coefficient = c1 * c2 * common
            if i1 and i2:
                coefficient = -coefficient
            symbols = symbols1 or symbols2
            if symbols1 and symbols2:
                powers = dict(symbols1)
                for name, exponent in symbols2:
                    powers[name] = powers.get(name, 0) + exponent
                symbols = tuple(sorted((name, exponent) for name, exponent in powers.items() if exponent))
            monomial = (radicand1 // common * (radicand2 // common), i1 ^ i2, symbols)
            total = product.get(monomial, Fraction(0)) + coefficient
            if total:
                product[monomial] = total
            else:
                product.pop(monomial, None)
    return _bounded(product)


def _multiply(left: Quotient, right: Quotient) -> Quotient:
    return Quotient(_times(left.numerator, right.numerator), _times(left.denominator, right.denominator))


def _divide(left: Quotient, right: Quotient) -> Quotient:
    if not right.numerator:
        raise Unreadable("division by zero")
    if len(right.numerator) == 1:
        ((radicand, imaginary, symbols), coefficient) = next(iter(right.numerator.items()))
        inverse = 1 / (coefficient * radicand * (-1 if imaginary else 1))
        flipped = tuple((name, -exponent) for name, exponent in symbols)
        poly: Poly = {(radicand, imaginary, flipped): inverse}
        return Quotient(_times(_times(left.numerator, right.denominator), poly), left.denominator)
    return Quotient(_times(left.numerator, right.denominator), _times(left.denominator, right.numerator))


def _scale(value: Quotient, factor: int) -> Quotient:
    if factor == 1:
        return value
    return Quotient({monomial: -c for monomial, c in value.numerator.items()}, value.denominator)


def _add(left: Quotient, right: Quotient, sign: int) -> Quotient:
    if left.denominator == right.denominator:
        top, other, bottom = dict(left.numerator), right.numerator, left.denominator
    else:
        top = _times(left.numerator, right.denominator)
        other, bottom = _times(right.numerator, left.denominator), _times(left.denominator, right.denominator)
    for monomial, coefficient in other.items():
        total = top.get(monomial, Fraction(0)) + sign * coefficient
        if total:
            top[monomial] = total
        else:
            top.pop(monomial, None)
    return Quotient(_bounded(top), bottom)


def _power(base: Quotient, exponent: Quotient) -> Quotient:
    power = exponent.rational()
    if power is None:
        raise Unreadable("an exponent with symbols")
    if power == Fraction(1, 2):
        return _square_root(base)
    if power.denominator != 1:
        raise Unreadable("a fractional exponent")
    count = abs(power.numerator)
    bits = max((_bits(c) for poly in (base.numerator, base.denominator) for c in poly.values()), default=1)
    single = len(base.numerator) <= 1 and len(base.denominator) == 1
    if count > 10**6 or bits * count > MAX_BITS * 2 or (not single and count > MAX_POLY_POWER):
        raise TooLarge("a power")
    result = constant(1)
    square = base
    n = count
    while n:
        if n & 1:
            result = _multiply(result, square)
        n >>= 1
        if n:
            square = _multiply(square, square)
    return result if power >= 0 else _divide(constant(1), result)


def _bits(value: Fraction) -> int:
    """Bits that one more factor adds: none for +-1."""
    return max(abs(value.numerator).bit_length(), value.denominator.bit_length()) if abs(value) != 1 else 0


def _square_root(value: Quotient) -> Quotient:
    radicand = value.rational()
    if radicand is None:
        raise Unreadable("a root of an expression")
    imaginary = int(radicand < 0)
    outside, inside = _squarefree(abs(radicand.numerator) * radicand.denominator)
    if not inside:
        return constant(0)
    return _from_poly({(inside, imaginary, ()): Fraction(outside, radicand.denominator)})


def _squarefree(n: int) -> tuple[int, int]:
    """(a, b) with n = a*a*b and b squarefree; (0, 0) for 0."""
    if n == 0:
        return 0, 0
    root = math.isqrt(n)
    if root * root == n:
        return root, 1
    if n > MAX_RADICAND:
        raise Unreadable("a large radicand")
    outside, inside, prime = 1, 1, 2
    while prime * prime * prime <= n:
        while n % (prime * prime) == 0:
            n //= prime * prime
            outside *= prime
        if n % prime == 0:
            n //= prime
            inside *= prime
        prime += 1 if prime == 2 else 2
    root = math.isqrt(n)  # what is left has at most two prime factors
    return (outside * root, inside) if root * root == n else (outside, inside * n)


def _exact_root(n: int, degree: int) -> int | None:
    if n < 0:
        if degree % 2 == 0:
            return None
        positive = _exact_root(-n, degree)
        return None if positive is None else -positive
    low, high = 0, 1 << (n.bit_length() // degree + 1)
    while low < high:
        middle = (low + high) // 2
        if middle**degree < n:
            low = middle + 1
        else:
            high = middle
    return low if low**degree == n else None


def _factorial(value: Quotient) -> Quotient:
    n = value.rational()
    if n is None or n.denominator != 1 or n < 0:
        raise Unreadable("a factorial")
    if n > MAX_FACTORIAL:
        raise TooLarge("a factorial")
    return constant(math.factorial(n.numerator))


def _binomial(top: Quotient, bottom: Quotient) -> Quotient:
    n, k = top.rational(), bottom.rational()
    if n is None or k is None or n.denominator != 1 or k.denominator != 1 or n < 0 or k < 0:
        raise Unreadable("a binomial")
    if n > 1000:
        raise TooLarge("a binomial")
    return constant(math.comb(n.numerator, k.numerator))
