"""Short programs that solve a problem, made from what its text brings along, for the warm-up of small models.

    worked_solution(problem) -> Worked(steps=((thought, code), ...), printed) or None

Word problems follow the calculations of their own solution: GSM8K's annotations `<<48/2=24>>` and plain `48 / 2 = 24`.
A line becomes a step, a result a variable named after what the line calls it; a number that equals an earlier result,
and is none of the question's, is used by that name. Generated families have templates. Every program is run here, by an
evaluator of arithmetic (no exec), and is kept only if it prints exactly the answer.

    partial_results(problem) -> what half a solution ends with: generated problems whose answer it is are not used
"""

from __future__ import annotations

import ast
import keyword
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import permutations

from rstar.calculator import annotate, evaluate
from rstar.types import Problem

Number = int | float
Step = tuple[str, str]

MAX_STEPS = 12
_THOUGHT_WORDS = 10
_NAME_WORDS = 3

_NUMBER = r"(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_ANNOTATION = re.compile(r"<<([^<>=]*)=([^<>]*)>>")
_EQUALS = re.compile(rf"=\s*({_NUMBER})(?!\s*[-+*(]|\s*/\s*[0-9(]|\.?[0-9])")
_EXPRESSION = re.compile(rf"[-(\s]*{_NUMBER}%?[)\s]*(?:[-+*/][(\s]*{_NUMBER}%?[)\s]*)+$")
_UNIT = re.compile(r"/?(?<![0-9.])\b[A-Za-z][A-Za-z'-]*(?:/[A-Za-z]+)*")
_SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-", "–": "-", "•": " "} | dict.fromkeys("$€£,"))
_EMPTY_WORDS = frozenset({
    "a", "an", "the", "of", "in", "is", "are", "was", "were", "to", "so", "he", "she", "it", "they", "has", "have",
    "had", "that", "this", "there", "then", "for", "and", "on", "at", "because", "his", "her", "their", "since", "if",
    "we", "will", "would", "each", "total", "be", "by", "with", "means", "therefore", "per", "x", "s",
})  # fmt: skip


@dataclass(frozen=True)
class Worked:
    """A program in steps and what it prints."""

    steps: tuple[Step, ...]  # (thought, code); the last assigned name holds the answer
    printed: str

    @property
    def result(self) -> str:
        """The name that is printed."""
        return self.steps[-1][1].rpartition("\n")[2].partition(" = ")[0]


def worked_solution(problem: Problem) -> Worked | None:
    """Steps that compute the problem's answer; None if its text gives none that do."""
    template = _TEMPLATES.get(problem.source)
    steps = template(problem) if template is not None else calculations(problem)
    if not steps or len(steps) > MAX_STEPS:
        return None
    try:
        values = run("\n".join(code for _, code in steps))
        printed = str(values[Worked(tuple(steps), "").result])
        right = Fraction(printed) == Fraction(problem.answer)
    except (ValueError, ArithmeticError, KeyError, SyntaxError):
        return None
    return Worked(tuple(steps), printed) if right else None


def in_words(problem: Problem) -> str | None:
    """The worked solution as text: a line per calculation with its numbers and result, the answer in the last line.

    "add the next number: 19 - 4 = 15" ... "#### 15"; None where there is no worked solution.
    """
    worked = worked_solution(problem)
    if worked is None:
        return None
    known: dict[str, str] = {}
    lines = []
    for thought, code in worked.steps:
        for line in code.split("\n"):
            name, equals, expression = line.partition(" = ")
            if equals:
                shown = re.sub(r"\b[A-Za-z_]\w*\b(?!\.|\()", lambda m: known.get(m[0], m[0]), expression)
                known[name] = str(run(f"{name} = {shown}")[name]).removesuffix(".0")
                lines.append(f"{thought}: {shown} = {known[name]}")
    return "\n".join([*lines, f"#### {problem.answer}"])


def solution_text(problem: Problem, *, annotated: bool = False) -> str:
    """A reference solution in words, the answer in its last line ("#### 72"): the data's own, else the worked one.

    `annotated`: its plain calculations for the calculator; else it has no annotations. Where there is no solution, the
    answer stands alone (of Cobbe et al. 2021 the comparison without intermediate steps).
    """
    text = problem.solution or in_words(problem) or ""
    text = annotate(text).strip() if annotated else re.sub(r"<<[^<>]*>>", "", text)
    named = ("####", "The answer is:")  # GSM8K's last line, MetaMath's; both may be there
    kept = [line for line in text.splitlines() if line.strip() and not line.startswith(named)]
    return "\n".join([*kept, f"#### {problem.answer}"])


