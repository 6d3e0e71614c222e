"""Every command of the README parses, and is run by a test: by one named here, or in this file."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from rstar import cli
from rstar.recipes import load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PROGRAMS = ("rstar", "bash", "python", "sbatch", "hf", "tensorboard", "pip")
TINY = "configs/rstar_math/tiny.yaml"

COVERED = {  # how a command begins -> the test that runs it; "here": a test of this file
    "bash rounds/quickstart.sh": ".ci/run: bash rounds/quickstart.sh --tiny",
    "bash tests/run.sh": ".ci/run: bash tests/run.sh",
    "bash rounds/all.sh": "test_launchers.py::test_rounds_are_the_recipes_own_and_round_one_brings_the_base_along",
    "bash rounds/ray/head.sh": "test_launchers.py::test_ray_head_worker_and_submission",
    "bash rounds/ray/join.sh": "test_launchers.py::test_every_launcher_explains_itself_and_runs_nothing_for_help",
    "bash rounds/ray/submit.sh": "test_launchers.py::test_ray_head_worker_and_submission",
    "bash rounds/study.sh": "test_launchers.py::test_every_launcher_explains_itself_and_runs_nothing_for_help",
    "sbatch": "test_launchers.py::test_slurm_job_starts_head_then_workers_then_one_driver",
    "pip install": ".ci/run: bash tests/run.sh",  # which installs the package with its extras
    "rstar --help": "test_layers.py::test_help_is_instant",
    "rstar COMMAND --help": "here: test_every_command_has_a_help_with_an_example",
    "rstar --print-completion": "test_cli.py::test_bash_completes_commands_options_and_files",
    "rstar init": "test_cli.py::test_a_new_project_loads_and_its_plan_can_be_printed",
    "rstar doctor": "test_cli.py::test_the_doctor_examines_a_config_s_problems_model_and_tokenizer",
    "rstar evolve": "test_tiny_run.py::test_finished_run_says_that_all_is_done",
    "rstar round": "test_tiny_run.py::test_mistake_of_a_stage_is_told_once_by_its_process",
    "rstar search": "test_regrow.py::test_run_goes_on_with_the_new_settings_and_refuses_the_old_ones",
    "rstar train": "test_training_command.py::test_rows_train_a_policy_and_trees_its_ppm",
    "rstar eval": "test_eval_command.py::test_every_method_has_a_row_with_interval_cost_and_paired_test",
    "rstar eval PPM --ppm-quality": "test_eval_command.py::test_step_labelled_file_by_the_command",
    "rstar status": "test_status.py::test_status_of_a_running_run_tells_stage_figures_holder_and_time_left",
    "rstar show": "test_cli.py::test_a_run_is_shown_and_reported",
    "rstar report": "test_cli.py::test_a_run_is_shown_and_reported",
    "rstar config": "here: test_settings_are_printed",
    "python -m vllm.entrypoints.openai.api_server": "test_ecosystem.py::test_vllm_serves_the_policy_by_its_own_command",
    "python -m tests.benchmarks.NAME": "here: test_every_benchmark_named_exists_and_has_its_options",
    "python -c": "test_ecosystem.py::test_a_shard_of_trees_is_a_data_set_of_heads_and_nodes",
    "hf upload": "here: test_programs_of_other_packages_are_there",
    "tensorboard": "test_training_sft.py::test_losses_are_reported_to_tensorboard_too",
}


@dataclass(frozen=True)
class Command:
    """One command of the README."""

    line: int
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


def commands() -> list[Command]:
    """Those in code blocks (indented or fenced), without the comment behind, and those in `code` of running text, where
    it is more than a command's name."""
    found, prose, fenced = [], [], False
    for number, line in enumerate(README.splitlines(), 1):
        fenced ^= line.startswith("```")
        block = fenced or line.startswith("    ")
        prose.append("" if block or line.startswith("```") else line)
        parts = re.split(r"; (?=bash)", re.sub(r"\s+# .*", "", line.strip())) if block else []
        found += [Command(number, part) for part in parts if part.partition(" ")[0] in PROGRAMS]
    text = "\n".join(prose)
    for code in re.finditer(r"`([^`]+)`", text):
        words = re.sub(r'^eval "\$\((.*)\)"$', r"\1", code[1]).split()
        if words[0] in PROGRAMS and (len(words) > 2 or words[-1].startswith("--")):
            found.append(Command(text[: code.start()].count("\n") + 1, " ".join(words)))
    return found


def plain(words: list[str]) -> list[str]:
    """The words with something real for each placeholder; what is optional or repeated is left out."""
    real = {"CONFIG": TINY, "RUN": "runs/x", "MODEL...": "runs/x/policy", "PPM": "runs/x/ppm", "N": "1", "ID": "p"}
    return [real.get(word, word) for word in words if not word.startswith("[") and not word.endswith("]")]


COMMANDS = commands()
OF_RSTAR = [one for one in COMMANDS if one.words[0] == "rstar" and "COMMAND" not in one.words]


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 25 and len(OF_RSTAR) > 12
    assert {one.words[0] for one in COMMANDS} >= {"rstar", "bash", "python", "sbatch", "hf"}


