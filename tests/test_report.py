"""What a person sees of a run: the table, a tree as text, the page. The run is made by hand, without any model."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rstar.evaluation import Candidate
from rstar.machine import this_machine
from rstar.manifest import RoundDir, RunDir
from rstar.report.charts import Point, Series, line_chart
from rstar.report.html import embedded, page, write_report
from rstar.report.look import disagreement, look, scored_steps
from rstar.report.results import results, results_table
from rstar.report.sample import pack, sample_trees
from rstar.report.sections import accuracy_against_tokens
from rstar.report.show import best_path, clean, find_trees, near, problem_ids, show_tree
from rstar.store import TreeWriter, write_json
from rstar.tree import Node, Tree
from rstar.types import TerminalReason, UserError
from tests.report_run import ANSWER, HOSTILE, STEP, finish, make_hostile, make_run, small_tree


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A base with warm-up, a whole round 1, and round 2 after its search stage."""
    return make_run(tmp_path / "demo")


def _cells(table: str, label: str) -> list[str]:
    """Cells of the row `label` in the first table of a text."""
    line = next(line for line in table.splitlines() if line.startswith(label))
    return re.split(r"\s{2,}", line.strip())


class _Elements(HTMLParser):
    """Tags of a page with their attributes, and the text inside each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text: list[str] = []
        self._script: dict[str, str | None] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._script = dict(attrs) if tag == "script" else None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.scripts.append((self._script, data))
        else:
            self.text.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._script = None

    def data(self, name: str) -> Any:
        return json.loads(next(text for attrs, text in self.scripts if attrs.get("id") == name))


# -- figures -----------------------------------------------------------------------------------------------------------


def test_results_read_every_stage_of_every_round(run: Path) -> None:
    found = results(run)
    base, one, two = found.rounds
    assert found.warmup and found.levels == ["1", "2", "all"]
    assert (base.solved, base.trees, base.guided) == ({}, None, None)
    assert base.greedy is not None and (base.greedy.mean, base.greedy.n) == (0.25, 4)
    assert one.solved == {"1": (1, 2), "2": (0, 1), "all": (1, 3)}
    assert one.guided is not None and one.guided.mean == 0.75
    assert one.heldout_levels["mcts"] == {"1": (2, 2), "2": (1, 2)}
    assert one.total_tokens == 300 + 40 + 40
    assert one.total_seconds == 90 + 1 + 120 + 60 + 30
    assert one.pairs_after is not None and one.pairs_after.accuracy == 0.625 and one.pairs_heldout
    assert one.policy is not None and (one.policy.first_loss, one.policy.mean_loss) == (1.25, 0.5)
    assert one.ppm is not None and one.ppm.mean_loss == 0.25
    assert two.stages == ("search",) and two.greedy is None and two.sft_rows is None


def test_the_table_says_the_figures_and_a_dash_where_there_is_none(run: Path) -> None:
    main, training = results_table(results(run)).split("\n\n")
    interval = r"50\.0 \[\d+\.\d, \d+\.\d\]"
    assert _cells(main, "0 base (warm-up)")[1:4] == ["-", "-", "-"]
    row = _cells(main, "1 ")
    assert row[:4] == ["1", "50.0", "0.0", "33.3"]
    assert re.fullmatch(interval, row[4]) and row[5].startswith("75.0 [") and row[6:] == ["3", "380", "5.0"]
    assert _cells(main, "2 ")[1:] == ["50.0", "100.0", "66.7", "-", "-", "3", "300", "1.5"]
    assert _cells(training, "0 base (warm-up)")[1:3] == ["20", "2.000 → 1.500"]
    assert _cells(training, "1 ")[1:] == ["11", "1.250 → 0.500", "17", "0.693 → 0.250", "62.5", "10.0", "8"]
    assert "2 " not in [line[:2] for line in training.splitlines()]
    assert max(map(len, main.splitlines())) <= 100


def test_the_base_is_not_called_warm_up_where_there_was_none(run: Path) -> None:
    finish(RoundDir(run, 0), "base", {"base": "some/model"}, 1.0, {"warmup": {"enabled": False}})
    assert "warm-up" not in results_table(results(run))
    assert "No warm-up" in write_report(run).read_text()


def test_a_folder_that_is_no_run_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no rounds"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


# -- trees as text -----------------------------------------------------------------------------------------------------


def test_trees_are_found_by_problem_round_and_tree_id(run: Path) -> None:
    assert problem_ids(run) == ["p-1", "p-2", "p-3"]
    assert [tree.solved for tree in find_trees(run, "p-2")] == [False, True]
    assert [tree.solved for tree in find_trees(run, "p-2", 2)] == [True]
    assert len(find_trees(run, "p-2#0", 1)) == 1


def test_an_unknown_problem_names_near_ids(run: Path) -> None:
    with pytest.raises(UserError, match=r"no tree of problem 'p2'.*near ones: p-2"):
        find_trees(run, "p2")
    with pytest.raises(UserError, match=r"round 0 of .* holds no trees"):
        find_trees(run, "p-1", 0)
    assert near("sum", ["a_sum-1", "zzz", "sun"], n=2) == ["a_sum-1", "sun"]


def test_the_best_path_is_the_correct_answer_of_highest_mean_q() -> None:
    tree = small_tree("p", solved=True)
    assert best_path(tree) == [1, 3]
    better = tree.add_child(tree.root, text=f"# alone\n{STEP}")
    leaf = tree.add_child(better, text=ANSWER, terminal=TerminalReason.ANSWER, answer="7", reward=1.0)
    tree.backpropagate(leaf, 1.0)
    assert best_path(tree) == [better.id, leaf.id]


def test_the_best_path_of_an_ungraded_tree_follows_the_ppm_and_without_an_answer_the_visits() -> None:
    tree = small_tree("p", solved=False)
    for leaf, score in zip(tree.answers(), (0.1, 0.9), strict=True):
        leaf.reward, leaf.ppm_value = None, score
    assert best_path(tree) == [1, 4]
    for leaf in tree.answers():
        leaf.terminal, leaf.visit_count = None, leaf.id
    assert best_path(tree) == [1, 4]


def test_a_tree_shows_figures_code_output_errors_and_the_best_path() -> None:
    lines = show_tree(small_tree("p-1", solved=True), width=100).splitlines()
    text = "\n".join(lines)
    assert "p-1#0 | level 1 | solved | 2 rollouts | 4 nodes" in text
    assert "reference answer: 7; most given: 5 (2 of 3)" in text
    assert "├─* #1  N 2  Q +0.00  PPM +0.25" in lines
    assert "│ ├─* #3  N 1  Q +1.00  correct (+1) answer 7" in lines
    assert "│ └── #4  N 1  Q -1.00  wrong (-1) answer 5  x2" in lines
    assert "└── #2  N 0  code_error" in lines
    assert "│ │   x = 3 + 4" in lines and "│ │ > noise" in lines and "    ! NameError: y" in lines
    assert STEP not in text and ANSWER not in text


def _chain(tree: Tree, node: Node, length: int) -> Node:
    for _ in range(length):
        node = tree.add_child(node, text=f"y = {'1 + ' * 40}1\n{STEP}", visit_count=1, value_sum=-1.0)
    return node


def test_large_trees_fold_beside_the_best_path_and_stay_within_the_width() -> None:
    tree = small_tree("p", solved=True)
    for _ in range(6):
        _chain(tree, tree.root, 12)
    folded, whole = show_tree(tree, width=80), show_tree(tree, width=80, depth=0)
    assert folded.count("... 11 more below") == 6
    assert "#3 " in folded and "more below" not in whole
    assert all(f"#{node.id} " in whole for node in tree.nodes[1:])
    assert max(map(len, whole.splitlines())) <= 80
    assert show_tree(tree, width=80, depth=3).count("... 9 more below") == 6


def test_a_chain_deeper_than_pythons_stack_is_shown() -> None:
    tree = small_tree("p", solved=True)
    last = _chain(tree, tree.root, 1500)
    assert f"#{last.id} " not in show_tree(tree)
    whole = show_tree(tree, width=80, depth=0)
    assert f"#{last.id} " in whole and max(map(len, whole.splitlines())) <= 80
    assert len(pack(tree)) > 1500


def test_control_characters_of_a_model_do_not_reach_the_terminal() -> None:
    tree = small_tree("p", solved=True)
    tree.nodes[1].text = f"\x1b[2J\x07\u202eevil\tx\n{STEP}"
    tree.nodes[1].stdout = "\x1b]0;title\x07"
    shown = show_tree(tree)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", shown)
    assert "\\x1b[2J" in shown
    assert clean("a\nb\x00") == "a\nb\\x00"


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_holds_figures_curves_and_trees_and_loads_nothing(run: Path) -> None:
    path = write_report(run)
    text = path.read_text()
    elements = _Elements(text)
    shown = " ".join(elements.text)
    assert path == run / "report.html" and not list(run.glob("*.tmp"))
    for figure in (this_machine(), "66.7", "62.5", "1.250 → 0.500", "Training problems solved by search", "own"):
        assert figure in shown
    assert "fine-tuned on 20 worked solutions (own)" in shown and "round 2 after its search stage" in shown
    assert sum(tag == "svg" for tag, _ in elements.tags) >= 4
    assert not any(attrs.get("src") or (attrs.get("href") or "#")[0] != "#" for _, attrs in elements.tags)
    assert not re.search("https?:", text.replace("http://www.w3.org/2000/svg", ""))  # a name, never fetched
    policy = next(attrs["content"] for tag, attrs in elements.tags if attrs.get("http-equiv"))
    assert policy is not None and "default-src 'none'" in policy and "script-src 'sha256-" in policy
    entries = elements.data("data-entries")
    assert [(e["problem"], e["round"], e["solved"], e["new"]) for e in entries] == [
        ("p-1", 1, True, False), ("p-1", 2, True, False), ("p-2", 1, False, False),
        ("p-2", 2, True, True), ("p-3", 1, False, False), ("p-3", 2, False, False),
    ]  # fmt: skip
    tree = elements.data("data-0")
    assert tree["best"] == [1, 3] and tree["pairs"] == [[3, 4]]
    assert tree["nodes"][1] == {"p": 0, "t": "# add\nx = 3 + 4", "c": True, "o": "noise\n", "n": 2, "q": 0.0, "v": 0.25}
    assert tree["nodes"][2]["e"] == "NameError: y" and tree["nodes"][2]["x"] == "code_error"


def test_ids_of_the_page_are_unique_and_the_script_finds_those_it_asks_for(run: Path) -> None:
    elements = _Elements(write_report(run).read_text())
    ids = [attrs["id"] for _, attrs in elements.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    script = next(text for attrs, text in elements.scripts if "type" not in attrs)
    asked = set(re.findall(r'getElementById\("([\w-]+)"\)', script)) | {"find", "outcome", "round", "data-entries"}
    assert asked <= set(ids)


def test_hostile_text_stays_text(run: Path) -> None:
    make_hostile(run)
    elements = _Elements(write_report(run).read_text())
    assert not any(tag == "img" or any(name.startswith("on") for name in attrs) for tag, attrs in elements.tags)
    assert sum("type" not in attrs for attrs, _ in elements.scripts) == 1
    packed = next(e for e in elements.data("data-entries") if e["problem"] == HOSTILE)
    assert packed["level"] == HOSTILE
    trees = [elements.data(f"data-{i}") for i in range(len(elements.data("data-entries")))]
    assert any(one["nodes"][1].get("t") == HOSTILE for one in trees)


def test_embedded_json_has_no_character_that_ends_a_script() -> None:
    text = embedded(json.dumps([HOSTILE], ensure_ascii=False).encode())
    assert not re.search("[<>&\u2028\u2029]", text) and json.loads(text) == [HOSTILE]


def test_a_page_is_written_after_every_stage(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "young")
    base, one = run.round(0), run.round(1)
    finish(base, "base", {"base": "m"}, 1.0, {"model": {"base": "m"}, "warmup": {"enabled": False}})
    assert "No warm-up" in write_report(run.path).read_text()
    one.path.mkdir()
    with TreeWriter(one.trees / "trees-a.jsonl.zst") as writer:  # a search that is under way
        writer.append(small_tree("p", solved=False))
    text = write_report(run.path).read_text()
    assert "round 1 begun" in text and '"problem":"p"' in text and "unsolved in round" not in text
    assert _cells(results_table(results(run.path)), "1 ")[1:] == ["-"] * 5 + ["-"]


def test_damaged_trees_are_named_on_the_page_and_do_not_stop_it(run: Path) -> None:
    shard = RoundDir(run, 1).trees / "trees-a.jsonl.zst"
    data = bytearray(shard.read_bytes())
    data[60:64] = b"\xff\xff\xff\xff"
    shard.write_bytes(bytes(data))
    text = write_report(run).read_text()
    assert "Could not be read: round 1" in text and "is damaged" in text
    assert '"problem":"p-2"' in text  # of round 2


def test_the_sample_keeps_to_its_size_and_takes_from_every_round(run: Path) -> None:
    looks, trouble = look(run, [1, 2])
    assert not trouble
    few = sample_trees(run, looks, per_round=1)
    assert [(e["round"], e["problem"]) for e in few.entries] == [(1, "p-2"), (2, "p-2")] and few.left_out == 0
    assert [e["new"] for e in few.entries] == [False, True]  # what a round newly solved, and how it was before
    small = sample_trees(run, looks, per_round=3, max_bytes=10)
    assert len(small.trees) == 1 and small.left_out == 5
    assert "5 trees are left out" in page(results(run), looks, small)


def test_trees_asked_for_come_beside_the_sample_and_before_it(run: Path) -> None:
    looks, _ = look(run, [1, 2])
    asked = sample_trees(run, looks, per_round=1, ids=["p-3", "p-1#0"])
    named = [(e["problem"], e["round"]) for e in asked.entries if e["asked"]]
    assert named == [("p-1", 1), ("p-1", 2), ("p-3", 1), ("p-3", 2)] and len(asked.entries) > len(named)
    assert [e["asked"] for e in sample_trees(run, looks, per_round=1, ids=["p-3"], max_bytes=10).entries] == [True]
    with pytest.raises(UserError, match="near ones: p-3, p-2, p-1"):
        write_report(run, ids=["p-9"])


# -- what a look at the trees counts -----------------------------------------------------------------------------------


def test_a_look_counts_q_n_and_the_answers_below_each_ppm_score(run: Path) -> None:
    (one, two), _ = look(run, [1, 2])
    # each tree: node 1 has N 2; its answers N 1 and Q +-1; solved: Q 0, 1, -1, else Q -1 throughout
    assert one.n == {1: 3, 0: 6} and one.q == {5: 1, 9: 1, 0: 7}
    assert one.scored == {6: (1, 9)}  # PPM +0.25 over three samples a tree, of which one is right in one tree
    assert one.newly == {} and set(two.newly) == {"p-2"} and one.solved == ["p-1"]
    assert [row.problem_id for row in two.unsolved] == ["p-3"] and two.total == 3


def test_disagreement_is_the_largest_distance_of_a_ppm_score_from_the_mean_reward_below() -> None:
    tree = small_tree("p", solved=True)  # one of three samples below node 1 is right: mean reward -1/3
    assert disagreement(scored_steps(tree)) == (pytest.approx(0.25 + 1 / 3), 1)
    tree.nodes[4].ppm_value = 0.9  # a wrong answer that the PPM likes
    assert disagreement(scored_steps(tree)) == (pytest.approx(1.9), 4)
    tree.nodes[1].ppm_value = tree.nodes[4].ppm_value = None
    assert disagreement(scored_steps(tree)) == (0.0, 0)


def test_only_so_many_problems_are_read_the_same_ones_each_round(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rstar.report.look.LOOKED_AT", 2)
    looks, _ = look(run, [1, 2])
    assert [list(found.problems) for found in looks] == [list(looks[0].problems)] * 2
    assert all(len(found.problems) == 2 and found.total == 3 for found in looks)
    assert "those of 2 problems a round" in write_report(run).read_text()


def test_newly_solved_and_unsolved_problems_are_listed_with_a_link_to_their_tree(run: Path) -> None:
    text = write_report(run).read_text()
    listed = text.partition('<section id="problems">')[2].partition("</section>")[0]
    shown = " ".join(_Elements(listed).text)
    assert "newly solved: 1 in round 2" in shown and "1 unsolved in round 2" in shown
    assert "5 in 67% of 3 answers" in shown
    links = [attrs["href"] for tag, attrs in _Elements(listed).tags if tag == "a"]
    assert links == ["#tree=2/p-2%230", "#tree=2/p-3%230"]


def test_accuracy_is_shown_over_the_tokens_it_took(run: Path) -> None:
    path = RoundDir(run, 1).eval_json
    figures = json.loads(path.read_text())
    for i, record in enumerate(figures["methods"]["mcts"]["records"]):
        record["samples"], record["tokens"] = 4, 160
        record["candidates"] = [Candidate("1", 0.1 * k, 1, k > i).__dict__ for k in range(4)]  # 3, 2, 1, 0 of 4 right
    write_json(path, figures)
    chart = accuracy_against_tokens(results(run))
    assert "of round 1" in chart and ">8</text>" in chart and ">256</text>" in chart  # 10 to 160 tokens
    says = html.unescape(chart)
    assert "greedy: 50%" in says and "majority: 37" in says and re.search(r"PPM-guided: 3[5-9]\.?\d?%, 75%", says)


def test_a_round_keeps_its_colour_where_another_has_no_points() -> None:
    lines = [Series("a", ()), Series("b", (Point(0, 1),)), Series("c", (Point(0, 2),), strong=True)]
    chart = line_chart("", lines, [(0.0, "0")], x_name="x")
    assert "label c1" in chart and "label strong" in chart and "label c0" not in chart


def test_a_tree_of_three_thousand_steps_packs_small() -> None:
    tree = small_tree("p", solved=True)
    while len(tree.nodes) < 3000:
        _chain(tree, tree.root, 10)
    tree.nodes[5].stdout = "x" * 1_000_000
    assert len(pack(tree)) < 3000 * 300
