"""Run folders: manifests written last, stages skipped when complete, refused when made from other settings, locked.
And the recipe's stages that need no training: base, search with bootstrap and second pass, extraction, unsolved."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rstar import manifest, store
from rstar import run as run_module
from rstar.call import call_of
from rstar.config import EvalSection, ExtractSection, ProblemsSection
from rstar.manifest import RoundDir, RunDir
from rstar.recipes import load_config, rstar_math
from rstar.recipes.base_model import checkpoint
from rstar.recipes.rows import own_prompt
from rstar.recipes.rstar_math import RECIPE, check
from rstar.report.unsolved import unsolved, unsolved_text
from rstar.run import Artifact, Here, Stage
from rstar.search.worker import SearchWorker
from rstar.store import index, read_trees
from rstar.training.data import read_rows
from rstar.training.ppm import row_kind
from rstar.types import PreferenceRow, SftRow, UserError
from tests.fakes import execute_stages

TINY = str(Path(__file__).parent.parent / "configs" / "rstar_math" / "tiny.yaml")
SUMS = ["12 + 7 - 4", "3 + 5", "8 * 2 + 1", "21 - 6", "9 + 9 + 9"]


def extract(here: Here, extract: ExtractSection, eval_problems: int, rows: Artifact | None) -> dict[str, int]:
    """A stage that writes a row and counts how often it was called."""
    file = here.output("sft.jsonl")
    CALLS.append(here.title)
    file.write_text(f"row {len(CALLS)}\n")
    return {"rows": 1}


CALLS: list[str] = []


@pytest.fixture(autouse=True)
def no_calls() -> None:
    CALLS.clear()


def stage(
    folder: Path, *, name: str = "extract", top: int = 2, problems: int = 0, rows: Artifact | None = None
) -> Stage:
    """The stage `extract` of round 1 in a folder."""
    section = ExtractSection(sft_top=top)
    config = rstar_math.Config(extract=section, eval=EvalSection(problems=problems))
    call = call_of(extract, (section, problems, rows), skip=1)
    return Stage(RunDir(folder).round(1), name, call, config)


def test_finished_stage_is_not_run_again(tmp_path: Path) -> None:
    first = stage(tmp_path).execute()
    again = stage(tmp_path).execute()
    assert CALLS == ["round 1 extract"] and again == first
    assert first.outputs["sft.jsonl"].size == 6 and first.counts == {"rows": 1}


def test_stage_without_its_record_or_its_output_is_run_again(tmp_path: Path) -> None:
    here = RunDir(tmp_path).round(1)
    stage(tmp_path).execute()
    here.sft.unlink()
    stage(tmp_path).execute()
    here.manifest.unlink()
    stage(tmp_path).execute()
    assert len(CALLS) == 3


@pytest.mark.parametrize("damage", ["", "{", '{"stages": {"extract": {"nonsense": 1}}}'])
def test_damaged_manifest_counts_as_not_done_and_says_so(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stage(tmp_path).execute()
    RunDir(tmp_path).round(1).manifest.write_text(damage)
    stage(tmp_path).execute()
    assert len(CALLS) == 2 and "damaged" in capsys.readouterr().out


def test_stage_made_from_other_settings_is_refused_with_the_key_and_what_sets_it_back(tmp_path: Path) -> None:
    stage(tmp_path, problems=4).execute()
    with pytest.raises(UserError, match=r"extract\.sft_top: 2 -> 3;.*\(rounds\.r1\.extract\.sft_top=2\)"):
        stage(tmp_path, top=3, problems=4).finished()
    with pytest.raises(UserError, match=r"eval\.problems: 4 -> 5;.*\(rounds\.r1\.eval\.problems=4\)"):
        stage(tmp_path, problems=5).finished()
    with pytest.raises(UserError, match="rows: None -> new"):
        stage(tmp_path, problems=4, rows=Artifact("round 0 rows", tmp_path, tmp_path, "new")).finished()


def test_a_missing_stage_before_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"round_00 has no finished stage base; need the stages before"):
        stage(tmp_path, rows=Artifact("round 0 base", tmp_path / "round_00", tmp_path)).finished()


def test_an_override_that_would_change_nothing_back_is_not_advised(tmp_path: Path) -> None:
    """A derived section's value is not the config's own."""
    stage(tmp_path).execute()
    other = dataclasses.replace(stage(tmp_path, top=3), config=rstar_math.Config())
    with pytest.raises(UserError, match=r"sft_top: 2 -> 3; need .*; set them back, choose") as refused:
        other.finished()
    assert "rounds.r1" not in refused.value.how


def measured(folder: Path, temperature: float, work: Callable[[Here], None], model: str = "a") -> Stage:
    """A stage `eval` of round 1 that goes on where it was stopped."""

    def evaluate(here: Here, eval: EvalSection, policy: Artifact) -> dict[str, int]:
        here.resume(here.round.eval)
        here.round.eval.mkdir(parents=True, exist_ok=True)
        here.output("eval.json")
        work(here)
        here.round.eval_json.write_text("{}")
        return {}

    section = EvalSection(temperature=temperature)
    call = call_of(evaluate, (section, Artifact("round 1 policy", folder, folder, model)), skip=1)
    return Stage(RunDir(folder).round(1), "eval", call, rstar_math.Config(eval=section))


def stopped(here: Here) -> None:
    raise KeyboardInterrupt


def done(here: Here) -> None:
    pass


def test_other_evaluation_settings_cost_the_evaluation_and_not_the_round(tmp_path: Path) -> None:
    def remove_what_is_named(temperature: float) -> None:
        with pytest.raises(UserError, match=r"eval\.temperature") as refused:
            measured(tmp_path, temperature, done).execute()
        found = re.search(r"remove (\S+) to evaluate again", str(refused.value))
        assert found
        Path(found[1]).unlink()

    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, 1.0, stopped).execute()
    remove_what_is_named(0.5)
    measured(tmp_path, 0.5, done).execute()
    remove_what_is_named(0.7)
    measured(tmp_path, 0.7, done).execute()
    record = RunDir(tmp_path).round(1).record("eval")
    assert record is not None and record.settings["eval"]["temperature"] == 0.7


def test_trees_that_other_models_have_grown_are_not_taken_for_the_new_ones(tmp_path: Path) -> None:
    """An evaluation goes on after a stop; for models that were trained again it begins again."""
    here, found = RunDir(tmp_path).round(1), list[list[str]]()

    def evaluate(model: str, *, stop: bool = False) -> None:
        def work(here: Here) -> None:
            found.append(sorted(path.name for path in here.round.eval.iterdir()))
            (here.round.eval / f"tree-{model}").touch()
            if stop:
                raise KeyboardInterrupt

        measured(tmp_path, 1.0, work, model).execute()

    with pytest.raises(KeyboardInterrupt):
        evaluate("a", stop=True)
    evaluate("a")
    here.drop("eval")
    evaluate("a")  # its record was lost, nothing else
    here.drop("eval")
    with pytest.raises(KeyboardInterrupt):
        evaluate("b", stop=True)
    here.drop("search")  # continued meanwhile: no complaint that eval has begun for another policy
    evaluate("c")
    assert found == [[], ["tree-a"], ["tree-a"], [], []]


def test_a_resumed_stage_counts_the_time_of_all_its_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(run_module.time, "monotonic", lambda: clock[0])

    def work(seconds: float, stop: bool) -> Callable[[Here], None]:
        def passing(here: Here) -> None:
            clock[0] += seconds
            if stop:
                raise KeyboardInterrupt

        return passing

    for seconds in (100.0, 20.0):
        with pytest.raises(KeyboardInterrupt):
            measured(tmp_path, 1.0, work(seconds, True)).execute()
    assert measured(tmp_path, 1.0, work(3.0, False)).execute().seconds == 123.0


def test_failure_in_a_stage_leaves_no_record(tmp_path: Path) -> None:
    def broken(here: Here) -> dict[str, int]:
        here.output("sft.jsonl").write_text("half")
        raise RuntimeError("disk")

    here = RunDir(tmp_path).round(1)
    with pytest.raises(RuntimeError):
        Stage(here, "extract", call_of(broken, (), skip=1)).execute()
    assert here.record("extract") is None


def test_a_stage_is_identified_by_the_contents_of_what_it_made(tmp_path: Path) -> None:
    before = stage(tmp_path).execute().digest
    shutil.copytree(tmp_path, tmp_path / "copy")  # other modification times, the same contents
    copied = stage(tmp_path / "copy").finished()
    assert copied is not None and copied.digest == before
    assert RunDir(tmp_path / "copy").round(1).changed("extract") == []
    RunDir(tmp_path).round(1).sft.unlink()
    assert stage(tmp_path).execute().digest != before  # writes another row


def test_files_are_not_read_again_while_size_and_time_are_those_of_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage(tmp_path).execute()
    here = RunDir(tmp_path).round(1)
    os.utime(here.sft, ns=(1, 1))
    assert stage(tmp_path).finished() is not None  # read once more, and its new time recorded

    def read(path: Path) -> str:
        raise AssertionError(f"{path} is read again")

    monkeypatch.setattr(store, "file_digest", read)
    assert stage(tmp_path).finished() is not None


def test_an_input_file_counts_by_its_contents_and_not_by_its_place(tmp_path: Path) -> None:
    def base(here: Here, problems: ProblemsSection) -> dict[str, int]:
        return {}

    def stage_of(path: Path, **more: Any) -> Stage:
        section = ProblemsSection(name="file", path=str(path), decontaminate=["gsm8k", str(path)], **more)
        return Stage(RunDir(tmp_path).round(0), "base", call_of(base, (section,), skip=1))

    (tmp_path / "a.jsonl").write_text("{}\n")
    stage_of(tmp_path / "a.jsonl").execute()
    (tmp_path / "moved").mkdir()
    moved = (tmp_path / "a.jsonl").rename(tmp_path / "moved" / "b.jsonl")
    assert stage_of(moved).finished() is not None
    with pytest.raises(UserError, match=r"problems\.limit: 0 -> 3"):
        stage_of(moved, limit=3).finished()
    moved.write_text("{}\n{}\n")
    with pytest.raises(UserError, match=r"problems\.decontaminate\.1: \w+ -> \w+; problems\.path: \w+ -> \w+"):
        stage_of(moved).finished()


def test_stages_of_another_version_are_told_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, here = RunDir(tmp_path), RoundDir(tmp_path, 1)
    assert run.other_versions() == ""
    for module in (manifest, run_module):
        monkeypatch.setattr(module, "software", lambda: "rstar 1, torch 2")
    stage(tmp_path, name="search").start()
    assert run.other_versions() == ""
    for module in (manifest, run_module):
        monkeypatch.setattr(module, "software", lambda: "rstar 1, torch 3")
    said = "warning: stage search was made by rstar 1, torch 2; this is rstar 1, torch 3. The records keep both"
    assert run.other_versions() == said
    record = here.finish("search", settings={}, inputs={}, outputs=[], counts={}, seconds=1.0)
    assert record.version == "rstar 1, torch 2; then rstar 1, torch 3" and run.other_versions() == ""
    assert here.finish("extract", settings={}, inputs={}, outputs=[], counts={}, seconds=1.0).version == (
        "rstar 1, torch 3"
    )


def test_one_driver_per_run_folder(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.acquire()
    code = f"from rstar.manifest import RunDir; from pathlib import Path; RunDir(Path({str(run.path)!r})).acquire()"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert other.returncode and "is in use by" in other.stderr and "pid" in other.stderr
    run.release()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unwritable_run_folder_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        RunDir(tmp_path / "file" / "run").acquire()


def test_manifest_is_readable_by_people_and_has_a_schema_number(tmp_path: Path) -> None:
    stage(tmp_path).execute()
    record = json.loads(RunDir(tmp_path).round(1).manifest.read_text())
    assert (record["schema"], record["round"]) == (2, 1)
    assert record["stages"]["extract"]["settings"]["extract"]["sft_top"] == 2
    assert record["stages"]["extract"]["function"].endswith(":extract")


def test_a_manifest_of_the_schema_before_is_read(tmp_path: Path) -> None:
    stage(tmp_path).execute()
    here = RunDir(tmp_path).round(1)
    old = json.loads(here.manifest.read_text())
    record = old["stages"]["extract"]
    del old["schema"], record["function"]
    record["outputs"] = {name: state["sha256"] for name, state in record["outputs"].items()}
    here.manifest.write_text(json.dumps(old))
    assert here.record("extract") is not None and here.changed("extract") == []


def test_keys_that_a_record_does_not_have_count_as_their_defaults(tmp_path: Path) -> None:
    """A run of weeks outlives the version that began it."""
    stage(tmp_path).execute()
    here = RunDir(tmp_path).round(1)
    manifest = json.loads(here.manifest.read_text())
    section = manifest["stages"]["extract"]["settings"]["extract"]
    del section["positives"]
    here.manifest.write_text(json.dumps(manifest))
    assert stage(tmp_path).finished() is not None
    section["negatives"], section["gone"] = 1, 1
    here.manifest.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"other settings: extract\.negatives: 1 -> 2; need"):
        stage(tmp_path).finished()


def configured(tmp_path: Path, model: Path, *overrides: str):  # type: ignore[no-untyped-def]
    """The tiny config on five sums, the last of which has a wrong reference answer, with a simulated policy."""
    rows = [
        {"id": f"s{n}", "question": text, "answer": str(eval(text) + 1000 * (n == 4))} for n, text in enumerate(SUMS)
    ]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fixed = [
        "problems.name=file", f"problems.path={path}", "problems.heldout=0", f"run.dir={tmp_path / 'run'}",
        f"model.base={model}", "model.step_tokens=false", "warmup.enabled=false", "engine=simulated", "cluster=inline",
    ]  # fmt: skip
    return load_config(TINY, [*fixed, *overrides])[1]


def stages(config, number: int) -> list[Stage]:  # type: ignore[no-untyped-def]
    return RECIPE.stages(config, number)


def execute(config, number: int, *names: str) -> RoundDir:  # type: ignore[no-untyped-def]
    """Run stages of a round, with what the stages before them have made."""
    return execute_stages(RECIPE, config, lambda stage: stage.round.number == number and stage.name in names).round(
        number
    )


def pretend(here: RoundDir, *names: str, outputs: Sequence[Path] = ()) -> None:
    """Records of stages that were not run."""
    here.path.mkdir(exist_ok=True)
    for name in names:
        here.finish(name, settings={}, inputs={}, outputs=outputs, counts={}, seconds=0)


def test_round_0_counts_and_lists_what_was_left_out(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "bench.jsonl").write_text('{"question": "3 + 5", "answer": "8"}\n')
    config = configured(tmp_path, tiny_model, f"problems.decontaminate=[{tmp_path / 'bench.jsonl'}]")
    record = execute(config, 0, "base").record("base")
    assert record is not None
    found = record.counts["problems"]
    assert (found["train"], found["heldout"], found["dropped"]) == (4, 0, {"contaminated": 1})
    assert found["contaminated"] == [["s1", str(tmp_path / "bench.jsonl")]]


def test_bootstrap_policy_searches_round_1_only_and_leaves_its_prompt_behind(tmp_path: Path, tiny_model: Path) -> None:
    few_shot = Path(TINY).parent / "few_shot.yaml"
    config = configured(
        tmp_path, tiny_model, "engine=openai", "bootstrap.enabled=true", "bootstrap.engine.kind=simulated",
        'bootstrap.model.template="Boot: {question}\\n"', f"bootstrap.model.few_shot={few_shot}", "search.rollouts=12",
        "extract.min_margin=0",
    )  # fmt: skip
    execute(config, 0, "base")
    here = execute(config, 1, "search", "extract")  # engine.kind=openai has no URL: it would fail if it were asked
    trees = list(read_trees(here.trees))
    assert all(tree.prompt[0].count("Boot: ") == 3 and tree.policy == "" for tree in trees)
    for row in [*read_rows(here.sft, SftRow), *read_rows(here.pairs, PreferenceRow)]:
        assert row.prompt.startswith(f"{SUMS[int(row.problem_id[1])]}\n<code>\n") and "Boot" not in row.prompt
    with pytest.raises(UserError, match=r"was written by bootstrap\.model.*sft\.jsonl, pairs\.jsonl"):
        own_prompt(trees)
    settings = {one.name: one.settings for one in stages(config, 2)}
    assert settings["search"]["engine"]["kind"] == "openai"
    assert settings["search"]["model"]["template"] == "{question}\n"
    base = stages(config, 0)[0].artifact()
    assert checkpoint(base, config.model) == str(tiny_model)


def test_second_pass_grows_a_fresh_tree_for_unsolved_problems_only(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tmp_path, tiny_model, "search.rollouts=20", "search.second_pass=3", "search.seeds=[0, 4]")
    execute(config, 0, "base")
    here = execute(config, 1, "search")
    trees = {tree.tree_id: tree for tree in read_trees(here.trees)}
    solved = {tree.problem.id for name, tree in trees.items() if tree.solved and not name.endswith("#5")}
    assert "s4" not in solved and len(solved) >= 3
    again = {name.partition("#")[0] for name in trees if name.endswith("#5")}
    assert again == {f"s{n}" for n in range(5)} - solved
    assert all(tree.rollouts_done <= 3 for name, tree in trees.items() if name.endswith("#5"))
    assert {name.partition("#")[2] for name in trees} == {"0", "4", "5"}

    def searched_again(*_: object) -> None:
        raise AssertionError("a finished tree was searched again")

    here.manifest.unlink()  # killed just before its record was written
    monkeypatch.setattr(SearchWorker, "search_problem", searched_again)
    before = index(here.trees)
    execute(config, 1, "search")
    assert index(here.trees) == before


def test_unsolved_problems_come_with_their_most_frequent_answer(tmp_path: Path, tiny_model: Path) -> None:
    config = configured(tmp_path, tiny_model, "search.rollouts=20")
    execute(config, 0, "base")
    here = execute(config, 1, "search")
    rows = {row.problem_id: row for row in unsolved(here.trees)}
    wrong = rows["s4"]  # its reference is wrong
    assert (wrong.reference, wrong.answer) == ("1027", "27") and 0.3 < wrong.share <= 1 and wrong.answers > 2
    answers = [
        (leaf.answer, leaf.multiplicity) for t in read_trees(here.trees) if t.problem.id == "s4" for leaf in t.answers()
    ]
    assert wrong.answers == sum(m for _, m in answers)
    assert wrong.share == sum(m for a, m in answers if a == "27") / wrong.answers
    solved = {tree.problem.id for tree in read_trees(here.trees) if tree.solved}
    assert set(rows).isdisjoint(solved) and set(rows) | solved == {f"s{n}" for n in range(5)}
    text = unsolved_text(tmp_path / "run")
    assert (
        text.splitlines()[0].startswith(f"{len(rows)} problems unsolved in round 1")
        and "reference 1027, given 27" in text
    )
    assert unsolved_text(tmp_path / "run", limit=0).endswith(f"and {len(rows)} more")


def test_a_round_takes_overrides_although_earlier_rounds_ran_with_others(tmp_path: Path, tiny_model: Path) -> None:
    """`rstar round 2 CONFIG search.rollouts=9` after a round 1 with 6; nothing of round 1 is compared or made again."""
    config = configured(tmp_path, tiny_model)
    execute(config, 0, "base")
    here = execute(config, 1, "search", "extract")
    pretend(here, "policy", "ppm", "eval")
    other = configured(tmp_path, tiny_model, "search.rollouts=9", "sft.epochs=7")
    assert stages(other, 2)[0].finished() is None
    with pytest.raises(UserError, match=r"search\.rollouts: 6 -> 9"):
        stages(other, 1)[0].finished()
    overlay = configured(tmp_path, tiny_model, "rounds.r2.search.rollouts=9", "rounds.r2.sft.epochs=7")
    assert stages(overlay, 1)[0].finished() is not None and stages(overlay, 2)[0].settings["search"]["rollouts"] == 9


def test_round_without_a_ppm_has_no_such_stage_and_none_may_search_with_it(tmp_path: Path, tiny_model: Path) -> None:
    rival = ("search.method=sample", "ppm.epochs=0", "rounds.r2.search.use_ppm=false")
    config = configured(tmp_path, tiny_model, *rival)
    assert [stage.name for stage in stages(config, 2)] == ["search", "extract", "policy", "eval"]
    with pytest.raises(UserError, match=r"round 2 searches with a PPM, round 1 trains none"):
        check(configured(tmp_path, tiny_model, *rival[:2]))


@pytest.mark.parametrize(
    ("override", "unread"),
    [
        ("extract.min_margin=0.9", {"base", "search"}),
        ("sft.epochs=9", {"base", "search", "extract"}),
        ("ppm.epochs=9", {"base", "search", "extract"}),
        ("eval.rollouts=9", {"base", "search", "extract"}),
        ("search.trees_in_flight=3", {"base", "search", "extract"}),
        ("cluster.workers=2", {"base", "search", "extract"}),
        ("engine.max_batch=3", {"base", "search", "extract"}),
        ("bootstrap.engine.timeout=9", {"base", "search", "extract"}),
        ("rounds.r2.search.c=1", {"base", "search", "extract"}),
        ("run.seed=1", {"search", "extract"}),
        ("search.second_pass=16", {"base", "extract"}),  # the trees that the rows came from are there
        ("ppm.loss=mse", {"base", "search"}),
    ],
)
def test_an_override_is_refused_by_the_stages_that_read_it_alone(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, override: str, unread: set[str]
) -> None:
    tmp_path = tmp_path_factory.getbasetemp() / "shared"
    tmp_path.mkdir(exist_ok=True)
    config = configured(tmp_path, tiny_model)
    execute(config, 0, "base")
    execute(config, 1, "search", "extract")
    changed = configured(tmp_path, tiny_model, override)
    accepted = set()
    for one in [stages(changed, 0)[0], *stages(changed, 1)[:2]]:
        try:
            assert one.finished() is not None
            accepted.add(one.name)
        except UserError:
            continue
    assert accepted == unread


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A run whose first round has been searched."""
    folder = tmp_path_factory.mktemp("searched")
    config = configured(folder, tiny_model, "search.rollouts=12")
    execute(config, 0, "base")
    execute(config, 1, "search")
    return folder / "run"


