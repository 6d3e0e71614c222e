"""Exact arithmetic on closed forms: quotients of polynomials with roots, compared without rounding.

A polynomial maps monomials to rational coefficients; a monomial is (squarefree radicand, power of i, symbols with
integer exponents). Square roots of different squarefree integers are linearly independent over the rationals, so two
quotients n1/d1 and n2/d2 are equal exactly if n1*d2 - n2*d1 has no term left: `\\frac{1}{\\sqrt3}` is
`\\frac{\\sqrt3}{3}`, and `(2x+3)(2x-3)` is `4x^2-9`. pi, e and infinity are symbols. Everything is bounded: length,
nesting, terms, bits, and what they cost together: arithmetic is paid for before it is done (see work).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from rstar.grading.expressions import Algebra, Hopeless, Unreadable
from rstar.grading.work import charge

MAX_TERMS = 128
MAX_BITS = 16_384  # 3^2007 has 3,182
MAX_RADICAND = 10**12
MAX_POLY_POWER = 12
MAX_FACTORIAL = 200
MAX_DEGREE = 64  # of a root

Monomial = tuple[int, int, tuple[tuple[str, int], ...]]
Poly = dict[Monomial, Fraction]

_ONE: Monomial = (1, 0, ())


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
        charge(price(left[some], right[some]))
        factor = left[some] / right[some]
        charge(sum(price(factor, coefficient) for coefficient in right.values()))
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
        if top is None or bottom is None or bottom == 1:
            return None if bottom is None else top
        charge(price(top, bottom))
        return top / bottom

    def real(self) -> float | None:
        """Its value as a float if it is a real constant."""
        charge(len(self.numerator) + len(self.denominator))
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


def price(first: Fraction, second: Fraction) -> int:
    """What their sum, product or quotient costs: reducing it is quadratic in the digits."""
    return 3 + _priced(1, _length(first), 1, _length(second))


def _length(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def _priced(count1: int, bits1: int, count2: int, bits2: int) -> int:
    """Microseconds for the digits of every first with every second number, given how many and their bits in all."""
    return (count1 * bits2 + count2 * bits1) // 128 + bits1 * bits2 // 600_000


def _bounded(poly: Poly) -> Poly:
    if len(poly) > MAX_TERMS:
        raise Hopeless("terms")
    for coefficient in poly.values():
        if coefficient.numerator.bit_length() > MAX_BITS or coefficient.denominator.bit_length() > MAX_BITS:
            raise Hopeless("digits")
    return poly


def _plus(left: Poly, right: Poly) -> Poly:
    charge(len(left) // 16 + len(right))
    total = dict(left)
    for monomial, coefficient in right.items():
        _add(total, monomial, coefficient)
    return _bounded(total)


def _add(total: Poly, monomial: Monomial, coefficient: Fraction) -> None:
    """Sums pay as they grow: that of many unlike denominators is far longer than any of them."""
    present = total.get(monomial)
    if present is None:
        total[monomial] = coefficient
        return
    charge(price(present, coefficient))
    both = present + coefficient
    if both:
        total[monomial] = both
    else:
        del total[monomial]


def _price_of_product(left: Poly, right: Poly) -> int:
    """Known before any of its terms is computed."""
    sizes = []
    for poly in (left, right):
        bits = names = 0
        for (radicand, _, symbols), coefficient in poly.items():
            bits += _length(coefficient) + (radicand.bit_length() if radicand > 1 else 0)
            names += len(symbols)
        sizes.append((len(poly), bits, names))
    (count1, bits1, names1), (count2, bits2, names2) = sizes
    merged = (count1 * names2 + count2 * names1) // 2 if names1 and names2 else 0
    return 6 * count1 * count2 + _priced(count1, bits1, count2, bits2) + merged


def _times(left: Poly, right: Poly) -> Poly:
    if len(left) * len(right) > MAX_TERMS * 8:
        raise Hopeless("terms")
    charge(_price_of_product(left, right))
    product: Poly = {}
    for (radicand1, i1, symbols1), c1 in left.items():
        for (radicand2, i2, symbols2), c2 in right.items():
            common = math.gcd(radicand1, radicand2)
            coefficient = c1 * c2 if common == 1 else c1 * c2 * common
            if i1 and i2:
                coefficient = -coefficient
            symbols = symbols1 or symbols2
            if symbols1 and symbols2:
                powers = dict(symbols1)
                for name, exponent in symbols2:
                    powers[name] = powers.get(name, 0) + exponent
                symbols = tuple(sorted((name, exponent) for name, exponent in powers.items() if exponent))
            monomial = (radicand1 // common * (radicand2 // common), i1 ^ i2, symbols)
            _add(product, monomial, coefficient)
    return _bounded(product)


def power(base: Quotient, exponent: Quotient) -> Quotient:
    """base ** exponent for integer exponents, and for fractions where the root is exact."""
    power = exponent.rational()
    if power is None:
        raise Unreadable("an exponent with symbols")
    if power.denominator != 1:
        positive = (known := base.rational()) is not None and known >= 0
        if power.denominator > MAX_DEGREE or not (positive or abs(power.numerator) == 1):
            raise Unreadable("a fractional exponent")
        return root(_whole_power(base, power.numerator), constant(power.denominator))
    return _whole_power(base, power.numerator)


def _whole_power(base: Quotient, exponent: int) -> Quotient:
    count = abs(exponent)
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
    return result if exponent >= 0 else constant(1) / result


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
    charge(n.bit_length() ** 2 // 1_000_000)
    root = math.isqrt(n)
    if root * root == n:
        return root, 1
    if n > MAX_RADICAND:
        raise Unreadable("a large radicand")
    charge(int(n ** (1 / 3)) // 7)
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
    if n < 2:
        return n
    step = 3 + n.bit_length() ** 2 // 2_000_000
    root = 1 << ((n.bit_length() - 1) // degree + 1)  # above the root; Newton's steps fall to its whole part
    while True:
        charge(step)
        below = ((degree - 1) * root + n // root ** (degree - 1)) // degree
        if below >= root:
            return root if root**degree == n else None
        root = below


def root(value: Quotient, degree: Quotient) -> Quotient:
    """The real root of a rational number where it is rational, too; any square root of one."""
    n, radicand = degree.rational(), value.rational()
    if n == 2:
        return square_root(value)
    if n is None or radicand is None or n.denominator != 1 or not 2 < n <= MAX_DEGREE:
        raise Unreadable("a root")
    top, bottom = (integer_root(part, int(n)) for part in (radicand.numerator, radicand.denominator))
    if top is None or bottom is None:
        raise Unreadable("a root that is not rational")
    return constant(Fraction(top, bottom))


def function(name: str, values: Sequence[Quotient]) -> Quotient:
    """The functions that are exact here: roots, e to a whole power, absolute values, whole parts, factorials."""
    match name:
        case "sqrt":
            return square_root(values[0])
        case "root":
            return root(*values)
        case "exp":
            return power(symbol("e"), values[0])
    numbers = [value.rational() for value in values]
    match name, numbers:
        case "abs", [Fraction() as x]:
            return constant(abs(x))
        case "floor", [Fraction() as x]:
            return constant(math.floor(x))
        case "ceil", [Fraction() as x]:
            return constant(math.ceil(x))
        case "factorial", [Fraction(denominator=1) as x] if x >= 0:
            if x > MAX_FACTORIAL:
                raise Hopeless("a factorial")
            charge(5)
            return constant(math.factorial(x.numerator))
        case "binomial", [Fraction(denominator=1) as n, Fraction(denominator=1) as k] if n >= 0 and k >= 0:
            if n > 1000:
                raise Hopeless("a binomial")
            charge(20)
            return constant(math.comb(n.numerator, k.numerator))
    raise Unreadable(name)


EXACT = Algebra(constant, symbol, power, function, Quotient.rational)
