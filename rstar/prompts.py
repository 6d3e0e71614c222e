"""The step format: render(path) and parse(text) -> Step, inverse of each other.

The model writes steps; we write `<code>`, the printed output, and `<answer>`.
Text is cut into segments at step borders; a segment is tokenised by itself everywhere (see PromptText).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rstar.grading.extract import boxes, last_boxed, last_line_answer
from rstar.types import PromptText, Step, StepKind

END_OF_STEP = "<end_of_step>"
END_OF_CODE = "<end_of_code>"
END_OF_ANSWER = "<end_of_answer>"
DELIMITERS = (
    "<code>", END_OF_STEP, END_OF_CODE, "<output>", "<end_of_output>", "<answer>", END_OF_ANSWER,
)  # fmt: skip
OPENING = "<code>\n"
STEP_TOKENS = (
    OPENING, END_OF_STEP + "\n", END_OF_CODE + "\n", "<output>", "<end_of_output>\n<answer>", END_OF_ANSWER,
)  # fmt: skip
"""What the delimiters look like in rendered text; each becomes one token where model.step_tokens is on."""
SHOWN_OUTPUT_CHARS = 1024  # the official code shows this much of what a program printed

_IMITATION = re.compile(
    r"<[\s/]{0,3}(?:end_of_(?:step|code|answer|output)|(?:code|output|answer)[\s/]{0,3}>)|<\|\w+\|>", re.I
)
"""Our delimiters, misspelt and unfinished ones too, and the control tokens of chat models."""
_JUNK = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ue000-\uf8ff\ufffd-\uffff]")  # control bytes, halves of characters
_TAG = re.compile(r"</?\w+>|<(?:/|e|en|end\w*)?$")
_CLOSING = r"""(?:[]$*)}"'`”’»」』）】]|\\[]})\\]|\\right[].)}]|\\end\{\w+\*?\})"""
_UNIT = (
    r"(?:\\?%|°|\\?[$]|[€£¥]|\\degree|\^(?:\\circ|\{\\circ\}|\\degree)"
    r"|(?:\\(?:text|textrm|mathrm|mbox)\{[^{}]*\}|(?:km/h|mph|[kcm]?m|[km]?g|m?[lL]|ft|min|[hs]|st|nd|rd|th)(?![A-Za-z0-9_]))"
    r"(?:\^[23]|\^\{[23]\}|[²³])?)"
)
_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # letters of scripts that write without spaces
_AFTER_BOX = re.compile(
    rf"(?:{_CLOSING}|{_UNIT}|\\[,;:! ]|~|\\q?quad(?![A-Za-z])|[.!?,;:…。！？，；：、])*+"
    rf"(?:(?=[\s{_UNSPACED}—])|$|(?<=[,;$])(?=\\boxed))"
)
_GLUED = re.compile(r"(?:(?<=[A-Za-z]{2})|(?<=[0-9]))[.!?,;:]+(?=[A-Za-z_])|(?<!\w)[A-Za-z]\w*_(?![\w{\\])")
_SENTENCE_END = re.compile(rf"(?:(?<!\.[A-Za-z])(?<![.!?])[.!?]++{_CLOSING}*+(?=\s|$)|[。！？]|\n)(?:{_CLOSING}|\s)*+")
_GOES_ON = re.compile(r"\s*(?:[-+/=^<>|&]|\*(?!\*)|\\(?:cdot|times|div|pm|pi|sqrt|d?frac)\b)")
_BRACE = re.compile(r"[{}]")
_STOP_KIND = {END_OF_STEP: StepKind.STEP, END_OF_CODE: StepKind.CODE, END_OF_ANSWER: StepKind.ANSWER}


@dataclass(frozen=True)
class Malformed:
    """Text that is no step, and why in a few words."""

    reason: str