@pytest.mark.parametrize(("loss", "file"), [("mse", "pqm"), ("bce", "orm"), ("pairwise", "pairs")])
def test_the_loss_of_the_ppm_says_which_rows_are_extracted(
    tmp_path: Path, tiny_model: Path, searched: Path, loss: str, file: str
) -> None:
    shutil.copytree(searched, tmp_path / "run")
    config = configured(tmp_path, tiny_model, f"ppm.loss={loss}", "search.rollouts=12", "extract.min_margin=0")
    here = execute(config, 1, "extract")
    record = here.record("extract")
    assert record is not None and record.counts[file] > 0
    assert {"sft.jsonl", "pairs.jsonl", f"{file}.jsonl"} == set(record.outputs)
    assert len(read_rows(here.path / f"{file}.jsonl", row_kind(loss))) == record.counts[file]
    shutil.copytree(tiny_model, here.policy)
    pretend(here, "policy", outputs=[here.policy])
    trained = execute(config, 1, "ppm").record("ppm")
    assert trained is not None and trained.counts["rows"] == record.counts[file]
    assert (here.ppm / "model.safetensors").exists()


def test_round_with_seeds_escalation_and_second_pass_gives_rows_of_trees_on_disk(
    tmp_path: Path, tiny_model: Path
) -> None:
    """Round 2 of the tiny config: PPM-augmented, two seeds, more rollouts and a second pass for the unsolved."""
    config = configured(tmp_path, tiny_model, "extract.min_margin=0", "rounds.r2.search.rollouts=12")
    execute(config, 0, "base")
    before = execute(config, 1, "search", "extract")
    pretend(before, "policy", "ppm", "eval")
    here = execute(config, 2, "search", "extract")
    trees = {tree.tree_id: tree for tree in read_trees(here.trees)}
    assert {name.partition("#")[2] for name in trees} == {"0", "1", "2"}
    assert any(node.ppm_value is not None for tree in trees.values() for node in tree.nodes)
    assert {tree.problem.id for tree in trees.values() if tree.seed == 2} == {
        row.problem_id for row in unsolved(here.trees)
    }
    rows = read_rows(here.sft, SftRow)
    assert rows and len({row.problem_id for row in rows}) == sum(
        any(tree.solved for tree in trees.values() if tree.problem.id == f"s{n}") for n in range(5)
    )
    for row in rows:
        assert row.tree_id in trees and trees[row.tree_id].nodes[row.node_ids[-1]].reward == 1.0
    for pair in read_rows(here.pairs, PreferenceRow):
        assert pair.tree_id in trees or pair.tree_id.partition("#")[2] == "0+1"


