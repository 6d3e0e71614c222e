"""How fast and how right the grader is: `python -m tests.benchmarks.grading [--data FILE] [--cases FILE ...] [--json]`.

It grades labelled cases (`cases_wrong`: how many verdicts or extractions differ) and times them. A case file is a JSON
list of {answer, reference, expected}, of {output, reference, expected} with an optional `extract` (the output is a
whole text), or of {output, expected}, where `expected` is the answer to be found in the output. With a jsonl of
{question, answer} whose answers are LaTeX (800 problems of MATH's training set were used) it also measures

* self_agreement: each reference against itself in harmless rewritings (spacing, \\dfrac, \\left\\right, trailing unit
  or dot, boxed in a sentence, a decimal where it is exact);
* cross_false_accepts: 2,000 fixed pairs of references of different problems, half of them neighbours in sorted order,
  that the grader calls equal although sympy's own evaluation outside our grader calls them different.

With GSM8K's released solutions (`--gsm8k-solutions example_model_solutions.jsonl` of openai/grade-school-math) it
counts the problems that each of the four models solves by our reading of their last lines (`gsm8k`: published are 286,
515, 458 and 742 of 1,319).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import sys
import time
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

from rstar.config import ProblemsSection, SandboxSection
from rstar.grading import Grader, extract_answer, is_equivalent_fast
from rstar.grading.extract import last_line_answer
from rstar.problems import load_problems
from rstar.sandbox import Sandbox

DATA = Path(__file__).parents[1] / "data"
CASES = DATA / "grading_cases.json"
CASE_FILES = (CASES, DATA / "grading_pairs.json", DATA / "extraction_cases.json")
PAIRS = 2000


def numeric_per_second() -> float:
    """Gradings a second of distinct numeric answers in mixed spelling; nothing is remembered between them."""
    pairs = [(f"{n / 8}", f"\\frac{{{n}}}{{8}}") for n in range(3000)] + [(f"{n:,}", f"{n}") for n in range(3000)]
    pairs += [(str(n), str(n + n % 2)) for n in range(3000)]
    start = time.perf_counter()
    for answer, reference in pairs:
        is_equivalent_fast(answer, reference)
    return len(pairs) / (time.perf_counter() - start)


async def wrong_cases(path: Path, grader: Grader) -> list[str]:
    """The labelled cases of a file whose verdict or extraction is not the expected one."""
    wrong = []
    for case in json.loads(path.read_text(encoding="utf-8")):
        output = case.get("output", case.get("answer"))
        if "reference" not in case:
            found: object = extract_answer(output)
        else:
            answer = extract_answer(output) if case.get("extract") else output
            found = answer is not None and await grader.is_equivalent(answer, case["reference"])
        if found != case["expected"]:
            wrong.append(f"{path.name}: {output[:80]!r} for {case.get('reference', '')[:80]!r} gave {found!r}")
    return wrong


def gsm8k_verdicts(path: Path) -> dict[str, dict[str, int]]:
    """What the last lines of released GSM8K solutions say, by model.

    A record holds the question's `ground_truth` solution and, under each model's name, {solution, is_correct}. The
    paper compares the numbers as text (`solved`; `differ`: verdicts unlike the file's own), we by value (`by_value`).
    """
    counts: dict[str, dict[str, int]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        reference = last_line_answer(record["ground_truth"]) or ""
        for model, sample in record.items():
            if isinstance(sample, dict) and "solution" in sample:
                answer = last_line_answer(sample["solution"]) or ""
                number = re.match(r"-?[0-9.,]+", answer)
                right = number is not None and number[0] == reference
                own = counts.setdefault(model, {"solved": 0, "differ": 0, "by_value": 0})
                own["solved"] += right
                own["differ"] += right != sample["is_correct"]
                own["by_value"] += is_equivalent_fast(answer, reference) is True
    return counts


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


async def measure(data: str, cases: Sequence[Path] = (), solutions: str = "") -> dict[str, object]:
    """All figures of the module's docstring."""
    figures: dict[str, object] = {"numeric_per_second": round(numeric_per_second())}
    if solutions:
        figures["gsm8k"] = gsm8k_verdicts(Path(solutions))
    async with Sandbox(SandboxSection(processes=1)) as sandbox:
        spent = await symbolic_milliseconds(sandbox)
        figures["symbolic_p50_ms"] = round(statistics.median(spent), 1)
        figures["symbolic_max_ms"] = round(max(spent), 1)
        grader = Grader(sandbox)
        wrong_ones = [line for path in cases for line in await wrong_cases(path, grader)]
        figures["cases_wrong"] = len(wrong_ones)
        print("".join(f"wrong {line}\n" for line in wrong_ones), end="", file=sys.stderr)
        if data:
            answers = [p.answer for p in load_problems(ProblemsSection(name="file", path=data, heldout=0)).train]
            grader = Grader(sandbox)
            share, missed = await self_agreement(answers, grader)
            figures["self_agreement"] = round(share, 5)
            for line in missed[:40]:
                print("missed", line, file=sys.stderr)
            wrong = 0
            for first, second in fixed_pairs(answers):
                if await grader.is_equivalent(first, second) and labelled_different(first, second):
                    wrong += 1
                    print("false accept", repr(first), repr(second), file=sys.stderr)
            figures["cross_false_accepts"] = wrong
            figures["symbolic_calls"] = grader.symbolic_calls
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="jsonl of {question, answer} with LaTeX answers")
    parser.add_argument(
        "--cases", nargs="*", type=Path, default=CASE_FILES, help="labelled cases (default: the tests')"
    )
    parser.add_argument("--gsm8k-solutions", default="", help="GSM8K's example_model_solutions.jsonl")
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    arguments = parser.parse_args()
    figures = asyncio.run(measure(arguments.data, arguments.cases, arguments.gsm8k_solutions))
    if arguments.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:20} {value}")


if __name__ == "__main__":
    main()