def run(code: str) -> dict[str, Number]:
    """The variables after a program of assignments of arithmetic, with Python's own int and float results.

    Raises ValueError for anything else.
    """
    values: dict[str, Number] = {}
    for statement in ast.parse(code).body:
        if isinstance(statement, ast.Import) and [name.name for name in statement.names] == ["math"]:
            continue
        if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
            raise ValueError(ast.unparse(statement))
        values[statement.targets[0].id] = _evaluate(statement.value, values)
    return values


_OPERATIONS: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
}


def _evaluate(node: ast.expr, values: Mapping[str, Number]) -> Number:
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.Name(id=name):
            return values[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, values)
        case ast.BinOp(left=left, op=operation, right=right) if type(operation) in _OPERATIONS:
            return _OPERATIONS[type(operation)](_evaluate(left, values), _evaluate(right, values))
        case ast.Call(func=ast.Attribute(value=ast.Name(id="math"), attr="gcd" | "lcm" as function), args=arguments):
            return int(getattr(math, function)(*(int(_evaluate(a, values)) for a in arguments)))
    raise ValueError(ast.unparse(node))


# Word problems: the calculations of a written solution


def calculations(problem: Problem) -> list[Step]:
    """Steps from the calculations of `problem.solution`; a line whose calculation does not come out is left out."""
    given = {Fraction(number) for number in re.findall(_NUMBER, problem.question.replace(",", ""))}
    names: dict[Fraction, str] = {}
    taken: list[str] = []
    steps: list[Step] = []
    for line in problem.solution.split("\n"):
        if line.startswith("####"):
            break
        codes: list[str] = []
        for expression, value, before, after in _line_calculations(line.translate(_SIGNS)):
            name = _name(before, after, taken)
            text = re.sub(_NUMBER, lambda m: _by_name(m.group(), names, given), _tidy(expression))
            codes.append(f"{name} = {text}")
            names[value] = name
            taken.append(name)
        if codes:
            steps.append((_thought(line), "\n".join(codes)))
    return steps


def _line_calculations(line: str) -> list[tuple[str, Fraction, str, str]]:
    """(expression, value, words before, words after) of each calculation of a line that comes out."""
    found: list[tuple[str, Fraction, str, str]] = []
    marks = list(_ANNOTATION.finditer(line))
    for mark in marks or _EQUALS.finditer(line):
        before, after = line[: mark.start()], line[mark.end() :]
        expression = mark[1] if marks else _trailing_expression(before)
        value = _value(mark[2] if marks else mark[1])
        if expression and value is not None and _value(expression) == value and re.search(r"[-+*/]", expression[1:]):
            found.append((expression, value, before, after.lstrip("0123456789.%")))
    return found


def _trailing_expression(text: str) -> str:
    """The arithmetic at the end of a text without its units: `125 students - 64 girls` is 125 - 64."""
    bare = _UNIT.sub(" ", re.sub(r"(?<=[0-9)])\s*x\s*(?=[0-9(])", " * ", text))
    match = _EXPRESSION.search(bare)
    return match.group().strip() if match else ""


def _tidy(expression: str) -> str:
    """One spacing, no leading zeros, no plus signs before a number, `20%` as `20 / 100`."""
    text = re.sub(rf"({_NUMBER})%", r"(\1 / 100)", expression.replace("x", "*"))
    text = re.sub(_NUMBER, lambda m: m.group().lstrip("0") if re.match(r"0[0-9]", m.group()) else m.group(), text)
    text = re.sub(r"(?<![0-9.])\.(?=[0-9])", "0.", text)
    text = re.sub(r"(^|[-+*/(])[\s+]*\+", r"\1", text.strip())
    return re.sub(r"\s*([-+*/])\s*", r" \1 ", text).strip()


def _value(text: str) -> Fraction | None:
    """Exact value of an arithmetic expression."""
    return evaluate(_tidy(text))


def _by_name(number: str, names: Mapping[Fraction, str], given: set[Fraction]) -> str:
    value = Fraction(number)
    return names[value] if value in names and value not in given else number


def _words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]+", _ANNOTATION.sub(" ", text))


