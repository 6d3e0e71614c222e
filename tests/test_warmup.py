"""Warm-up rows: programs that really ran, in the step format, apart from the held-out set; delimiters as tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rstar.config import ProblemsSection, SandboxSection, TrainSection, WarmupSection
from rstar.problems import load_problems
from rstar.prompts import STEP_TOKENS, parse
from rstar.types import SftRow, Step, UserError
from rstar.warmup import warmup_rows

PROBLEMS = ProblemsSection(
    families={
        "sums": {"family": "chain_sum", "count": 6, "heldout": 4, "settings": {"max_terms": 3, "max_digits": 2}},
        "words": {"family": "gsm_symbolic", "count": 4, "heldout": 4},
    }
)
SANDBOX = SandboxSection(processes=1)


def rows(section: WarmupSection) -> list[SftRow]:
    return warmup_rows(section, PROBLEMS, load_problems(PROBLEMS), SANDBOX, lambda question: question + "\n")


def test_fresh_problems_are_solved_in_the_step_format_and_shared_with_no_other_set() -> None:
    found = rows(WarmupSection(families={"sums": 5, "words": 5}))
    assert len(found) >= 8
    pool = load_problems(PROBLEMS)
    known = {problem.question for problem in (*pool.train, *pool.heldout)}
    for row in found:
        assert row.prompt.removesuffix("\n<code>\n") not in known
        assert "".join(text for text, _ in row.segments) == row.completion
        own = [text for text, model in row.segments if model]
        steps = [parse(text.removesuffix("\n")) for text in own[:-1]]
        assert all(isinstance(step, Step) and step.code for step in steps)
        printed = row.completion.partition("<output>")[2].partition("<end_of_output>")[0]
        assert f"\\boxed{{{printed.removesuffix('.0')}}}" in own[-1]


def test_pool_source_memorises_the_pool_itself_and_rows_are_capped() -> None:
    found = rows(WarmupSection(source="pool", rows=3))
    assert [row.problem_id for row in found] == [p.id for p in load_problems(PROBLEMS).train[:3]]


def test_gsm8k_annotations_become_code_steps(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    record = {
        "question": "Tom has 48 clips and buys half as many again. How many has he?",
        "answer": "He buys 48/2 = <<48/2=24>>24 clips.\nHe has 48+24 = <<48+24=72>>72 clips.\n#### 72",
    }
    path.write_text(json.dumps(record) + "\n")
    (row,) = rows(WarmupSection(source="gsm8k", path=str(path)))
    assert "48 / 2" in row.completion and "\\boxed{72}" in row.completion and row.completion.count("<end_of_step>") == 2


def test_warm_up_leaves_out_what_decontamination_takes_out_of_the_pool(tmp_path: Path) -> None:
    """A held-out problem in almost the same words: the base of all rounds must not have seen its solution."""
    question = "Tom has 48 clips and he buys half as many again in the shop around the corner. How many has he"
    answer = "He buys 48/2 = <<48/2=24>>24 clips.\nHe has 48+24 = <<48+24=72>>72 clips.\n#### 72"
    path = tmp_path / "train.jsonl"
    texts = [f"Anna reads and tells us this: {question} now?", "How many legs have 12 cats and 24 hens and 2 dogs?"]
    path.write_text("".join(json.dumps({"question": text, "answer": answer}) + "\n" for text in texts))
    kept_apart = tmp_path / "heldout.jsonl"
    kept_apart.write_text(json.dumps({"question": f"{question}?", "answer": "72"}) + "\n")
    problems = ProblemsSection(name="gsm8k", path=str(path), heldout_path=str(kept_apart))
    pool = load_problems(problems)
    assert len(pool.train) == 1 and pool.dropped == {"contaminated": 1}
    section = WarmupSection(source="gsm8k", path=str(path))
    found = warmup_rows(section, problems, pool, SANDBOX, lambda text: text + "\n")
    assert ["12 cats" in row.prompt for row in found] == [True]


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (WarmupSection(source="nothing"), "families, pool, gsm8k"),
        (WarmupSection(source="gsm8k"), "no file"),
        (WarmupSection(families={"other": 3}), "sums, words"),
        (WarmupSection(families={}), "no worked solution"),
    ],
)
def test_mistakes_are_user_errors(section: WarmupSection, words: str) -> None:
    with pytest.raises(UserError, match=words):
        rows(section)


def test_step_tokens_cost_one_each_and_the_text_stays_the_same(tmp_path: Path, tiny_model: Path) -> None:
    from rstar.tokens import load_tokenizer
    from rstar.training.vocabulary import with_step_tokens

    before = load_tokenizer(tiny_model)
    after = load_tokenizer(with_step_tokens(str(tiny_model), tmp_path / "start"))
    for text in STEP_TOKENS:
        assert len(after.encode(text, add_special_tokens=False)) == 1
    solution = "<code>\n# Step 1: a\nx = 1\n<end_of_step>\nprint(x)\n<end_of_code>\n<output>1<end_of_output>\n<answer>"
    ids = after.encode(solution, add_special_tokens=False)
    assert after.decode(ids, skip_special_tokens=True) == solution
    assert len(ids) < len(before.encode(solution, add_special_tokens=False))


def test_new_tokens_start_near_their_own_pieces_and_apart_from_each_other(tmp_path: Path, tiny_model: Path) -> None:
    """With a plain mean two delimiters that share most pieces started as good as equal, and were not learned apart."""
    import torch
    from transformers import AutoModelForCausalLM

    from rstar.prompts import END_OF_CODE, END_OF_STEP
    from rstar.tokens import load_tokenizer
    from rstar.training.vocabulary import with_step_tokens

    before, old = load_tokenizer(tiny_model), AutoModelForCausalLM.from_pretrained(tiny_model)
    folder = with_step_tokens(str(tiny_model), tmp_path / "start")
    table = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    known = old.get_input_embeddings().weight
    assert torch.equal(table[: len(known)], known)
    new, plain = [], []
    for text in (END_OF_STEP + "\n", END_OF_CODE + "\n"):
        pieces = before.encode(text, add_special_tokens=False)
        (token,) = load_tokenizer(folder).encode(text, add_special_tokens=False)
        low, high = known[pieces].min(dim=0).values, known[pieces].max(dim=0).values
        assert ((table[token] >= low - 1e-6) & (table[token] <= high + 1e-6)).all()
        new.append(table[token])
        plain.append(known[pieces].mean(dim=0))
    assert (new[0] - new[1]).norm() > 1.5 * (plain[0] - plain[1]).norm()


def test_frozen_layers_stay_as_they_are(tmp_path: Path, tiny_model: Path) -> None:
    from safetensors.torch import load_file

    from rstar.training.sft import train_policy

    found = rows(WarmupSection(source="pool", rows=2))
    section = TrainSection(epochs=1, learning_rate=1e-2, batch_size=2, frozen_layers=1)
    train_policy(found, str(tiny_model), tmp_path / "policy", section, seed=0)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_model, tmp_path / "policy"))
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed and not any("layers.0." in name or "embed" in name for name in changed)
    with pytest.raises(UserError, match="2 layers"):
        train_policy(found, str(tiny_model), tmp_path / "no", TrainSection(frozen_layers=3), seed=0)
