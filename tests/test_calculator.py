"""The calculator of GSM8K's annotations: golden cases, bounds, the written form, annotations made by rule."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies
from transformers import AutoModelForCausalLM

from rstar.calculator import annotate, calculate, completion, evaluate, filled_in, written
from rstar.config import EngineSection
from rstar.engines import hf
from rstar.engines.hf import HfPolicy
from rstar.engines.simulated import SimulatedPolicy
from rstar.engines.stop_and_continue import stop_and_continue
from rstar.tokens import load_tokenizer
from rstar.types import Generation, PromptText, SamplingParams


@pytest.mark.parametrize(
    ("text", "value"),
    [("<<48/2=", 24.0), ("<<1,000*3=", 3000), ("<<16-3-4=", 9), ("<<2*0.5=", 1.0), ("so <<1+1=2>>2, then <<.5*4=", 2)],
)
def test_golden_results(text: str, value: float) -> None:
    assert calculate(text) == value


@pytest.mark.parametrize(
    "text",
    ["<<50%*3=", "<<2x3=", "<<5/0=", "<<2+3=5>> so =", "no =", "<<3+4", "<<=", "<<9**9**9=", "<<2(3)=", "<<1.2.3="],
)
def test_no_result_where_there_is_nothing_to_calculate(text: str) -> None:
    assert calculate(text) is None and completion(text) is None


@pytest.mark.parametrize(
    ("text", "known", "expected"),
    [
        ("<<5-8=-", 0, "<<5-8=-3>>"),
        ("<<5-8=-", 5, "<<5-8=-3>>"),
        ("<<5-8=-9>> and", 6, None),
        ("x = <<2*3= $7", 3, "x = <<2*3=6>>"),
        ("<<1+1==3>><<2+2=5", 0, "<<1+1=2>>"),
        ("<<1/0=<<2+2=5", 0, "<<1/0=<<2+2=4>>"),
        ("a = b", 0, None),
        ("", 0, None),
    ],
)
def test_text_is_cut_at_the_first_new_sign_that_has_a_result(text: str, known: int, expected: str | None) -> None:
    assert filled_in(text, known) == expected


@pytest.mark.parametrize(
    ("expression", "shown"),
    [("48/2", "24"), ("0.1+0.2", "0.3"), ("1/3", "0.3333333333333333"), ("1/8", "0.125"), ("3-5", "-2"),
     ("1/40-1", "-0.975"), ("560//10", "56"), ("-(2+3)*4", "-20"), ("2*(3+4)-5/2", "11.5"), ("1,200.50*2", "2401"),
     ("7//2", "3")],
)  # fmt: skip
def test_results_are_exact_and_written_as_the_data_writes_them(expression: str, shown: str) -> None:
    value = evaluate(expression)
    assert value is not None and written(value) == shown
    assert completion(f"x <<{expression}=") == shown + ">>"


@settings(max_examples=300)
@given(strategies.text(alphabet="0123456789.+-*/() ,", max_size=40))
def test_agrees_with_python_wherever_both_have_a_value(text: str) -> None:
    """Python calculates in fractions too: its floats give 14.0 // 0.4 as 34.0, where 35 is exact."""
    value = evaluate(text)
    if value is None or "**" in text:
        return
    plain = text.replace(",", "").strip()
    try:
        compile(plain, "<expression>", "eval")
    except SyntaxError:  # leading zeros are numbers here and a mistake in Python
        return
    assert value == eval(re.sub(r"\d+\.?\d*|\.\d+", r"Fraction('\g<0>')", plain))


@pytest.mark.parametrize(
    "text", ["9" * 5000, "(" * 5000, "-" * 190 + "1", "*".join(["99999999"] * 22), "1/" * 100 + "3"]
)
def test_hostile_expressions_cost_nothing(text: str) -> None:
    begun = time.process_time()  # not wall time: the machine may be busy with something else
    assert evaluate(text) is None
    assert time.process_time() - begun < 0.5


def test_plain_calculations_are_annotated_and_everything_else_is_left_alone() -> None:
    assert annotate("He has 48 / 2 = 24 clips.") == "He has 48 / 2 = <<48/2=24>>24 clips."
    assert annotate("It costs 1,000*3 = $3,000.") == "It costs 1,000*3 = $<<1000*3=3000>>3,000."
    assert annotate("now $1080 - $162 = $918") == "now $1080 - $162 = $<<1080-162=918>>918"
    assert annotate("5+(2*3)=11, 2 + 2 = 5") == "5+(2*3)=<<5+(2*3)=11>>11, 2 + 2 = 5"
    for text in ("x = 5", "48/2 = <<48/2=24>>24", "3 x 4 = 12", "1/3 = 0.33", "#### 72"):
        assert annotate(text) == text