def _name(before: str, after: str, taken: Sequence[str]) -> str:
    """A variable's name from the words after a result (`24 clips in May`), else from those before its calculation."""
    following = re.split(r"[.;:(=]|\d|\b(?:so|because|since|which|and|but|then)\b", after, maxsplit=1)[0]
    leading = re.split(r"[.;:=]", before.rpartition(">>")[2])[-1]
    for words in (_words(following)[:5], _words(leading)[-5:]):
        kept = [word.lower() for word in words if word.lower() not in _EMPTY_WORDS][:_NAME_WORDS]
        name = "_".join(kept)
        if name and not keyword.iskeyword(name) and name not in ("math", "print"):
            again = next(n for n in range(1, len(taken) + 2) if (f"{name}_{n}" if n > 1 else name) not in taken)
            return f"{name}_{again}" if again > 1 else name
    return f"result_{len(taken) + 1}"


def _thought(line: str) -> str:
    """What a line works out, without its numbers: they are the program's business."""
    text = _ANNOTATION.sub(" ", line)
    words = [word for word in re.findall(r"[A-Za-z][A-Za-z']*", text) if word not in ("x", "s")]
    words = words[:_THOUGHT_WORDS]
    while len(words) > 1 and words[-1].lower() in _EMPTY_WORDS:
        words.pop()
    return " ".join(words) if words else "calculate"


# Generated families


def _expression_of(problem: Problem) -> str:
    found = re.findall(r"[-(0-9][-+*/(). 0-9]*[0-9)]", problem.question)
    return max(found, key=len).strip() if found else ""


def _chain(problem: Problem) -> list[Step]:
    terms = re.findall(r"[-+]?\s*[0-9]+", _expression_of(problem))
    if len(terms) < 2:
        return []
    first = terms[0].strip()
    steps = [("combine the first two numbers", f"total = {first} {_apart(terms[1])}")]
    return steps + [(_next(term), f"total = total {_apart(term)}") for term in terms[2:]]


def _apart(term: str) -> str:
    return f"{term.strip()[0]} {term.strip()[1:].strip()}"


def _next(term: str) -> str:
    return "subtract the next number" if term.strip().startswith("-") else "add the next number"


def _product(problem: Problem) -> list[Step]:
    return [("multiply the numbers", f"product = {_expression_of(problem)}")]


def _arithmetic(problem: Problem) -> list[Step]:
    """One step for each pair of innermost brackets, then the rest."""
    text, steps = _expression_of(problem), list[Step]()
    while match := re.search(r"\(([^()]*)\)", text):
        inside = match[1].strip()
        if re.fullmatch(r"-?\s*\w+", inside):  # a single number in brackets
            text = f"{text[: match.start()]}\0{inside}\1{text[match.end() :]}"
            continue
        name = f"part_{len(steps) + 1}"
        steps.append(("work out the brackets", f"{name} = {_bracketed(inside)}"))
        text = f"{text[: match.start()]}{name}{text[match.end() :]}"
    return [*steps, ("calculate the expression" if not steps else "put it together", f"result = {_bracketed(text)}")]


def _bracketed(text: str) -> str:
    return " ".join(text.replace("\0", "(").replace("\1", ")").split())


def _multiple(problem: Problem) -> list[Step]:
    numbers = re.findall(r"[0-9]+", problem.question.rpartition(":")[2])
    if len(numbers) != 2:
        return [("least common multiple of the numbers", f"import math\nmultiple = math.lcm({', '.join(numbers)})")]
    a, b = numbers
    divisor = ("greatest common divisor of the numbers", f"import math\ndivisor = math.gcd({a}, {b})")
    return [divisor, ("divide their product by it", f"multiple = {a} * {b} // divisor")]


def _divisor(problem: Problem) -> list[Step]:
    numbers = re.findall(r"[0-9]+", problem.question.rpartition(":")[2])
    return [("greatest common divisor of the numbers", f"import math\ndivisor = math.gcd({', '.join(numbers)})")]


def _equation(problem: Problem) -> list[Step]:
    """A linear equation: bring the constants to the right, divide by the factor."""
    match = re.search(r"\b([a-z])\b.*?:\s*(.+?)\s*=\s*(.+?)\s*$", problem.question)
    if match is None:
        return []
    name, left, right = match.groups()
    try:
        tree = ast.parse(left, mode="eval").body
        at_zero, at_one = _evaluate(tree, {name: 0}), _evaluate(tree, {name: 1})
    except (SyntaxError, ValueError, KeyError, ArithmeticError):
        return []
    factor = at_one - at_zero
    if not factor or not re.fullmatch(r"-?[0-9]+", right):
        return []
    constants = [("constants on the right side", f"right = {right} - {_signed(at_zero)}")] if at_zero else []
    start = "right" if at_zero else right
    return [
        ("factor of the unknown", f"factor = {factor}"),
        *constants,
        ("divide by the factor", f"{name} = {start} // factor"),
    ]