def test_a_problem_file_that_changed_is_refused_before_held_out_problems_are_trained_on(
    tmp_path: Path, tiny_model: Path
) -> None:
    config = configured(tmp_path, tiny_model, "problems.heldout=2")
    execute(config, 0, "base")
    assert stages(config, 0)[0].finished() is not None
    with open(config.problems.path, "a") as file:
        file.write(json.dumps({"question": "What is 1 + 2 + 3 + 4?", "answer": "10"}) + "\n")
    with pytest.raises(UserError, match=r"problems\.path: \w+ -> \w+"):
        stages(config, 0)[0].finished()


def test_rounds_with_other_held_out_problems_or_with_none_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    families = ["problems.name=reasoning_gym", "rounds.r2.problems.seed=7"]
    with pytest.raises(UserError, match=r"rounds\.r2\.problems changes the held-out problems"):
        check(configured(tmp_path, tiny_model, *families, "problems.heldout=5"))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(UserError, match=r"held-out|no problems|empty"):
        check(configured(tmp_path, tiny_model, f"problems.heldout_path={empty}"))


def test_fresh_removes_what_the_run_made_and_nothing_else(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "mine")
    stage(run.path).execute()
    for name in ("report.html", "driver.json", "notes.txt"):
        (run.path / name).touch()
    for name in ("models", "round_01.old"):
        (run.path / name).mkdir()
    run.clear()
    assert sorted(path.name for path in run.path.iterdir()) == ["models", "notes.txt", "round_01.old"]