@pytest.mark.parametrize("one", OF_RSTAR, ids=lambda one: f"line {one.line}: {one.text}")
def test_commands_of_rstar_parse_and_their_settings_load(one: Command) -> None:
    words = plain(one.words[1:])
    if words == ["--help"]:
        return
    options, rest = cli._parser().parse_known_args(words)
    overrides = [*getattr(options, "overrides", []), *rest]
    assert all("=" in text and not text.startswith("-") for text in rest), rest
    settings = [text for text in overrides if not text.endswith("=...")]
    if "config" in vars(options) or overrides:
        path = getattr(options, "config", "") or TINY
        if not path.startswith("mine/"):  # of a project that `rstar init` makes, in test_cli
            load_config(str(ROOT / path), settings)


@pytest.mark.parametrize("one", COMMANDS, ids=lambda one: f"line {one.line}: {one.text}")
def test_every_command_is_run_by_a_test_that_exists(one: Command) -> None:
    """A new command in the README fails here until the table above says how it is covered."""
    begins = [begin for begin in COVERED if one.text == begin or one.text.startswith(f"{begin} ")]
    assert begins, f"README line {one.line}: no test is named for {one.text!r}"
    assert_exists(COVERED[max(begins, key=len)])


def assert_exists(covered: str) -> None:
    if covered.startswith(".ci/run: "):
        assert covered.removeprefix(".ci/run: ") in (ROOT / ".ci" / "run").read_text()
        return
    name, _, test = covered.replace("here: ", "test_readme.py::").partition("::")
    tree = ast.parse((ROOT / "tests" / name).read_text())
    tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert test in tests, covered


def test_no_entry_of_the_table_is_stale() -> None:
    for covered in COVERED.values():
        assert_exists(covered)


# -- what is run here --------------------------------------------------------------------------------------------------


def test_every_command_has_a_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("evolve", "round", "search", "extract", "eval", "train", "show", "status", "report", "init", "doctor"):
        with pytest.raises(SystemExit) as left:
            cli.run([name, "--help"])
        assert left.value.code == 0
        assert f"rstar {name}" in capsys.readouterr().out.split("example:")[1]


def test_settings_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["config", str(ROOT / TINY), "search.c=1"]) == 0
    assert "  c: 1.0" in capsys.readouterr().out


def test_every_benchmark_named_exists_and_has_its_options() -> None:
    rows = re.findall(r"^\| `([a-z]+)([^`]*)` \|", README, flags=re.MULTILINE)
    assert {name for name, _ in rows} == {f.stem for f in (ROOT / "tests" / "benchmarks").glob("[a-z]*.py")}
    for name, options in rows:
        source = (ROOT / "tests" / "benchmarks" / f"{name}.py").read_text()
        for option in re.findall(r"--[a-z]+", options):
            assert f'"{option}"' in source, f"{name} {option}"
        assert "FILE" not in options or '"file"' in source


def test_programs_of_other_packages_are_there() -> None:
    assert "hf" in {entry.name for entry in importlib.metadata.entry_points(group="console_scripts")}


# -- what it names -----------------------------------------------------------------------------------------------------


def test_files_and_functions_that_are_named_exist() -> None:
    named = set(re.findall(r"`((?:[a-z_0-9.-]+/)*[a-z_0-9.-]+(?:/|\.(?:py|yaml|sh|png)))`", README))
    named |= set(re.findall(r"\]\(([^)]+)\)", README)) | {"LICENSE"}
    places = (ROOT, ROOT / "rstar", ROOT / "rstar" / "recipes", ROOT / "rstar" / "report")
    made = ("report.html", "mine/")  # by a run
    missing = [name for name in named if not name.startswith(made) and not any((p / name).exists() for p in places)]
    assert not missing
    for file, names in re.findall(r"`([a-z_/]+\.py)` `([\w.]+)`", README):
        source = (ROOT / "rstar" / file).read_text()
        assert re.search(rf"(def|class) {names.split('.')[-1]}\b", source), f"{file} {names}"


def test_the_map_has_a_line_for_every_file_and_folder() -> None:
    start = README.index("## Where things are")
    text = README[start : README.index("\n## ", start)]
    parts = [path.name + "/" * path.is_dir() for path in (ROOT / "rstar").iterdir()]
    left_out = {"__init__.py", "__main__.py", "__pycache__/"}
    assert [name for name in parts if name not in left_out and not re.search(rf"\b{re.escape(name)}", text)] == []


def test_settings_that_are_named_exist() -> None:
    """Also those in running text: `sft.launcher=ray`."""
    for text in re.findall(r"`((?:[a-z_0-9]+\.)+[a-z_0-9]+=[^`.\s]+)`", README):
        if "N" not in text.partition("=")[2] and not text.startswith("run.dir"):
            load_config(str(ROOT / TINY), [text])
    assert importlib.util.find_spec("rstar") is not None
