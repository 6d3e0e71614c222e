"""A teacher that a person can check: a program that answers some families of tasks in the form that it is asked for.

Which form is read off its instruction: the parts that it names in quotation marks, "Recall:", "Extract:", "Step 1:",
"Guess 1:", "Explanation:", in this order; none of them: the answer alone. The families are reasoning-gym's chain_sum,
leg_counting, letter_counting, gcd, lcm of two, products, basic_arithmetic and simple_equations (linear, 0 to 64).

It is a teacher with a weakness, so that there is something to choose: where a form leaves out a part that the family
needs (NEEDS), it slips on the SLIPS of all questions, always the same ones, and its answer is one too high. So a
strategy's accuracy is 1 where it suits the family, and about 1 - SLIPS elsewhere.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from itertools import accumulate
from math import gcd, lcm

from rstar.calculator import evaluate

SLIPS = 0.4
UNKNOWN = "I do not know this kind of task."
PARTS = ("Recall:", "Extract:", "Step 1:", "Guess 1:", "Explanation:")
NEEDS = {
    "sum": ("Step 1:",), "legs": ("Recall:", "Step 1:"), "letters": ("Extract:",), "gcd": ("Recall:",),
    "lcm": ("Recall:", "Step 1:"), "calculation": ("Step 1:",), "equation": ("Guess 1:",),
}  # fmt: skip
LEGS = {
    0: ("snake", "sea slug", "jellyfish", "flatworm", "leech"),
    2: ("chicken", "bird", "human", "duck"),
    4: ("dog", "cat", "cow", "horse", "lion", "elephant", "giraffe", "tiger", "deer", "sheep"),
    5: ("starfish",),
    6: ("insect", "ant", "butterfly", "beetle", "bee", "wasp", "grasshopper", "cricket", "cockroach", "praying mantis"),
    8: ("spider", "scorpion"), 10: ("crab", "lobster", "shrimp"), 14: ("woodlouse",),
}  # fmt: skip
_LEGS_OF = {animal: legs for legs, animals in LEGS.items() for animal in (*animals, "firefly" * (legs == 6))}


@dataclass(frozen=True)
class Work:
    """All that may be written on a question, a line an item."""

    family: str
    parts: dict[str, list[str]]  # by PARTS; steps and guesses get their numbers when they are written
    answer: int


def teacher_script(prompt: str, seed: int, index: int) -> str:
    """The answer to the last question of a prompt, in the form that the instruction before it asks for."""
    found = [place for pattern, _ in _FAMILIES for place in re.finditer(pattern, prompt)]
    if not found:
        return UNKNOWN
    asked = max(found, key=lambda match: match.start())
    try:
        work = next(read(asked) for pattern, read in _FAMILIES if re.fullmatch(pattern, asked[0]))
    except ValueError:  # reasoning-gym rounds such a division down, which no step could say truthfully
        return UNKNOWN
    wanted = [part for part in PARTS if f'"{part}"' in prompt[: asked.start()]]
    short = work.family in ("sum", "calculation") and len(work.parts["Step 1:"]) == 1
    needs = () if short else NEEDS[work.family]
    slips = not set(needs) <= set(wanted) and slips_on(asked[0], wanted)
    lines = [line for part in wanted for line in _written(part, work.parts[part])]
    return "\n".join([*lines, f"#### {work.answer + slips}"])


def slips_on(question: str, wanted: list[str]) -> bool:
    """Whether the teacher slips on a question in a form that does not suit it; the same for everyone who asks."""
    chance = hashlib.sha256("\0".join([question, *wanted]).encode()).digest()[:4]
    return int.from_bytes(chance, "big") / 2**32 < SLIPS


def _written(part: str, lines: list[str]) -> list[str]:
    if part in ("Step 1:", "Guess 1:"):
        return [f"{part.replace('1', str(n))} {line}" for n, line in enumerate(lines, 1)]
    return [f"{part} {'; '.join(lines)}"]


def _sum(match: re.Match[str]) -> Work:
    signed = [
        int(number) * (-1 if sign == "-" else 1) for sign, number in re.findall(r"(?:([-+]) )?(-?\d+)", match["sum"])
    ]
    totals = list(accumulate(signed))
    steps = [
        f"{a} {'-' if n < 0 else '+'} {abs(n)} = {b}" for a, n, b in zip(totals, signed[1:], totals[1:], strict=False)
    ]
    return _work("sum", totals[-1], "sums are worked out from left to right", [str(n) for n in signed], steps)


def _legs(match: re.Match[str]) -> Work:
    counted = [(int(n), _animal(name)) for n, name in re.findall(r"(\d+) ([a-z ]+)", match["animals"])]
    totals = list(accumulate(n * _LEGS_OF[animal] for n, animal in counted))
    steps = [
        f"{n} x {_LEGS_OF[animal]} = {n * _LEGS_OF[animal]}, total {total}"
        for (n, animal), total in zip(counted, totals, strict=True)
    ]
    recalled = "; ".join(f"{animal} {_LEGS_OF[animal]} legs" for _, animal in counted)
    return _work("legs", totals[-1], recalled, [f"{n} {animal}" for n, animal in counted], steps)


def _animal(plural: str) -> str:
    """reasoning-gym adds an s to what is more than one, whatever the word."""
    name = plural.strip()
    return name if name in _LEGS_OF else name.removesuffix("s")


def _letters(match: re.Match[str]) -> Work:
    letter, words = match["letter"], match["text"].split()
    counts = [word.lower().count(letter.lower()) for word in words]
    totals = list(accumulate(counts))
    extracted = [f"{word} {count}" for word, count in zip(words, counts, strict=True) if count] or ["nothing"]
    steps = [f"{word}, total {total}" for word, total in zip(words, totals, strict=True)]
    return _work("letters", totals[-1], "capital and small letters are the same letter", extracted, steps)


def _gcd(match: re.Match[str]) -> Work:
    numbers = [int(n) for n in re.findall(r"\d+", match["numbers"])]
    divisors = [f"{n} has {' '.join(str(d) for d in range(1, n + 1) if n % d == 0)}" for n in numbers]
    steps = [f"{n} / {gcd(*numbers)} = {n // gcd(*numbers)}" for n in numbers]
    return _work("gcd", gcd(*numbers), "; ".join(divisors), [str(n) for n in numbers], steps)


def _lcm(match: re.Match[str]) -> Work:
    a, b = (int(n) for n in re.findall(r"\d+", match["numbers"]))
    steps = [f"{a} x {b} = {a * b}", f"{a * b} / {gcd(a, b)} = {lcm(a, b)}"]
    return _work("lcm", lcm(a, b), f"{a} and {b} have the greatest common divisor {gcd(a, b)}", [str(a), str(b)], steps)


def _calculation(match: re.Match[str]) -> Work:
    """Brackets first, innermost first, then the rest. Raises ValueError where a step is no whole number."""
    text, steps = match["expression"], list[str]()
    while inner := re.search(r"\(([^()]*[-+*/][^()]*)\)", text):
        inside = inner[1].strip()
        if not re.fullmatch(r"[- ]*\d+", inside):
            steps.append(f"{inside} = {_whole(inside)}")
        text = f"{text[: inner.start()]}{_whole(inside)}{text[inner.end() :]}".replace("--", "- -")
    answer = _whole(text)
    if not re.fullmatch(r"[- ]*\d+", text.strip()):
        steps.append(f"{text.strip()} = {answer}")
    numbers = re.findall(r"\d+", match["expression"])
    return _work("calculation", answer, "brackets first, then times and over, then the rest", numbers, steps)


def _whole(expression: str) -> int:
    value = evaluate(expression)
    if value is None or value.denominator != 1:
        raise ValueError(f"{expression} is no whole number")
    return int(value)


def _equation(match: re.Match[str]) -> Work:
    terms = re.findall(r"([-+]?) ?(?:(\d+)\*)?([a-z])|([-+]?) ?(\d+)(?![\d*])", match["left"])
    a = sum(int(f"{sign}{times or 1}") for sign, times, name, _, _ in terms if name)
    b = sum(int(f"{sign}{number}") for _, _, name, sign, number in terms if not name)
    c, name = int(match["right"]), next(term[2] for term in terms if term[2])
    low, high, guesses = 0, 64, list[str]()
    while low <= high:
        middle = (low + high) // 2
        value = a * middle + b
        below = (value < c) == (a > 0)
        verdict = "right" if value == c else "too low" if below else "too high"
        guesses.append(f"{name} = {middle} gives {value}, {verdict}")
        if value == c:
            break
        low, high = (middle + 1, high) if below else (low, middle - 1)
    steps = [f"{c} {'+' if b < 0 else '-'} {abs(b)} = {c - b}", f"{c - b} / {a} = {(c - b) // a}"]
    return _work("equation", (c - b) // a, f"{name} is a whole number", [match[0][2:]], steps, guesses)


def _work(
    family: str, answer: int, recalled: str, extracted: list[str], steps: list[str], guesses: list[str] | None = None
) -> Work:
    explanation = "the answer follows from the numbers in the question"
    found = {"Recall:": [recalled], "Extract:": extracted, "Step 1:": steps, "Explanation:": [explanation]}
    return Work(family, found | {"Guess 1:": guesses or [f"{answer} fits"]}, answer)


_FAMILIES = (
    (r"arithmetic problem: (?P<sum>-?\d+(?: [-+] -?\d+)*) =", _sum),
    (r"in total if you have (?P<animals>[^?\"]+)\?", _legs),
    (r"does the letter \"(?P<letter>.)\" appear in the text: \"(?P<text>[^\"]*)\"", _letters),
    (r"Divisor \(GCD\) of these numbers: (?P<numbers>\d+(?:, \d+)+)", _gcd),
    (r"Multiple \(LCM\) of these numbers: (?P<numbers>\d+, \d+)\b(?!,)", _lcm),
    (r"(?:multiplication:|Calculate) (?P<expression>[-(\d][-+*/()\d ]*[\d)])", _calculation),
    (r": (?P<left>[0-9*+ -]*\b[a-z]\b[0-9+ -]*) = (?P<right>-?\d+)", _equation),
)
"""How each family asks, and who reads it."""
