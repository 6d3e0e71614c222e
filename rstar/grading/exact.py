"""Exact arithmetic on closed forms: quotients of polynomials with roots, compared without rounding.

A polynomial maps monomials to rational coefficients; a monomial is (squarefree radicand, power of i, symbols with
integer exponents). Square roots of different squarefree integers are linearly independent over the rationals, so two
quotients n1/d1 and n2/d2 are equal exactly if n1*d2 - n2*d1 has no term left: `\\frac{1}{\\sqrt3}` is
`\\frac{\\sqrt3}{3}`, and `(2x+3)(2x-3)` is `4x^2-9`. pi, e and infinity are symbols. Everything is bounded: length,
nesting, terms, bits, and the work of all of it together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from fractions import Fraction

MAX_TERMS = 128
MAX_BITS = 16_384  # 3^2007 has 3,182
MAX_RADICAND = 10**12
MAX_POLY_POWER = 12
MAX_FACTORIAL = 200
MAX_WORK = 20_000.0  # about microseconds
TERM_WORK, BITS_WORK = 5.0, 500 / MAX_BITS**2  # of one product or sum of coefficients, and for its bits squared

Monomial = tuple[int, int, tuple[tuple[str, int], ...]]
Poly = dict[Monomial, Fraction]

_ONE: Monomial = (1, 0, ())


class Unreadable(Exception):
    """Not in the fragment that is decided here; another path may know."""


class Hopeless(Exception):
    """Beyond the bounds, or no mathematics at all (1/0, an open bracket, `1 2`): nobody is to evaluate it."""


_left: ContextVar[float] = ContextVar("work left", default=math.inf)


@contextmanager
def bounded_work() -> Iterator[None]:
    """Let what is computed inside cost MAX_WORK at most, by an estimate made before each step; then it is Hopeless."""
    token = _left.set(MAX_WORK)
    try:
        yield
    finally:
        _left.reset(token)


def spend(work: float) -> None:
    """Take so many microseconds from what `bounded_work` allows. Raises Hopeless when it is used up, and ever after."""
    left = _left.get() - work
    _left.set(left)
    if left < 0:
        raise Hopeless("work")


def _spend(terms: int, one: Poly, other: Poly) -> None:
    spend(0)
    bits = _size(one) + _size(other)
    spend(terms * (TERM_WORK + BITS_WORK * bits * bits))


def _size(poly: Poly) -> int:
    most = 0
    for coefficient in poly.values():
        most = max(most, coefficient.numerator.bit_length(), coefficient.denominator.bit_length())
    return most


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

    def __add__(self, other: Quotient) -> Quotient:
        if self.denominator == other.denominator:
            return Quotient(_plus(self.numerator, other.numerator), self.denominator)
        left, right = _times(self.numerator, other.denominator), _times(other.numerator, self.denominator)
        return Quotient(_plus(left, right), _times(self.denominator, other.denominator))

    def __neg__(self) -> Quotient:
        return Quotient({monomial: -coefficient for monomial, coefficient in self.numerator.items()}, self.denominator)

    def __sub__(self, other: Quotient) -> Quotient:
        return self + -other

    def __mul__(self, other: Quotient) -> Quotient:
        return Quotient(_times(self.numerator, other.numerator), _times(self.denominator, other.denominator))

    def __truediv__(self, other: Quotient) -> Quotient:
        if not other.numerator:
            raise Hopeless("division by zero")
        if len(other.numerator) > 1:
            top, bottom = _times(self.numerator, other.denominator), _times(self.denominator, other.numerator)
            return Quotient(top, bottom)
        (((radicand, imaginary, symbols), coefficient),) = other.numerator.items()
        inverse = 1 / (coefficient * radicand * (-1 if imaginary else 1))
        monomial = (radicand, imaginary, tuple((name, -exponent) for name, exponent in symbols))
        return Quotient(_times(_times(self.numerator, other.denominator), {monomial: inverse}), self.denominator)

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
    return Quotient({_ONE: Fraction(value)} if value else {}, {_ONE: Fraction(1)})


def symbol(name: str) -> Quotient:
    """A variable or a named constant; `i` is the imaginary unit."""
    monomial: Monomial = (1, 1, ()) if name == "i" else (1, 0, ((name, 1),))
    return Quotient({monomial: Fraction(1)}, {_ONE: Fraction(1)})


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
        raise Hopeless("terms")
    for coefficient in poly.values():
        if coefficient.numerator.bit_length() > MAX_BITS or coefficient.denominator.bit_length() > MAX_BITS:
            raise Hopeless("digits")
    return poly


def _plus(left: Poly, right: Poly) -> Poly:
    _spend(len(right), left, right)
    total = dict(left)
    for monomial, coefficient in right.items():
        both = total.get(monomial, Fraction(0)) + coefficient
        if both:
            total[monomial] = both
        else:
            total.pop(monomial, None)
    return _bounded(total)


def _times(left: Poly, right: Poly) -> Poly:
    if len(left) * len(right) > MAX_TERMS * 8:
        raise Hopeless("terms")
    _spend(len(left) * len(right), left, right)
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


def power(base: Quotient, exponent: Quotient) -> Quotient:
    """base ** exponent for integer exponents and 1/2."""
    power = exponent.rational()
    if power is None:
        raise Unreadable("an exponent with symbols")
    if power == Fraction(1, 2):
        return square_root(base)
    if power.denominator != 1:
        raise Unreadable("a fractional exponent")
    count = abs(power.numerator)
    bits = max((_bits(c) for poly in (base.numerator, base.denominator) for c in poly.values()), default=1)
    single = len(base.numerator) <= 1 and len(base.denominator) == 1
    if count > 10**6 or bits * count > MAX_BITS * 2 or (not single and count > MAX_POLY_POWER):
        raise Hopeless("a power")
    result = constant(1)
    square = base
    n = count
    while n:
        if n & 1:
            result = result * square
        n >>= 1
        if n:
            square = square * square
    return result if power >= 0 else constant(1) / result


def _bits(value: Fraction) -> int:
    """Bits that one more factor adds: none for +-1."""
    return max(abs(value.numerator).bit_length(), value.denominator.bit_length()) if abs(value) != 1 else 0


def square_root(value: Quotient) -> Quotient:
    """Root of a rational number, simplified: sqrt(8/3) is 2/3 sqrt(6)."""
    radicand = value.rational()
    if radicand is None:
        raise Unreadable("a root of an expression")
    imaginary = int(radicand < 0)
    outside, inside = _squarefree(abs(radicand.numerator) * radicand.denominator)
    if not inside:
        return constant(0)
    return Quotient({(inside, imaginary, ()): Fraction(outside, radicand.denominator)}, {_ONE: Fraction(1)})


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


def integer_root(n: int, degree: int) -> int | None:
    """The whole number whose power is n, if there is one."""
    if n < 0:
        if degree % 2 == 0:
            return None
        positive = integer_root(-n, degree)
        return None if positive is None else -positive
    low, high = 0, 1 << (n.bit_length() // degree + 1)
    while low < high:
        middle = (low + high) // 2
        if middle**degree < n:
            low = middle + 1
        else:
            high = middle
    return low if low**degree == n else None


def factorial(value: Quotient) -> Quotient:
    """n! for a whole number up to MAX_FACTORIAL."""
    n = value.rational()
    if n is None or n.denominator != 1 or n < 0:
        raise Unreadable("a factorial")
    if n > MAX_FACTORIAL:
        raise Hopeless("a factorial")
    return constant(math.factorial(n.numerator))


def binomial(top: Quotient, bottom: Quotient) -> Quotient:
    """n choose k for whole numbers, n up to 1,000."""
    n, k = top.rational(), bottom.rational()
    if n is None or k is None or n.denominator != 1 or k.denominator != 1 or n < 0 or k < 0:
        raise Unreadable("a binomial")
    if n > 1000:
        raise Hopeless("a binomial")
    return constant(math.comb(n.numerator, k.numerator))