def answer_fault(text: str) -> str:
    r"""Why an answer step is malformed for what stands around its boxed answer; empty where nothing is wrong.

    The box holds the whole answer. Directly after it stand only what closes mathematics, markup, quotes or brackets, a
    unit (`%`, `^\circ`, `\text{ cm}`, `cm`, `th`) and punctuation; then white space or the end (or a letter of a script
    without spaces, a dash, after a comma another box). Malformed are therefore `\boxed{5}.of_the`, `\boxed{5}words`,
    `\boxed{5},000`, `\boxed{5}.5`, `\boxed{5}\pi` and `\boxed{5}+3`. After the last box the same goes for words glued
    by punctuation (`clips.of`) or with a loose underscore (`the_`), tags (`</s>`, `<end`), a brace without its partner
    and a box that is not closed; anywhere in the step for code fences.

    Words after a space (`\boxed{5} clips in all.`) and further sentences are no fault, see `clean_answer`. Other texts,
    such as solutions in words, have no fault of this kind.
    """
    body = text.removesuffix(END_OF_ANSWER).rstrip()
    found = boxes(body)
    if not found or not text.endswith(END_OF_ANSWER):
        return ""
    start, end = found[-1]
    if "```" in body or _JUNK.search(body) or _IMITATION.search(body) or _TAG.search(body, end):
        return "junk beside the answer"
    if not all(_AFTER_BOX.match(body, close + 1) for _, close in found) or _GLUED.search(body, end + 1):
        return "text glued to the answer"
    if "\\boxed" in body[end:] or _unpaired(body[:start].count("{") - body[:start].count("}"), body[end + 1 :]):
        return "a brace without its partner"
    return ""


def _unpaired(opened: int, tail: str) -> bool:
    """Whether `tail` closes more braces than the `opened` ones before it, or leaves one of its own open."""
    depth = 0
    for brace in _BRACE.findall(re.sub(r"\\[{}]", "", tail)):
        depth += 1 if brace == "{" else -1
        if depth < -max(0, opened):
            return True
    return depth > 0


def clean_answer(text: str) -> bool:
    r"""Whether an answer step is fit to be learnt: no fault, one box, and nothing after the sentence that holds it.

    The sentence may have gone on after the answer in words or units (`\boxed{72} clips altogether.`), but not in
    mathematics or names of variables (`\boxed{5} + 3`, `\boxed{5} total_cost`). Sentences before the answer's do not
    matter. Other texts, such as solutions in words, are clean.
    """
    body = text.removesuffix(END_OF_ANSWER).rstrip()
    found = boxes(body)
    if not found or not text.endswith(END_OF_ANSWER):
        return True
    if len(found) > 1 or answer_fault(text):
        return False
    tail = body[found[0][1] + 1 :]
    end, attached = _SENTENCE_END.search(tail), _AFTER_BOX.match(tail)
    if attached is None or _GOES_ON.match(tail, attached.end()) or re.search(r"\w_\w", tail):
        return False
    return end is None or end.end() == len(tail)


def stops(after: StepKind | None) -> tuple[str, ...]:
    """Stop strings for the step that follows a step of kind `after` (None: the first step).

    Delimiters that would be out of place here end the text as well: it is malformed from there on, and whatever a weak
    model went on to write would be paid for. Four in all, which every server takes.
    """
    if after is StepKind.CODE:
        return (END_OF_ANSWER, END_OF_STEP, END_OF_CODE, "<output>")
    return (END_OF_STEP, END_OF_CODE, END_OF_ANSWER, "<output>")


