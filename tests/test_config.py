"""Config files, overrides, per-round overlays, and the answers to mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rstar.config import digest, for_round, keys, load, to_yaml
from rstar.recipes import load_config
from rstar.recipes.rstar_math import Config
from rstar.types import UserError

CONFIGS = [
    path
    for path in sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))
    if any(line.startswith(("recipe:", "base:")) for line in path.read_text().splitlines())  # not a file of examples
]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_shipped_config_loads_for_every_round(path: Path) -> None:
    _, config = load_config(str(path), ["model.base=named"])  # the paper's common values leave it open
    for number in range(config.run.rounds + 1):
        for_round(config, number)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_training_of_a_shipped_config_takes_what_its_search_can_write(path: Path) -> None:
    _, config = load_config(str(path), ["model.base=named"])
    for number in range(config.run.rounds + 1):
        one = for_round(config, number)
        lengths = {
            name: getattr(one, name).max_length for name in ("sft", "ppm", "verifier", "dpo") if hasattr(one, name)
        }
        assert lengths and min(lengths.values()) >= one.engine.max_context, lengths


def test_override_beats_file_beats_base(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model: {base: a}\nsearch: {c: 1.0, rollouts: 3}\n")
    (tmp_path / "top.yaml").write_text("base: base.yaml\nsearch: {rollouts: 5}\n")
    config = load(Config, tmp_path / "top.yaml", ["search.c=0.5"])
    assert (config.model.base, config.search.rollouts, config.search.c) == ("a", 5, 0.5)


def test_shorthand_is_for_sections_only_and_holds_in_rounds() -> None:
    settings = ["eval.problems=6", "engine.model=m", "bootstrap.engine=hf", "rounds.r2.engine=vllm"]
    config = load(Config, None, ["model=b", *settings, "rounds.r2.engine.max_batch=3", "rounds.r2.eval.problems=2"])
    assert (config.eval.problems, config.engine.model, config.bootstrap.engine.kind) == (6, "m", "hf")
    second = for_round(config, 2)
    assert (second.engine.kind, second.engine.max_batch, second.engine.model) == ("vllm", 3, "m")
    assert (second.eval.problems, config.model.base) == (2, "b")


def test_shorthand_names_a_section(tmp_path: Path) -> None:
    config = load(Config, None, ["model=m", "problems=gsm8k", "problems.path=x.jsonl", "cluster=inline", "engine=vllm"])
    assert (config.model.base, config.problems.name, config.problems.path) == ("m", "gsm8k", "x.jsonl")
    assert (config.cluster.address, config.engine.kind) == ("inline", "vllm")


def test_typo_is_answered_with_the_nearest_key() -> None:
    with pytest.raises(UserError, match=r"unknown key search.rolouts.*search\.rollouts"):
        load(Config, None, ["model=m", "search.rolouts=3"])


def test_wrong_type_names_key_and_expectation() -> None:
    with pytest.raises(UserError, match=r"search\.rollouts=many; need int"):
        load(Config, None, ["model=m", "search.rollouts=many"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("search.method=mctss", "search.method=mctss; need one of mcts, beam"),
        ("search.selection=puctt", "need one of uct, puct"),
        ("ppm.loss=hinge", "ppm.loss=hinge; need one of pairwise, mse, bce"),
        ("ppm.schedule=cosin", "ppm.schedule=cosin; need one of linear"),
        ("engine.kind=vlm", "engine.kind=vlm; need one of hf"),
        ("warmup.source=foo", "need one of families"),
        ("search.rollouts=-3", "search.rollouts=-3; need 1 or more"),
        ("sft.batch_size=0", "sft.batch_size=0; need 1 or more"),
        ("run.rounds=-1", "run.rounds=-1; need 0 or more"),
        ("search.seeds=[]", "need one or more, each once"),
        ("search.seeds=[0, 0]", "need one or more, each once"),
        ("eval.methods=[greedy, mctss]", "eval.methods.1=mctss; need one of greedy"),
        ("eval.samples=0", "eval.samples=0; need 1 or more"),
        ("search.c=nan", "search.c=nan; need 0 or more"),
        ("search.top_p=0", "search.top_p=0; need more than 0"),
        ("search.escalate=[4, -4]", "search.escalate.1=-4; need 1 or more"),
        ("rounds.r2.search.candidates=0", "rounds.r2.search.candidates=0; need 1 or more"),
    ],
)
def test_a_value_that_no_stage_could_use_is_found_at_once(override: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        load(Config, None, ["model.base=m", override])
    assert said in str(refused.value)


@pytest.mark.parametrize("text", ["", "{question}", "{question}\n", "[a, b", "007", "on", "a: b", "# b"])
def test_a_text_is_taken_as_it_stands(text: str) -> None:
    config = load(Config, None, ["model=m", f"model.system={text}", f"rounds.r1.model.template={text}"])
    assert (config.model.system, for_round(config, 1).model.template) == (text, text)


def test_a_text_in_quotes_is_yaml_and_null_stays_no_value() -> None:
    assert load(Config, None, ["model=m", r'model.template="{question}\n"']).model.template == "{question}\n"
    with pytest.raises(UserError, match=r"model\.system=None; need str"):
        load(Config, None, ["model=m", "model.system=null"])


def test_missing_value_names_the_key() -> None:
    with pytest.raises(UserError, match=r"model\.base has no value"):
        load(Config, None, [])


@pytest.mark.parametrize("text", ["search", "=3", "search.c=[1"])
def test_broken_override_is_a_user_error(text: str) -> None:
    with pytest.raises(UserError):
        load(Config, None, ["model=m", text])


def test_missing_broken_and_circular_files_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no config file"):
        load(Config, tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(UserError, match="not readable YAML"):
        load(Config, tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="no mapping"):
        load(Config, tmp_path / "list.yaml")
    (tmp_path / "self.yaml").write_text("base: self.yaml\n")
    with pytest.raises(UserError, match="own base"):
        load(Config, tmp_path / "self.yaml")


def test_round_overlay_applies_to_its_round_only() -> None:
    config = load(
        Config, None, ["model=m", "search.rollouts=8", "rounds.r2.search.rollouts=16", "rounds.r2.search.use_ppm=true"]
    )
    assert [for_round(config, n).search.rollouts for n in (1, 2, 3)] == [8, 16, 8]
    assert for_round(config, 2).search.use_ppm and for_round(config, 2).model.base == "m"


def test_typo_in_an_overlay_is_found_at_load() -> None:
    with pytest.raises(UserError, match=r"rounds\.r3\.search\.rolouts.*rounds\.r3\.search\.rollouts"):
        load(Config, None, ["model=m", "rounds.r3.search.rolouts=16"])
    with pytest.raises(UserError, match="round keys"):
        load(Config, None, ["model=m", "rounds.three.search.rollouts=16"])
    with pytest.raises(UserError, match="round keys"):  # no round would ever look at it
        load(Config, None, ["model=m", "rounds.r03.search.rollouts=16"])


def test_config_is_frozen_and_prints_as_yaml() -> None:
    config = load(Config, None, ["model=m"])
    with pytest.raises(AttributeError):
        config.search.rollouts = 3  # type: ignore[misc]
    assert "rollouts: 16" in to_yaml(config)
    assert "search.rollouts" in keys(Config)


def test_digest_depends_on_values_only() -> None:
    one = load(Config, None, ["model=m", "search.c=1", "run.seed=1"])
    two = load(Config, None, ["run.seed=1", "search.c=1", "model=m"])
    assert digest(one) == digest(two) != digest(load(Config, None, ["model=m"]))


def test_input_files_are_found_beside_the_file_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    for folder in (project / "below", elsewhere):
        folder.mkdir(parents=True)
    for path in (
        project / "mine.jsonl",
        project / "below" / "held.jsonl",
        elsewhere / "mine.jsonl",
        elsewhere / "b.jsonl",
    ):
        path.write_text("{}\n")
    (project / "base.yaml").write_text(
        "model: {base: tiny}\n"
        "problems: {path: mine.jsonl, heldout_path: below/held.jsonl, decontaminate: [gsm8k, b.jsonl]}\n"
    )
    (project / "below" / "own.yaml").write_text(
        "base: ../base.yaml\nproblems: {decontaminate: [held.jsonl, math]}\nrounds: {r2: {search: {ppm: held.jsonl}}}\n"
    )
    (project / "tiny").mkdir()  # a word of its own, not this folder
    monkeypatch.chdir(elsewhere)
    config = load(Config, project / "base.yaml")
    assert config.problems.path == str(project / "mine.jsonl"), "the file's folder comes before the working folder"
    assert config.problems.decontaminate == ["gsm8k", "b.jsonl"] and config.model.base == "tiny"
    config = load(Config, project / "below" / "own.yaml", ["problems.path=mine.jsonl"])
    assert config.problems.path == "mine.jsonl", "on the command line, the working folder's"
    assert config.problems.heldout_path == str(project / "below" / "held.jsonl")
    assert config.problems.decontaminate == [str(project / "below" / "held.jsonl"), "math"]
    assert config.rounds["r2"]["search"]["ppm"] == str(project / "below" / "held.jsonl")


def test_nothing_in_a_text_is_interpolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hidden")
    texts = ["Prices are ${x}", "$ {n \\choose k}", "${5 \\choose 2}$", "${oc.env:SECRET}", "\\${a}"]
    for text in texts:
        config = load(Config, None, ["model=m", f"model.system={text}", f"rounds.r2.model.system={text}"])
        assert config.model.system == for_round(config, 2).model.system == text
        (tmp_path / "own.yaml").write_text(yaml.safe_dump({"model": {"base": "m", "system": text}}))
        assert load(Config, tmp_path / "own.yaml").model.system == text
        assert "hidden" not in to_yaml(config) and text in yaml.safe_load(to_yaml(config))["model"]["system"]


def test_yaml_errors_name_the_line_and_a_key_given_twice_is_one(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("search:\n  c: 1\n  c: 2\n")
    with pytest.raises(UserError, match=r"own\.yaml:\d is not readable YAML: c is given twice"):
        load(Config, tmp_path / "own.yaml")
    (tmp_path / "own.yaml").write_text("search:\n  c: [1\nmodel: {}\n")
    with pytest.raises(UserError, match=r"own\.yaml:3 is not readable YAML"):
        load(Config, tmp_path / "own.yaml")
