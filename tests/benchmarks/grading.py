"""How fast and how right the grader is: `python -m tests.benchmarks.grading [--data FILE] [--json]`.

Without data it times the labelled cases. With a jsonl of {question, answer} whose answers are LaTeX (800 problems of
MATH's training set were used) it also measures

* self_agreement: each reference against itself in harmless rewritings (spacing, \\dfrac, \\left\\right, trailing unit
  or dot, boxed in a sentence, a decimal where it is exact);
* cross_false_accepts: 2,000 fixed pairs of references of different problems, half of them neighbours in sorted order,
  that the grader calls equal although sympy's own evaluation outside our grader calls them different.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

from rstar.config import ProblemsSection, SandboxSection
from rstar.grading import Grader, extract_answer, is_equivalent_fast
from rstar.problems import load_problems
from rstar.sandbox import Sandbox

CASES = Path(__file__).parents[1] / "data" / "grading_cases.json"
PAIRS = 2000


def numeric_per_second() -> float:
    """Gradings a second of distinct numeric answers in mixed spelling; nothing is remembered between them."""
    pairs = [(f"{n / 8}", f"\\frac{{{n}}}{{8}}") for n in range(3000)] + [(f"{n:,}", f"{n}") for n in range(3000)]
    pairs += [(str(n), str(n + n % 2)) for n in range(3000)]
    start = time.perf_counter()
    for answer, reference in pairs:
        is_equivalent_fast(answer, reference)
    return len(pairs) / (time.perf_counter() - start)


async def symbolic_milliseconds(sandbox: Sandbox) -> list[float]:
    """Wall time of each labelled case that needs the symbolic path, and of some that never end."""
    cases = [case for case in json.loads(CASES.read_text()) if case.get("symbolic")]
    pairs = [(case["output"], case["reference"]) for case in cases]
    pairs += [("\\sum_{n=1}^{10^9} \\sin n^2", "5"), ("\\int_0^1 \\sin(\\sin(\\sin x)) e^{x^2} dx", "\\tan 2")]
    grader = Grader(sandbox)
    await grader.is_equivalent("\\log_2 8", "3")  # starts the grading processes
    spent = []
    for answer, reference in pairs:
        if is_equivalent_fast(answer, reference) is None:
            start = time.perf_counter()
            await grader.is_equivalent(answer, reference)
            spent.append((time.perf_counter() - start) * 1000)
    return spent


def rewritings(answer: str) -> dict[str, str]:
    """Harmless rewritings of a reference, by name; as whole outputs."""
    spaced = re.sub(r"(?<=[0-9a-z}])\s*([+=])\s*(?=[0-9a-z\\])", r"  \1 ", answer)
    fraction = re.fullmatch(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}", answer)
    decimal = answer
    if fraction and set(_prime_factors(int(fraction[3]))) <= {2, 5}:
        value = Fraction(int(fraction[2]), int(fraction[3]))
        decimal = fraction[1] + f"{Decimal(value.numerator) / Decimal(value.denominator):f}"
    larger = answer.replace("\\frac", "\\dfrac") if "\\frac" in answer else answer.replace("\\dfrac", "\\frac")
    brackets = re.sub(
        r"(?<!\\left)(?<!\\left )\(", r"\\left(", re.sub(r"(?<!\\right)(?<!\\right )\)", r"\\right)", answer)
    )
    plain = re.fullmatch(r"-?[0-9.]+|-?\\frac\{\d+\}\{\d+\}", answer)
    return {
        "spacing": f"\\boxed{{ {spaced} }}",
        "dfrac": f"\\boxed{{{larger}}}",
        "left right": f"\\boxed{{{brackets}}}",
        "unit or dot": f"The answer is \\boxed{{{answer} \\text{{ units}}}}."
        if plain
        else f"The answer is ${answer}$.",
        "boxed in text": f"Adding these, we find that the result is $\\boxed{{{answer}}}$, as required.",
        "decimal": f"#### {decimal}",
    }


def _prime_factors(n: int) -> list[int]:
    return [p for p in range(2, n + 1) if n % p == 0 and all(p % q for q in range(2, p))]


async def self_agreement(answers: list[str], grader: Grader) -> tuple[float, list[str]]:
    """Share of rewritings that are called equal, and those that are not."""
    total, missed = 0, []
    for answer in answers:
        for name, output in rewritings(answer).items():
            extracted = extract_answer(output)
            total += 1
            if extracted is None or not await grader.is_equivalent(extracted, answer):
                missed.append(f"{name}: {output} for {answer}")
    return 1 - len(missed) / total, missed


def fixed_pairs(answers: list[str]) -> list[tuple[str, str]]:
    """Pairs of different problems' references: half at random, half neighbours in sorted order."""
    rng, order = random.Random(1), sorted(answers)
    pairs = [(order[i], order[i + 1 + i % 3]) for i in range(len(order) - 3)] * 2
    pairs = pairs[: PAIRS // 2]
    while len(pairs) < PAIRS:
        first, second = rng.sample(range(len(answers)), 2)
        pairs.append((answers[first], answers[second]))
    return pairs


def labelled_different(first: str, second: str) -> bool:
    """Whether sympy, outside our grader, says that two references differ; unreadable ones differ if their text does."""
    if re.sub(r"\s", "", first) == re.sub(r"\s", "", second):
        return False
    left, right = _evaluated(first), _evaluated(second)
    if left is None or right is None:
        return True
    import sympy

    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    point = {symbol: sympy.Rational(37 + 11 * n, 23) for n, symbol in enumerate(symbols)}
    try:
        return bool(abs(sympy.N((left - right).subs(point), 30)) > 1e-20)
    except TypeError:
        return True


def _evaluated(text: str):  # type: ignore[no-untyped-def]
    """A LaTeX reference as a sympy expression by math-verify's grammar; None if it is no single expression."""
    from math_verify import LatexExtractionConfig, parse
    from sympy import Expr

    plain = re.sub(r"\\text\{[^{}]*\}|\^\\circ|\\%|\\\$|,\\!|\{,\}", "", text)
    found = parse(
        f"$\\boxed{{{plain}}}$",
        extraction_config=[LatexExtractionConfig(boxed_match_priority=0)],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    return next((item for item in found if isinstance(item, Expr)), None)


async def measure(data: str) -> dict[str, float | int]:
    """All figures of the module's docstring."""
    figures: dict[str, float | int] = {"numeric_per_second": round(numeric_per_second())}
    async with Sandbox(SandboxSection(processes=1)) as sandbox:
        spent = await symbolic_milliseconds(sandbox)
        figures["symbolic_p50_ms"] = round(statistics.median(spent), 1)
        figures["symbolic_max_ms"] = round(max(spent), 1)
        if data:
            answers = [p.answer for p in load_problems(ProblemsSection(name="file", path=data, heldout=0)).train]
            grader = Grader(sandbox)
            share, missed = await self_agreement(answers, grader)
            figures["self_agreement"] = round(share, 5)
            for line in missed[:40]:
                print("missed", line)
            wrong = 0
            for first, second in fixed_pairs(answers):
                if await grader.is_equivalent(first, second) and labelled_different(first, second):
                    wrong += 1
                    print("false accept", repr(first), repr(second))
            figures["cross_false_accepts"] = wrong
            figures["symbolic_calls"] = grader.symbolic_calls
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="jsonl of {question, answer} with LaTeX answers")
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    arguments = parser.parse_args()
    figures = asyncio.run(measure(arguments.data))
    if arguments.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:20} {value}")


if __name__ == "__main__":
    main()