def test_repair_makes_the_damaged_stage_and_those_behind_it_again(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    here = run.round(1)
    stage(tmp_path).execute()
    pretend(here, "policy")
    (tmp_path / "round_01.old").mkdir()  # a copy of the user's
    assert run.repair() == []
    here.sft.write_text("raw 1\n")
    with pytest.raises(UserError, match=r"round_01/sft.jsonl is not what stage extract wrote.*--repair"):
        stage(tmp_path).finished()
    (done,) = run.repair()
    assert "sft.jsonl: not as written; to be made again: extract, policy" in done and not here.records()


def test_damage_that_keeps_size_and_time_is_found_by_repair(tmp_path: Path) -> None:
    stage(tmp_path).execute()
    run = RunDir(tmp_path)
    path = run.round(1).sft
    before = path.stat().st_mtime_ns
    path.write_text("raw 1\n")
    os.utime(path, ns=(before, before))
    assert stage(tmp_path).finished() is not None
    assert len(run.repair()) == 1


def test_what_a_killed_driver_left_half_written_goes_with_the_next_lock(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    here = run.round(1)
    stage(tmp_path).execute()
    (here.path / "eval.json.tmp").touch()
    (here.path / ".policy.abc.tmp" / "sub").mkdir(parents=True)
    run.acquire()
    run.release()
    assert sorted(path.name for path in here.path.iterdir()) == [".extract-call.json", "manifest.json", "sft.jsonl"]


def test_file_system_without_locks_is_told_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    RunDir(tmp_path).acquire()
    assert "no locks on" in capsys.readouterr().out


def test_a_recipe_outside_the_package_runs_resumes_and_refuses_other_settings(tmp_path: Path, tiny_model: Path) -> None:
    config = configured(tmp_path, tiny_model)  # writes the problems
    example = Path(TINY).parent.parent.parent / "docs" / "examples" / "expert_iteration.py"
    command = [
        sys.executable, str(example), str(example.with_suffix(".yaml")), f"run.dir={tmp_path / 'run'}",
        "engine=simulated", "problems.name=file", f"problems.path={config.problems.path}", "problems.heldout=1",
        f"model.base={tiny_model}",
        "model.step_tokens=false", "warmup.enabled=false", "sft.epochs=1",
    ]  # fmt: skip

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], capture_output=True, text=True, check=False, cwd=tmp_path)

    first = run()
    assert first.returncode == 0 and "finished in" in first.stdout, first.stderr
    here = RunDir(tmp_path / "run").round(1)
    assert list(here.records()) == ["search", "extract", "policy", "eval"]
    rows = read_rows(here.sft, SftRow)
    assert rows and (here.policy / "model.safetensors").exists()
    assert run().stdout.count("all done") == 1
    refused = run("search.temperature=0.5")
    assert refused.returncode == 2 and "search.temperature: 1.0 -> 0.5" in refused.stderr
    assert "(rounds.r1.search.temperature=1.0)" in refused.stderr
