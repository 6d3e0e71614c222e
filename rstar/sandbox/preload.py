"""What the zygotes import before the locks. Everything else still imports afterwards, at the cost of its import time.

Modules of the standard library that steps commonly use are loaded here too: a step then pays nothing for them.
"""

from __future__ import annotations

STEP_MODULES = [
    "math", "cmath", "numpy", "numpy.random", "numpy.linalg", "sympy", "mpmath", "scipy", "scipy.special", "array",
    "ast", "asyncio", "base64", "binascii", "bisect", "calendar", "collections.abc", "contextlib", "copy", "csv",
    "ctypes", "dataclasses", "datetime", "decimal", "difflib", "enum", "fractions", "functools", "hashlib", "heapq",
    "inspect", "itertools", "json", "logging", "numbers", "operator", "pathlib", "pickle", "pprint", "queue",
    "random", "re", "secrets", "statistics", "string", "struct", "subprocess", "tempfile", "textwrap", "threading",
    "time", "timeit", "traceback", "typing", "unicodedata", "uuid", "warnings", "zoneinfo",
]  # fmt: skip

# Not there while those are imported: numpy.f2py, which scipy.special loads, would take it and with it a tenth of all
# mappings, which every fork copies. Steps may import it.
LEFT_OUT = ["charset_normalizer"]

# Loads what these calls import lazily and fills sympy's caches: the first such call of a step is then a cheap one.
WARM_UP = """
import sympy
sympy.Dummy._base_dummy_index = 10**6  # random otherwise, and the order of terms depends on it
x, y = sympy.symbols("x y")
sympy.solve(sympy.Eq(x**2 - 5*x + 6, 0), x)
sympy.solve([x + y - 3, x - y - 1], [x, y])
sympy.simplify(sympy.sin(x)**2 + sympy.cos(x)**2)
sympy.factor(x**2 - 1), sympy.expand((x + 1)**3), sympy.diff(x**3, x), sympy.integrate(x**2, x)
sympy.factorint(360), sympy.gcd(12, 18), sympy.isprime(97), sympy.Rational(1, 3).evalf()
str(sympy.Matrix([[1, 2], [3, 4]]).det()), sympy.latex(x**2 / 2), sympy.nsimplify(0.5), sympy.sympify("x + 1")
"""

GRADING_MODULES = ["sympy", "math_verify"]