def test_value_is_a_fraction() -> None:
    assert evaluate("1/3") == Fraction(1, 3)


# -- while a model writes ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> HfPolicy:
    return HfPolicy(str(tiny_model), EngineSection(dtype="float32", device="cpu", max_batch=4))


def written_by(
    policy: HfPolicy, monkeypatch: pytest.MonkeyPatch, text: str, params: SamplingParams
) -> list[Generation]:
    """Samples of a model that wants to write `text` first; each sample its tokens in turn, then its own likeliest."""
    wanted = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
    drawn: dict[int, int] = {}
    sample_tokens = hf.sample_tokens

    def scripted(logits: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, logprobs = sample_tokens(logits, *rest)
        turn = drawn[0] = drawn.get(0, -1) + 1
        if turn < len(wanted):
            tokens = torch.full_like(tokens, wanted[turn])
        return tokens, logprobs

    monkeypatch.setattr(hf, "sample_tokens", scripted)
    return asyncio.run(policy.generate(PromptText(("How many clips? ",)), params))


def test_hf_result_is_forced_and_the_model_goes_on_from_it(policy: HfPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(n=2, temperature=0, max_tokens=40, calculator=True)
    first, second = written_by(policy, monkeypatch, "half: <<48/2=", params)
    assert first.text.startswith("half: <<48/2=24>>") and first.text == second.text
    reference = AutoModelForCausalLM.from_pretrained(policy.model_path).eval()
    encode = policy.tokenizer
    pieces = ("How many clips? ", "half: <<48/2=", "24>>")
    ids = [policy.encoder.encode(pieces[:1]), *(encode(p, add_special_tokens=False)["input_ids"] for p in pieces[1:])]
    known = [token for piece in ids for token in piece]
    goes_on = reference.generate(torch.tensor([known]), max_new_tokens=40 - len(known) + len(ids[0]), do_sample=False)
    text = encode.decode(goes_on[0, len(ids[0]) :], skip_special_tokens=False)
    assert first.text == text.removesuffix(encode.eos_token) and first.tokens <= 40


@pytest.mark.parametrize("text", ["half: <<48/0=", "half: 48/2=", "<<1+1>> so x="])
def test_hf_samples_normally_where_there_is_no_result(
    policy: HfPolicy, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    on = SamplingParams(temperature=0, max_tokens=30, calculator=True)
    with monkeypatch.context() as patch:
        (with_calculator,) = written_by(policy, patch, text, on)
    with monkeypatch.context() as patch:
        (without,) = written_by(policy, patch, text, replace(on, calculator=False))
    assert with_calculator.text == without.text


def test_hf_forced_result_never_exceeds_the_token_limit(policy: HfPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = len(policy.tokenizer("a <<99999*99999=", add_special_tokens=False)["input_ids"]) + 2
    (cut,) = written_by(
        policy, monkeypatch, "a <<99999*99999=", SamplingParams(temperature=0, max_tokens=limit, calculator=True)
    )
    assert cut.cut_off and cut.tokens == limit


def test_engines_that_stop_and_continue_write_the_same() -> None:
    says = {"q\n": "two <<1+1=7>> never", "=2>>": ", a slip <<1/0=0>>0", "1/0=": "0>>0 and x=1", "and x=": "1 #### 2"}

    def script(prompt: str, seed: int, index: int) -> str:
        return next(text for end, text in says.items() if prompt.endswith(end))

    engine = SimulatedPolicy(script, count_tokens=len)
    params = SamplingParams(n=3, max_tokens=200, calculator=True)
    found = asyncio.run(stop_and_continue(engine.generate, len, PromptText(("q\n",)), params))
    assert [g.text for g in found] == ["two <<1+1=2>>, a slip <<1/0=0>>0 and x=1 #### 2"] * 3
    assert all(g.tokens == len(g.text) and not g.cut_off and g.stop is None for g in found)
    (short,) = asyncio.run(
        stop_and_continue(engine.generate, len, PromptText(("q\n",)), replace(params, n=1, max_tokens=20))
    )
    assert short.cut_off and short.tokens <= 20


WISHES = [  # (what a model wants to write, what it writes with the calculator)
    ("a <<5-8=-9>>, b", "a <<5-8=-3>>, b"),
    ("a <<5-8=-3>>-3 and <<2*3=$7>>6", "a <<5-8=-3>>-3 and <<2*3=6>>6"),
    ("<<5 - 8 = -9>>, <<1-3 = 4>>", "<<5 - 8 =-3>>, <<1-3 =-2>>"),
    ("<<2*3==6>> x", "<<2*3=6>> x"),
    ("x=-5, y == 2, <<5/0=-1>>, <<7=-7>>", "x=-5, y == 2, <<5/0=-1>>, <<7=7>>"),
    ("<<2+3=5>>=- <<1/4-1=-1>>", "<<2+3=5>>=- <<1/4-1=-0.75>>"),
    ("<<5-8=-\nno more", "<<5-8=-3>>"),
    ("so <<1+1=2\nno>>\nmore <<2+2=5>>", "so <<1+1=2>>\n"),
]


def goes_on(wish: str, written: str) -> str:
    """What a model with this wish writes after `written`, whose last annotation may be another one than it wished."""
    rest = written.rpartition(">>")[2]
    left = ">>".join(wish.split(">>")[written.count(">>") :])
    return left.removeprefix(rest) if left.startswith(rest) else ""


@pytest.fixture(scope="module")
def joined(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> HfPolicy:
    """A policy whose tokens join "=" with what stands beside it."""
    tokenizer, model = load_tokenizer(tiny_model), AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer.add_tokens(["=-", "=$", " = ", "==", " = -", "=7", "8=-", "<<7=-", ">>=-", ">>,", "=2\n"])
    model.resize_token_embeddings(len(tokenizer))
    folder = tmp_path_factory.mktemp("joined")
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return HfPolicy(str(folder), EngineSection(dtype="float32", device="cpu"))


@pytest.mark.parametrize(("wish", "expected"), WISHES)
def test_engines_write_the_same_text_wherever_the_tokens_of_a_model_end(
    joined: HfPolicy, monkeypatch: pytest.MonkeyPatch, wish: str, expected: str
) -> None:
    params = SamplingParams(max_tokens=200, calculator=True, stop=("\n",))

    def append(samples: Sequence[Any], logits: torch.Tensor) -> None:
        for sample in samples:
            wanted = joined.encoder.within(goes_on(wish, sample.stream.text))
            sample.ids.append(wanted[0] if wanted else joined.tokenizer.eos_token_id)

    def script(prompt: str, seed: int, index: int) -> str:
        return goes_on(wish, prompt.removeprefix("Q: "))

    async def deaf(prompt: PromptText, params: SamplingParams) -> list[Generation]:
        """A server that stops at none of our strings, and cuts at one of the request's own."""
        return await simulated.generate(prompt, replace(params, stop=("\n",)))

    monkeypatch.setattr(joined, "_append_tokens", append)
    simulated = SimulatedPolicy(script)
    found = [
        asyncio.run(samples)
        for samples in (
            joined.generate(PromptText(("Q: ",)), params),
            simulated.generate(PromptText(("Q: ",)), params),
            stop_and_continue(deaf, len, PromptText(("Q: ",)), params),
        )
    ]
    stop = "\n" if expected.endswith("\n") else None
    assert [(one.text, one.stop, one.cut_off) for (one,) in found] == [(expected, stop, False)] * 3


def test_hf_spells_a_result_as_its_training_rows_do(joined: HfPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model wrote the token "=", but the rows have "=-"."""
    wanted = joined.tokenizer.convert_tokens_to_ids(["<", "<", "5", "-", "8", "="])
    known: list[int] = []

    def append(samples: Sequence[Any], logits: torch.Tensor) -> None:
        (sample,) = samples
        known[:] = sample.ids[len(sample.prompt.ids) :]
        sample.ids.append(wanted[len(known)] if len(known) < len(wanted) else joined.tokenizer.eos_token_id)

    monkeypatch.setattr(joined, "_append_tokens", append)
    (one,) = asyncio.run(joined.generate(PromptText(("Q: ",)), SamplingParams(max_tokens=50, calculator=True)))
    assert one.text == "<<5-8=-3>>"
    assert joined.tokenizer.convert_ids_to_tokens(known)[5] == "=-"


@pytest.mark.vllm
def test_vllm_samples_with_the_calculator(tiny_model: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: bash tests/run.sh --vllm")
    from rstar.engines.vllm import VllmPolicy

    async def draw() -> list[Generation]:
        engine = VllmPolicy(tiny_model, EngineSection(kind="vllm", dtype="float32", max_context=256, cache_mib=64))
        try:
            params = SamplingParams(n=4, max_tokens=60, calculator=True)
            return await engine.generate(PromptText(("x = <<", "48/2")), params)
        finally:
            await engine.close()

    found = asyncio.run(draw())
    assert len(found) == 4 and all(0 < g.tokens <= 61 for g in found)
    for text in (("x = <<48/2" + g.text) for g in found):
        for place in (i + 1 for i, c in enumerate(text) if c == "=" and i > 3):
            result = completion(text[:place]) or ""
            assert text[place:].startswith(result[: len(text) - place])
