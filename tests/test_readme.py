"""What README and docs name exists: commands, settings, files, functions, links."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from rstar import cli
from rstar.recipes import load_config

ROOT = Path(__file__).parent.parent
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
PROGRAMS = ("rstar", "bash", "python", "sbatch", "hf", "tensorboard", "pip")
TINY = "configs/rstar_math/tiny.yaml"


@dataclass(frozen=True)
class Command:
    """One command of a page."""

    page: str
    line: int
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


def commands() -> list[Command]:
    """Those in code blocks (indented or fenced), without the comment behind, and those in `code` of running text, where
    it is more than a command's name."""
    found = []
    for path, page in PAGES.items():
        prose, fenced = [], False
        for number, line in enumerate(page.splitlines(), 1):
            fenced ^= line.startswith("```")
            block = fenced or line.startswith("    ")
            prose.append("" if block or line.startswith("```") else line)
            parts = re.split(r"; (?=bash)", re.sub(r"\s+# .*", "", line.strip())) if block else []
            found += [Command(path.name, number, part) for part in parts if part.partition(" ")[0] in PROGRAMS]
        text = "\n".join(prose)
        for code in re.finditer(r"`([^`]+)`", text):
            words = re.sub(r'^eval "\$\((.*)\)"$', r"\1", code[1]).split()
            if words[0] in PROGRAMS and (len(words) > 2 or words[-1].startswith("--")):
                found.append(Command(path.name, text[: code.start()].count("\n") + 1, " ".join(words)))
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


@pytest.mark.parametrize("one", OF_RSTAR, ids=lambda one: f"{one.page}:{one.line} {one.text}")
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


def test_every_benchmark_has_a_row_and_its_options_exist() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    rows = re.findall(r"^\| `([a-z]+)([^`]*)` \|", page, flags=re.MULTILINE)
    assert {name for name, _ in rows} == {f.stem for f in (ROOT / "tests" / "benchmarks").glob("[a-z]*.py")}
    for name, options in rows:
        source = (ROOT / "tests" / "benchmarks" / f"{name}.py").read_text()
        for option in re.findall(r"--[a-z]+", options):
            assert f'"{option}"' in source, f"{name} {option}"


def test_programs_of_other_packages_are_there() -> None:
    assert "hf" in {entry.name for entry in importlib.metadata.entry_points(group="console_scripts")}


# -- what it names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_files_functions_and_links_that_are_named_exist(path: Path) -> None:
    page = PAGES[path]
    named = set(re.findall(r"`((?:[a-z_0-9.-]+/)*[a-z_0-9.-]+(?:/|\.(?:py|yaml|sh|png)))`", page))
    places = (ROOT, ROOT / "rstar", ROOT / "rstar" / "recipes", ROOT / "rstar" / "report", ROOT / "rounds")
    made = ("report.html", "mine/")  # by a run
    missing = [name for name in named if not name.startswith(made) and not any((p / name).exists() for p in places)]
    missing += [link for link in re.findall(r"\]\(([^)]+)\)", page) if not (path.parent / link).exists()]
    assert not missing
    for file, names in re.findall(r"`([a-z_/]+\.py)` `([\w.]+)`", page):
        source = (ROOT / "rstar" / file).read_text()
        assert re.search(rf"(def|class) {names.split('.')[-1]}\b", source), f"{file} {names}"


def test_settings_that_are_named_exist() -> None:
    """Also those in running text: `sft.launcher=ray`."""
    for text in re.findall(r"`((?:[a-z_0-9]+\.)+[a-z_0-9]+=[^`.\s]+)`", "\n".join(PAGES.values())):
        if "N" not in text.partition("=")[2] and not text.startswith("run.dir"):
            load_config(str(ROOT / TINY), [text])


def test_readme_is_short() -> None:
    assert len(PAGES[ROOT / "README.md"].splitlines()) <= 150