def parse(text: str, *, after: StepKind | None = None) -> Step | Malformed:
    """Read one step as the model wrote it, closing delimiter included.

    `after` is the kind of the step before it (None for the first). Anything that is cut off, empty, out of order,
    unreadable or imitates our delimiters is Malformed, and an answer step with a fault too (`answer_fault`); only an
    answer step can carry an answer, and only from its own text.
    """
    delimiter = next((d for d in _STOP_KIND if text.endswith(d)), None)
    if delimiter is None:
        return Malformed("imitates a delimiter" if text.endswith("<output>") else "cut off")
    kind = _STOP_KIND[delimiter]
    body = text[: -len(delimiter)]
    if _IMITATION.search(body) or any(d in body for d in DELIMITERS):
        return Malformed("imitates a delimiter")
    if _JUNK.search(body):
        return Malformed("unreadable characters")
    if not body.strip():
        return Malformed("empty")
    if (after is StepKind.CODE) != (kind is StepKind.ANSWER):
        return Malformed("answer before the code's end" if kind is StepKind.ANSWER else "code after the code's end")
    if kind is StepKind.ANSWER:
        answer, fault = last_boxed(body), answer_fault(text)
        if not answer or fault:
            return Malformed(fault or "no \\boxed{} answer")
        return Step(kind, text, answer=answer)
    return Step(kind, text, code=body)


def parse_solution(text: str) -> Step | Malformed:
    """Read a whole solution in words: its last line names the answer, as in GSM8K's data ("#### 72", "A: 72")."""
    answer = last_line_answer(text)
    return Malformed("no answer in the last line") if answer is None else Step(StepKind.ANSWER, text, answer=answer)


def kind_of(text: str) -> StepKind:
    """Kind of a well-formed step, by its closing delimiter; a solution in words, which has none, is an answer."""
    return next((kind for d, kind in _STOP_KIND.items() if text.endswith(d)), StepKind.ANSWER)


def segments(text: str, printed: str) -> tuple[tuple[str, bool], ...]:
    """Segments that a step adds to the prompt: (text, whether the model wrote it).

    `printed` is all that the program has printed up to and including this step; only the last code step shows it.
    """
    kind = kind_of(text)
    own = (text + "\n" if kind is not StepKind.ANSWER else text, True)
    if kind is not StepKind.CODE:
        return (own,)
    shown = printed.strip("\n")
    if len(shown) > SHOWN_OUTPUT_CHARS:
        shown = shown[:SHOWN_OUTPUT_CHARS] + "..."
    return (own, (f"<output>{shown}<end_of_output>\n<answer>", False))


def render(steps: Sequence[tuple[str, str]]) -> tuple[tuple[str, bool], ...]:
    """Segments of a whole path of (step text, what that step printed), after the opening."""
    rendered: list[tuple[str, bool]] = []
    printed = ""
    for text, stdout in steps:
        printed += stdout
        rendered.extend(segments(text, printed))
    return tuple(rendered)


def imitates(printed: str) -> bool:
    """Whether printed output would read as one of our delimiters once shown."""
    return any(d in printed for d in DELIMITERS)


def step_prompt(wrapped_question: str, form: str = "steps") -> PromptText:
    """Prompt of the first step: the question as the model's template wraps it, then (form: steps) the opening tag."""
    return PromptText((wrapped_question, OPENING) if form == "steps" else (wrapped_question,))


YES, NO = "Yes", "No"
STOP_SYSTEM = "You check solutions of mathematical problems. Reply with a single word, Yes or No."
STOP_QUESTION = "{question}\n\nSolution so far:\n{solution}\n\nIs this the complete and correct solution? Yes or No?"
"""What the Stop model of a flow is asked (Flow-DPO); system message and user turn."""
_HERE = "\x00\x01"  # no question holds it


def split_stop_question(wrap: Callable[[str], str], question: str) -> tuple[str, str]:
    """The wrapped STOP_QUESTION cut where the partial solution stands: the texts before and after it."""
    asked = STOP_QUESTION.replace("{solution}", _HERE).replace("{question}", question)
    before, _, after = wrap(asked).rpartition(_HERE)
    return before, after


def stop_asked(borders: Sequence[str], solution: Sequence[str]) -> PromptText:
    """The Stop model's prompt about a partial solution (its rendered segments), between split_stop_question's texts."""
    return PromptText((borders[0], *solution, borders[1]))


SLM_TEMPLATE = "<|user|>:\n{question}\n<|assistant|>: Let's think step by step and solve the problem with code.\n"
"""The official prompt of rounds 2-4 (rStar-Math code, `few_shots`), for checkpoints without a chat template."""