def _signed(value: Number) -> str:
    return f"({value})" if value < 0 else str(value)


_TEMPLATES: dict[str, Callable[[Problem], list[Step]]] = {
    "chain_sum": _chain,
    "products": _product,
    "basic_arithmetic": _arithmetic,
    "lcm": _multiple,
    "gcd": _divisor,
    "simple_equations": _equation,
}


# Partial results of generated families: what half a solution ends with, and the numbers that the question shows


def partial_results(problem: Problem) -> set[Fraction]:
    """Values that a generated problem shows or that a solution reaches on its way, before the end.

    Where the answer is among them, a solution that stops early, or copies a number, is right by luck. Families that
    the table below does not name have none that are known.
    """
    find = _PARTIAL_RESULTS.get(problem.source)
    return set() if find is None else _shown(problem) | find(problem)


def _shown(problem: Problem) -> set[Fraction]:
    return {Fraction(number) for number in re.findall(_NUMBER, problem.question.replace(",", ""))}


def _parts(problem: Problem) -> set[Fraction]:
    """Sums, products and mixed arithmetic: the parts of the expression."""
    return _parts_of(_expression_of(problem))


def _parts_of(expression: str) -> set[Fraction]:
    """The values of an expression's proper parts: its operands and brackets, and its beginnings without brackets.

    A beginning has two values, with the precedence of operators and read from left to right: `2 + 3 * 4 - 1` begins
    with 2, 5, 14 and 20.
    """
    try:
        whole = ast.parse(expression.strip(), mode="eval").body
    except SyntaxError:
        return set()
    inner = [ast.unparse(node) for node in ast.walk(whole) if isinstance(node, ast.expr) and node is not whole]
    terms = re.findall(rf"(?:^|[-+*/]+)[-+]*{_NUMBER}", re.sub(r"[\s()]", "", expression))
    straight = ["".join(terms[:k]) for k in range(1, len(terms))]
    in_order = ["(" * k + ")".join(terms[: k + 1]) for k in range(1, len(terms) - 1)]
    return {value for text in [*inner, *straight, *in_order] if (value := evaluate(text)) is not None}


def _multiples(problem: Problem) -> set[Fraction]:
    """Least common multiples: those of the first numbers, and the product, which still has to be divided."""
    numbers = [int(number) for number in re.findall(r"[0-9]+", problem.question.rpartition(":")[2])]
    return {Fraction(math.prod(numbers)), *(Fraction(math.lcm(*numbers[:k])) for k in range(1, len(numbers)))}


def _divisors(problem: Problem) -> set[Fraction]:
    """Greatest common divisors: those of the first numbers."""
    numbers = [int(number) for number in re.findall(r"[0-9]+", problem.question.rpartition(":")[2])]
    return {Fraction(math.gcd(*numbers[:k])) for k in range(1, len(numbers))}


def _sides(problem: Problem) -> set[Fraction]:
    """Linear equations: the factor, and the right side with the constants."""
    steps = _equation(problem)
    return {Fraction(value) for value in list(run("\n".join(code for _, code in steps)).values())[:-1]}


def _story(problem: Problem) -> set[Fraction]:
    """Word problems: the results of the solution's calculations and of their parts, and what any two numbers of the
    question give by one operation (where the solution has more than one)."""
    found = [
        (_tidy(expression), value)
        for line in problem.solution.split("\n")
        for expression, value, _, _ in _line_calculations(line.translate(_SIGNS))
    ]
    values = [value for _, value in found]
    if values and values[-1] == Fraction(problem.answer):
        values.pop()
    parts = {part for expression, _ in found for part in _parts_of(expression)}
    pairs = permutations(_shown(problem), 2) if len(found) > 1 else ()
    return parts.union(values, *({a + b, a - b, a * b, a / (b or 1)} for a, b in pairs))


_PARTIAL_RESULTS: dict[str, Callable[[Problem], set[Fraction]]] = {
    "chain_sum": _parts,
    "products": _parts,
    "basic_arithmetic": _parts,
    "lcm": _multiples,
    "gcd": _divisors,
    "simple_equations": _sides,
    "gsm_symbolic": _story,
}
