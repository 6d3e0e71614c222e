r"""Which answer steps are malformed, which are well-formed, and which of these are fit to be learnt (rstar.prompts)."""

from __future__ import annotations

import time

import pytest

from rstar.prompts import Malformed, clean_answer, last_boxed, parse
from rstar.types import Step, StepKind

CLEAN = (
    r"The answer is $\boxed{72}$ clips.",
    r"Natalia sold \boxed{72} clips altogether in April and May",
    r"She sold half of 48 in May. So she sold 72. The answer is \boxed{72}.",
    r"So \boxed{72}!",
    r"\boxed{72}",
    r"\boxed{72} ",
    r"\boxed{\frac{1}{2}}.",
    r"\boxed{\{1, 2\}}.",
    r"\boxed{(1, 2)}...",
    r'"The answer is \boxed{5}."',
    r"'\boxed{A}'",
    r"(the answer is \boxed{5}.)",
    r"[\boxed{5}]",
    r"\[\boxed{5}\]",
    r"\(x = \boxed{5}\).",
    r"$$\boxed{5}$$",
    r"$x = \boxed{5}.$",
    r"**Answer: $\boxed{5}$**.",
    r"**\boxed{5}** clips",
    r"{\bf \boxed{5}}.",
    r"\text{So } {\boxed{5}}",
    r"\begin{align*} x &= \boxed{5} \end{align*}",
    "\\boxed{5}\\\\\n\\end{align*}",
    r"\boxed{5}cm",
    r"\boxed{5}cm^2.",
    r"\boxed{5}km/h",
    r"\boxed{12}th.",
    r"\boxed{5}\%",
    r"\boxed{5}%.",
    r"\boxed{5}€",
    r"$\boxed{5}^\circ$.",
    r"\boxed{5}\text{ cm}^2",
    r"\boxed{5}\,\text{dollars}.",
    r"at \boxed{7} p.m. on Monday.",
    r"\boxed{5}, which is the total.",
    r"\boxed{5}—the total.",
    "答案是\\boxed{72}个夹子。",
)
NOT_CLEAN = (  # read and graded as they stand, by the last box
    r"The answer is \boxed{5}. Natalia sold 5 clips.",
    "The answer is \\boxed{5}.\n\nThe end",
    r"\boxed{5}. of the answer to the",
    r"$\boxed{3}$ or $\boxed{5}$",
    r"$\boxed{3},\boxed{5}$",
    r"\boxed{\boxed{5}}",
    r"\boxed{5} + 3",
    r"$\boxed{5} \cdot 2$",
    r"\boxed{5} = 2 + 3",
    r"\boxed{5} total_cost",
)
MALFORMED = (
    r"\boxed{5}.of_the_answer_to_",
    r"\boxed{-6}.of_the",
    r"\boxed{5}words",
    r"\boxed{5}cmof",
    r"\boxed{5}_the",
    r"\boxed{5}.The answer is 5.",
    r"\boxed{5}!x",
    r"\boxed{5}.)x",
    r"\boxed{5} clips.of the",
    r"\boxed{5} of_the_answer_to_",
    "\\boxed{5}\u200bword",
    r"\boxed{5},000",  # from here on the number or the mathematics goes on outside of the box
    r"\boxed{5}.5",
    r"\boxed{5}6",
    r"\boxed{5}+3",
    r"\boxed{5}=5",
    r"\boxed{5}/7",
    r"\boxed{5}\pi",
    r"\boxed{5}$x$",
    r"\boxed{5}}",
    r"\boxed{5}}.",
    r"\boxed{5} {",
    r"\boxed{5}{6}",
    r"\boxed{5}. \boxed{",
    r"\boxed{5}. \boxed",
    r"\boxed{5}\boxed{5}",
    r"\boxed{5}.\boxed{5}",
    r"\boxed{5}</s>",
    r"\boxed{5} </answer>",
    r"\boxed{5}. <end",
    r"\boxed{5}. <",
    r"\boxed{5}. <end_of_answer",
    r"\boxed{5}. < end_of_answer>",
    r"<|im_start|> \boxed{5}",
    r"\boxed{5} <|im_end|>",
    r"<end_of_answer> \boxed{5}",
    r"\boxed{5}<end_of_answer>",
    "```\n\\boxed{5}\n```",
    r"\boxed{5} ```python",
    "\\boxed{5}\ufffd",
    "caf\ufffd \\boxed{5}",
    "\\boxed{5} \x00",
    r"The answer is 5.",
    r"\boxed{}",
)


def read(text: str) -> Step | Malformed:
    return parse(text + "<end_of_answer>", after=StepKind.CODE)


@pytest.mark.parametrize("text", CLEAN)
@pytest.mark.parametrize("end", ["", "\n"])
def test_answers_in_one_sentence_are_clean(text: str, end: str) -> None:
    found = read(text + end)
    assert isinstance(found, Step) and found.answer == last_boxed(text)
    assert clean_answer(found.text)


@pytest.mark.parametrize("text", NOT_CLEAN)
@pytest.mark.parametrize("end", ["", "\n"])
def test_what_follows_the_answer_s_sentence_is_graded_but_not_clean(text: str, end: str) -> None:
    found = read(text + end)
    assert isinstance(found, Step) and found.answer == "5"
    assert not clean_answer(found.text)


@pytest.mark.parametrize("text", MALFORMED)
@pytest.mark.parametrize("end", ["", "\n"])
def test_tails_glued_to_the_answer_and_delimiters_out_of_place_are_malformed(text: str, end: str) -> None:
    assert isinstance(read(text + end), Malformed)
    assert "\\boxed{5}" not in text or not clean_answer(text + end + "<end_of_answer>")


@pytest.mark.parametrize(
    "junk", ["# </code>", "# <END_OF_STEP >", "# <end_of_step", "# <|im_end|>", "# \ufffd", "# \x00"]
)
def test_code_steps_with_broken_delimiters_or_characters_are_malformed(junk: str) -> None:
    assert isinstance(parse(f"x = 1 {junk}\ny = 2<end_of_step>"), Malformed)


@pytest.mark.parametrize("code", ["if x<code: pass", "a <b> c", "s = '</b>'", "x = [v for v in w if v < end]"])
def test_comparisons_and_markup_in_programs_are_no_delimiters(code: str) -> None:
    assert isinstance(parse(f"{code}\n<end_of_step>"), Step)


@pytest.mark.parametrize(
    "solution", ["2 + 3 = 5\n#### 5", "A: 5", "The total is 5.of_the", "\\boxed{5}words. And more."]
)
def test_solutions_in_words_have_no_answer_step_to_be_unclean(solution: str) -> None:
    assert clean_answer(solution)


@pytest.mark.parametrize(
    "tail",
    [
        "*" * 20_000 + "x", "\\text{" * 5000, "." * 20_000 + "x", " " + "." * 20_000 + "*" * 20_000 + "x",
        " < " + " " * 20_000 + "x", " " + "<" * 20_000, " " + ".*" * 10_000 + "x", " " + "a_" * 10_000 + "a",
        "{" * 20_000, "\\boxed{5}" * 3000, " " + "a." * 10_000, " .\\end{" + "a" * 20_000, " </" + "a" * 20_000,
        " " + "\n" * 20_000 + "x", " <|" * 5000, " " + "</" * 10_000, " " + "\n " * 10_000 + "x",
    ],
)  # fmt: skip
def test_reading_an_answer_takes_time_in_its_length(tail: str) -> None:
    began = time.process_time()
    read("\\boxed{5}" + tail)
    clean_answer("\\boxed{5}" + tail)
    assert time.process_time() - began < 0.5
