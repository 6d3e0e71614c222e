"""What rounds/study/study.sh does: runs, comparisons, and the tables that quote them.

Every figure comes from `rstar` itself: runs by `rstar evolve` and `rstar round`, comparisons by `rstar eval`. Here is
only the order of the commands, the budget of the rival, and the table of question 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from itertools import chain
from pathlib import Path
from platform import machine
from statistics import fmean
from typing import Any

from rstar.config import digest, for_round, to_dict
from rstar.evaluation import Measure, Paired, bootstrap, paired
from rstar.machine import software, this_machine
from rstar.manifest import RoundDir, RunDir
from rstar.problems import load_problems
from rstar.recipes import load_config
from rstar.report.results import count, measure, share
from rstar.store import write_json, write_rows
from rstar.types import UserError

HERE = Path(__file__).resolve().parent.parent.parent
SIZES = {
    "tiny": ("rstar_math/tiny.yaml", "study-tiny"), "cpu": ("study/search.yaml", "study"),
    "gpu": ("study/search_gpu.yaml", "study-gpu"),
}  # fmt: skip
"""Config and folder of runs."""
CPU_ONLY = ("6", "hard")
"""Questions whose configs in study/ are of that size alone."""
OTHERS = ("outcome_verifier", "flow_dpo", "orca2")
"""The recipes beside rStar-Math, each with a config in study/ and one that is tiny."""
RIVAL = ("search.method=sample", "extract.sft_by=random", "ppm.epochs=0")
RIVAL_ROUND = ("search.use_ppm=false", "search.seeds=[0]", "search.escalate=[]", "search.second_pass=0")


def rstar(*arguments: str | Path) -> None:
    """Run one `rstar` command and leave with its exit code where it fails."""
    command = [sys.executable, "-m", "rstar", *map(str, arguments)]
    print("+ rstar " + " ".join(map(str, arguments)), flush=True)
    code = subprocess.run(command, cwd=HERE).returncode
    if code:
        sys.exit(code)


@dataclass(frozen=True)
class Study:
    """One seed of the study: where it lives and what its runs are laid over with."""

    config: str
    settings: tuple[str, ...]
    seed: int
    runs: Path
    out: Path
    size: str = "cpu"  # of SIZES

    @property
    def overrides(self) -> list[str]:
        return [*self.settings, f"run.seed={self.seed}", f"problems.seed={1 + self.seed}"]

    def run(self, name: str) -> RunDir:
        return RunDir(self.runs / f"{name}-s{self.seed}")

    def resolved(self) -> Any:
        return load_config(self.config, self.overrides)[1]

    def searched(self, name: str = "search") -> RunDir:
        """The rounds of search."""
        run = self.run(name)
        rstar("evolve", self.config, *self.overrides, f"run.dir={run.path}")
        return run

    def from_base(self, name: str, base: RunDir, rounds: int = 1) -> RunDir:
        """A run that shares the warm-up of `base`, or its first so many rounds."""
        run = self.run(name)
        for number in range(rounds):
            if not run.round(number).path.exists():
                shutil.copytree(base.round(number).path, run.round(number).path, copy_function=os.link)
        return run

    def expert(self, search: RunDir, name: str = "expert") -> RunDir:
        """Plain expert iteration that has generated as many tokens by the end of each round as the search had.

        Samples of a round = what is left of the budget over the tokens of a sample, as measured a round before.
        """
        run, numbers = self.from_base(name, search), range(1, self.resolved().run.rounds + 1)
        laid = [f"rounds.r{number}.{key}" for number in numbers for key in RIVAL_ROUND]
        greedy = search.round(0).record("eval").counts["greedy"]  # type: ignore[union-attr]
        cost, budget, spent = greedy["tokens"] / greedy["problems"], 0, 0
        for number in numbers:
            record = search.round(number).record("search")
            assert record is not None, f"round {number} of {search.path} has no search"
            budget += record.counts["tokens"]
            samples = max(1, round((budget - spent) / (record.counts["problems"] * cost)))
            laid.append(f"rounds.r{number}.search.rollouts={samples}")
            rstar("round", str(number), self.config, *self.overrides, *RIVAL, *laid, f"run.dir={run.path}")
            own = run.round(number).record("search")
            assert own is not None
            spent += own.counts["tokens"]
            cost = own.counts["tokens"] / own.counts["rollouts"]
        return run

    def one_round(self, name: str, base: RunDir, *settings: str) -> RunDir:
        """Round 1 alone, with other settings."""
        run = self.from_base(name, base)
        for number in ("0", "1"):
            rstar(
                "round",
                number,
                self.config,
                *self.overrides,
                "run.rounds=1",
                "ppm.epochs=0",
                *settings,
                f"run.dir={run.path}",
            )
        return run

    def retrained(self, here: RoundDir, base: RunDir, order: int) -> Path:
        """The policy of a round, trained again from the base of all on the same rows in another order."""
        made = self.runs / f"trained-s{self.seed}" / f"{here.path.parent.name}-round{here.number}-order{order}"
        if not made.exists():
            options = ["--model", str(base.round(0).policy), "--out", str(made), "--config", self.config]
            rstar("train", "policy", here.sft, *options, *self.overrides, f"run.seed={order}")
        return made

    def compare(self, name: str, models: Sequence[Path], methods: str, trajectories: str, *more: str | Path) -> None:
        """`rstar eval` on the held-out problems; its tables go to the results as <question>-seed<N>."""
        heldout = self.runs / f"heldout-s{self.seed}.jsonl"
        problems = sorted(
            load_problems(self.resolved().problems).heldout, key=lambda p: (int(p.id.rpartition("/")[2]), p.id)
        )
        write_rows(heldout, ({"id": p.id, "question": p.question, "answer": p.answer} for p in problems))
        made = self.runs / f"{name.partition('-')[0]}-s{self.seed}"
        options: list[str | Path] = [
            "--methods",
            methods,
            "--trajectories",
            trajectories,
            "--config",
            self.config,
            "--out",
            made,
        ]
        rstar("eval", *models, "--benchmarks", f"heldout={heldout}", *options, *more, *self.overrides)
        for file in ("results.json", "results.md", "accuracy_vs_tokens.svg"):
            text = (made / file).read_text(encoding="utf-8")  # to be committed: no folder of this machine
            text = text.replace(str(self.runs), f"runs/{self.runs.name}").replace(f"{HERE}/", "")
            (self.out / f"{name}-seed{self.seed}{Path(file).suffix}").write_text(text, encoding="utf-8")

    def keep(self, name: str, result: dict[str, Any], table: Iterable[str]) -> None:
        """Write a result and its table to the results as <question>-seed<N>, and show the table."""
        write_json(self.out / f"{name}-seed{self.seed}.json", result)
        text = "\n".join(table)
        (self.out / f"{name}-seed{self.seed}.md").write_text(text + "\n", encoding="utf-8")
        print(text)

    def some(self, problems: int) -> list[str]:
        """So many held-out problems on CPU."""
        return ["--limit", str({"tiny": 4, "cpu": problems, "gpu": 10 * problems}[self.size])]


# -- the questions -----------------------------------------------------------------------------------------------------


def question_1(study: Study, name: str = "1", runs: tuple[str, str] = ("search", "expert")) -> None:
    """Four rounds against plain expert iteration."""
    search = study.searched(runs[0])
    expert = study.expert(search, runs[1])
    config = study.resolved()
    last = config.run.rounds
    rows = [round_row(search, expert, number) for number in range(last + 1)]
    first, end, rival = (greedy(run, n) for run, n in ((search, 0), (search, last), (expert, last)))
    tests = {
        f"search, round {last} against row 0": against(end, first),
        f"expert iteration, round {last} against row 0": against(rival, first),
    } | {
        f"search against expert iteration, round {n}": against(greedy(search, n), greedy(expert, n))
        for n in range(1, last + 1)
    }
    families = {
        name: [sum(v for i, v in one.items() if i.startswith(f"{name}/")) for one in (first, end, rival)]
        for name in dict.fromkeys(i.partition("/")[0] for i in first)
    }
    result = {
        "seed": study.seed,
        "heldout": len(first),
        "config": study.config,
        "settings": to_dict(config),
        "settings_digest": digest(to_dict(config)),
        "machine": f"{this_machine().partition(', ')[2]}, {software()}",
        "rounds": rows,
        "paired": {name: asdict(test) for name, test in tests.items()},
        "families": families,
    }
    study.keep(name, result, question_1_table(result, tests))


def greedy(run: RunDir, number: int) -> dict[str, float]:
    """Held-out problem -> 1 where the greedy answer of that round's policy is right, else 0."""
    records = json.loads(run.round(number).eval_json.read_text(encoding="utf-8"))["methods"]["greedy"]["records"]
    return {r["problem_id"]: float(any(c["correct"] for c in r["candidates"])) for r in records}


def against(mine: dict[str, float], other: dict[str, float]) -> Paired:
    """The paired test of two rounds' greedy answers, problem by problem."""
    return paired(list(mine.values()), [other[i] for i in mine])


def round_row(search: RunDir, expert: RunDir, number: int) -> dict[str, Any]:
    """Figures of one round of both runs."""
    row: dict[str, Any] = {"round": number}
    for name, run in (("search", search), ("expert", expert)):
        row[name] = {"greedy": asdict(bootstrap(list(greedy(run, number).values())))}
        guided = json.loads(run.round(number).eval_json.read_text(encoding="utf-8"))["methods"].get("mcts")
        row[name]["guided"] = guided["measures"]["accuracy"] if guided else None
        records = {stage: run.round(number).record(stage) for stage in ("search", "extract")}
        if number and records["search"] and records["extract"]:
            found, taken = records["search"].counts, records["extract"].counts
            solved, problems = found["solved_by_level"]["all"]
            row[name] |= {"solved": solved / problems, "tokens": found["tokens"], "rows": taken["sft_rows"]}
            row[name] |= {"rollouts": found["rollouts"] / problems}
    return row


def question_1_table(result: dict[str, Any], tests: dict[str, Paired]) -> Iterator[str]:
    """The table of question 1 as Markdown."""
    yield f"# {len(result['rounds']) - 1} rounds of search against plain expert iteration (seed {result['seed']})\n"
    yield f"{result['heldout']} held-out problems, percent with 95% bootstrap intervals. {result['machine']}\n"
    columns = ("solved", "tokens", "rows", "greedy")
    heads = ["round", *(f"search: {c}" for c in columns), "PPM-guided", "samples", *(f"expert: {c}" for c in columns)]
    yield "| " + " | ".join(heads) + " |"
    yield "|" + " ---: |" * 11
    for row in result["rounds"]:
        cells = [str(row["round"])]
        for name in ("search", "expert"):
            one = row[name]
            made = (
                [f"{100 * one['solved']:.1f}", count(one["tokens"]), str(one["rows"])] if "solved" in one else ["-"] * 3
            )
            cells += [f"{one.get('rollouts', 0):.0f}"] if name == "expert" else []
            cells += [*made, measure(Measure(**one["greedy"]))]
            cells += [measure(Measure(**one["guided"])) if one["guided"] else "-"] if name == "search" else []
        yield "| " + " | ".join(cells) + " |"
    yield ""
    for name, test in tests.items():
        yield (f"* {name}: {measure(test.difference)} points, {test.wins} problems won, {test.losses} lost, "
               f"McNemar p = {test.p_value:.2g}")  # fmt: skip
    yield "\n| family | row 0 | search | expert |\n| --- | ---: | ---: | ---: |"
    for name, figures in result["families"].items():
        yield f"| {name} | " + " | ".join(f"{value:.0f}" for value in figures) + " |"


def question_2(study: Study) -> None:
    """The last policy, the PPM of each round."""
    run, last = study.searched(), study.resolved().run.rounds
    for number in range(1, last + 1):
        ppm = ("--ppm", run.round(number).ppm)
        study.compare(f"2-ppm{number}", [run.round(last).policy], "bon", "2,8", *ppm, *study.some(56))
        study.compare(f"2-ppm{number}-mcts", [run.round(last).policy], "mcts", "1", *ppm, *study.some(28))


def question_3(study: Study) -> None:
    """Verifiers and ways to search at equal tokens."""
    run = study.searched()
    here = run.round(study.resolved().run.rounds)
    made = {loss: study.runs / f"{loss}-s{study.seed}" for loss in ("bce", "mse")}
    for loss, folder in made.items():
        if not folder.exists():
            options: list[str | Path] = ["--model", here.policy, "--out", folder, "--config", study.config]
            rstar("train", "ppm", here.path, *options, f"ppm.loss={loss}", *study.overrides)
    verifiers = ("--ppm", here.ppm, "--orm", made["bce"])
    study.compare("3", [here.policy], "greedy,sample,maj,bon,beam,mcts", "1,4", *verifiers, *study.some(28))
    study.compare("3-pqm", [here.policy], "greedy,bon,beam,mcts", "1,4", "--ppm", made["mse"], *study.some(28))


def question_4(study: Study) -> None:
    """One round, one thing changed at a time; all from the same base."""
    search = study.searched()
    expert = study.expert(search)
    folder = study.runs / f"arms-s{study.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    random = folder / "random-correct"
    if not random.exists():
        options: list[str | Path] = ["--model", search.round(0).policy, "--out", random, "--config", study.config]
        rstar("train", "policy", search.round(1).path, *options, "extract.sft_by=random", *study.overrides)
    arms = {
        "base": search.round(0).policy,
        "top-2-by-Q": search.round(1).policy,
        "rejection-sampled": expert.round(1).policy,
        "failed-steps-kept": study.one_round("unfiltered", search, "rounds.r1.search.drop_failed_steps=false")
        .round(1)
        .policy,
        "official-UCT": study.one_round("official", search, "rounds.r1.search.unvisited_first=false").round(1).policy,
    }
    for name, policy in arms.items():
        if not (folder / name).exists():
            (folder / name).symlink_to(policy.resolve())
    study.compare("4", [*(folder / name for name in arms), random], "greedy", "1")


def question_5(study: Study) -> None:
    """Accuracy by the number of trajectories."""
    run = study.searched()
    here = run.round(study.resolved().run.rounds)
    many = {"tiny": "1,2", "cpu": "1,4,16", "gpu": "1,4,16,64"}[study.size]
    study.compare("5", [here.policy], "maj,mcts", many, "--ppm", here.ppm, *study.some(12))


def question_6(study: Study) -> None:
    """The four systems on the same model, training problems and held-out problems."""
    search, last = study.searched(), study.resolved().run.rounds
    tiny = study.size == "tiny"
    runs = {}
    for recipe in OTHERS:
        runs[recipe] = study.run(recipe)
        config = f"configs/{recipe}/tiny.yaml" if tiny else f"configs/study/{recipe}.yaml"
        seeds = (f"run.seed={study.seed}", f"problems.seed={1 + study.seed}")
        rstar("evolve", config, *seeds, f"run.dir={runs[recipe].path}")
    verified, flow, orca = (runs[recipe] for recipe in OTHERS)
    records = method(orca, 0, "cautious")["records"]
    common = None if tiny else {r["problem_id"] for r in records}
    rows = [
        ("SmolLM2 as it is, cautious message", orca, 0, "cautious", "accuracy"),
        ("rStar-Math: warm-up (row 0), greedy", search, 0, "greedy", "accuracy"),
        (f"rStar-Math: round {last}, greedy", search, last, "greedy", "accuracy"),
        (f"rStar-Math: round {last}, guided by its PPM", search, last, "mcts", "accuracy"),
        ("outcome verifiers: one sample", verified, 1, "verifier", "one sample"),
        ("outcome verifiers: best by the verifier", verified, 1, "verifier", "accuracy"),
        ("outcome verifiers: oracle", verified, 1, "verifier", "oracle of 8"),
        ("Flow-DPO: warm-up, single model", flow, 0, "greedy", "accuracy"),
        ("Flow-DPO: untrained flow", flow, 0, "flow", "accuracy"),
        ("Flow-DPO: trained flow", flow, 1, "flow", "accuracy"),
        ("Orca 2: erased, cautious message", orca, 1, "cautious", "accuracy"),
        ("Orca 2: erased, empty message", orca, 1, "greedy", "accuracy"),
    ]
    found = [measured_row(*row, common) for row in rows]
    spent = {name: trained_tokens(run) for name, run in {"rstar_math": search, **runs}.items()}
    result = {"seed": study.seed, "rows": found, "training_tokens": spent,
              "machine": f"{this_machine().partition(', ')[2]}, {software()}"}  # fmt: skip
    study.keep("6", result, question_6_table(result))


def method(run: RunDir, number: int, name: str) -> dict[str, Any]:
    """A method of a round's eval.json."""
    found: dict[str, Any] = json.loads(run.round(number).eval_json.read_text(encoding="utf-8"))["methods"][name]
    return found


def measured_row(label: str, run: RunDir, number: int, name: str, key: str, common: set[str] | None) -> dict[str, Any]:
    """A measure, greedy ones on the problems of `common` alone (None: on all), and what an answer cost in tokens."""
    one = method(run, number, name)
    records = one["records"]
    if name == "greedy" and common is not None:
        records = [r for r in records if r["problem_id"] in common]
        found = asdict(bootstrap([float(any(c["correct"] for c in r["candidates"])) for r in records]))
    else:
        found = one["measures"][key]
    tokens = sum(r["tokens"] for r in records)
    if record := run.round(number).record("candidates"):  # a verifier's trees are those candidates, scored
        tokens = record.counts["tokens"]
    answers = sum(r["samples"] for r in records) if key == "one sample" else len(records)
    return {"system": label, "measure": found, "tokens": tokens / answers}


def trained_tokens(run: RunDir) -> int:
    """Tokens written for training in all rounds: by searches, completions, streams and teachers; no evaluation."""
    found = 0
    for here in run.rounds():
        for stage in ("search", "stream", "answers"):
            if (record := here.record(stage)) is not None:
                parts = record.counts.values() if stage == "answers" else [record.counts]
                found += sum(part["tokens"] for part in parts)
    return found


def question_6_table(result: dict[str, Any]) -> Iterator[str]:
    """The table of question 6 as Markdown."""
    yield f"# Four systems, one model, the same problems (seed {result['seed']})\n"
    yield f"Held-out accuracy in percent with 95% bootstrap intervals. {result['machine']}\n"
    yield "| system | problems | accuracy | tokens a problem |"
    yield "| --- | ---: | ---: | ---: |"
    for row in result["rows"]:
        one = Measure(**row["measure"])
        yield f"| {row['system']} | {one.n} | {measure(one)} | {row['tokens']:.0f} |"
    spent = ", ".join(f"{name} {count(tokens)}" for name, tokens in result["training_tokens"].items())
    yield f"\nTokens written for training, by policies and teachers: {spent}."


def without_ppm(study: Study, search: RunDir) -> tuple[RunDir, int]:
    """The rounds of `search` that search with a PPM, made again without one, and the first of them."""
    config = study.resolved()
    last = config.run.rounds
    first = next(n for n in range(1, last + 1) if for_round(config, n).search.use_ppm)
    run, numbers = study.from_base("no-ppm", search, first), range(first, last + 1)
    laid = [f"rounds.r{n}.{key}" for n in numbers for key in ("search.use_ppm=false", "ppm.epochs=0")]
    for number in numbers:
        rstar("round", str(number), study.config, *study.overrides, *laid, f"run.dir={run.path}")
    return run, first


def no_ppm(study: Study) -> None:
    """The rounds of question 1 that search with a PPM, searched without: is it the PPM that helps, or hurts?"""
    search, last = study.searched(), study.resolved().run.rounds
    run, first = without_ppm(study, search)
    rows = []
    for number in range(first - 1, last + 1):
        row: dict[str, Any] = {"round": number}
        for name, one in (("with", search), ("without", run)):
            row[name] = asdict(bootstrap(list(greedy(one, number).values())))
            if number >= first:
                counts = one.round(number).record("search").counts  # type: ignore[union-attr]
                row[f"{name}_tokens"], row[f"{name}_solved"] = counts["tokens"], counts["solved_by_level"]["all"]
        row["paired"] = asdict(against(greedy(run, number), greedy(search, number)))
        rows.append(row)
    result = {"seed": study.seed, "rows": rows, "machine": f"{this_machine().partition(', ')[2]}, {software()}"}
    study.keep("no-ppm", result, no_ppm_table(result))


def no_ppm_table(result: dict[str, Any]) -> Iterator[str]:
    """The table of no_ppm as Markdown."""
    yield f"# Later rounds with and without the PPM (seed {result['seed']})\n"
    yield f"Greedy held-out accuracy, percent with 95% bootstrap intervals. {result['machine']}\n"
    yield "| round | tokens with | solved | greedy | tokens without | solved | greedy | without - with | McNemar p |"
    yield "|" + " ---: |" * 9
    for row in result["rows"]:
        cells = [str(row["round"])]
        for name in ("with", "without"):
            found = (
                [count(row[f"{name}_tokens"]), share(row[f"{name}_solved"])] if f"{name}_tokens" in row else ["-"] * 2
            )
            cells += [*found, measure(Measure(**row[name]))]
        test = Paired(**row["paired"] | {"difference": Measure(**row["paired"]["difference"])})
        cells += [measure(test.difference), "-" if test.p_value is None else f"{test.p_value:.2g}"]
        yield "| " + " | ".join(cells) + " |"


def orders(study: Study) -> None:
    """What of a difference is luck? The same rows trained in three orders: of the last round of search and of its
    rival, and of the first round with a PPM and the one without."""
    search = study.searched()
    expert, last = study.expert(search), study.resolved().run.rounds
    without, first = without_ppm(study, search)
    arms = {
        f"search, round {last}": (search, last),
        f"expert iteration, round {last}": (expert, last),
        f"searched with the PPM, round {first}": (search, first),
        f"searched without, round {first}": (without, first),
    }
    trained = {
        name: [study.retrained(run.round(number), search, study.seed + more) for more in (10, 20)]
        for name, (run, number) in arms.items()
    }
    study.compare("orders-models", list(dict.fromkeys(chain.from_iterable(trained.values()))), "greedy", "1")
    records = (study.runs / f"orders-s{study.seed}" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    answered: dict[str, dict[str, float]] = {}
    for one in map(json.loads, records):
        right = float(any(candidate["correct"] for candidate in one["candidates"]))
        answered.setdefault(one["model"], {})[one["problem_id"]] = right
    answers = {
        name: [greedy(run, number), *(answered[model.name] for model in trained[name])]
        for name, (run, number) in arms.items()
    }
    means = {name: {i: fmean(one[i] for one in three) for i in three[0]} for name, three in answers.items()}
    overall = {name: asdict(bootstrap(list(one.values()))) for name, one in means.items()}
    rows = [
        {"rows": name, "orders": [fmean(one.values()) for one in three], "mean": overall[name]}
        for name, three in answers.items()
    ]
    names = list(arms)
    tests = {f"{one} - {other}": asdict(against(means[one], means[other])) for one, other in (names[:2], names[2:])}
    result = {"seed": study.seed, "rows": rows, "paired": tests,
              "machine": f"{this_machine().partition(', ')[2]}, {software()}"}  # fmt: skip
    study.keep("orders", result, orders_table(result))


def orders_table(result: dict[str, Any]) -> Iterator[str]:
    """The table of orders as Markdown."""
    yield f"# The same rows, trained in three orders (seed {result['seed']})\n"
    yield f"Greedy held-out accuracy, percent with 95% bootstrap intervals over problems. {result['machine']}\n"
    yield "| rows of | order 1 | order 2 | order 3 | mean of the three |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for row in result["rows"]:
        yield f"| {row['rows']} | " + " | ".join(f"{100 * v:.1f}" for v in row["orders"]) + (
            f" | {measure(Measure(**row['mean']))} |")  # fmt: skip
    yield ""
    for name, test in result["paired"].items():
        yield f"* {name}, means of three: {measure(Measure(**test['difference']))} points"


def hard(study: Study) -> None:
    """Question 1 again on families that sampling rarely solves."""
    config = study.config if study.size == "tiny" else "configs/study/hard.yaml"
    question_1(replace(study, config=config), "hard", ("hard-search", "hard-expert"))


QUESTIONS: dict[str, Callable[[Study], None]] = {
    "1": question_1, "2": question_2, "3": question_3, "4": question_4, "5": question_5, "6": question_6,
    "hard": hard, "no-ppm": no_ppm, "orders": orders,
}  # fmt: skip


def main() -> None:
    """Answer the questions named on the command line."""
    parser = argparse.ArgumentParser(prog="rounds/study/study.sh")
    parser.add_argument("--tiny", dest="size", action="store_const", const="tiny", default="cpu")
    parser.add_argument("--gpu", dest="size", action="store_const", const="gpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("what", nargs="*")
    options = parser.parse_args()
    settings = tuple(word for word in options.what if "=" in word)
    asked = [name for name in QUESTIONS if options.size != "gpu" or name not in CPU_ONLY]
    wanted = [word for word in options.what if "=" not in word] or asked
    if unknown := set(wanted) - set(asked):
        raise UserError(f"question {', '.join(sorted(unknown))}", need=f"of {', '.join(asked)}")
    config, folder = SIZES[options.size]
    runs = (options.runs or HERE / "runs" / folder).resolve()
    tiny = options.size == "tiny"
    out = options.out or (runs / "results" if tiny else HERE / "rounds" / "results" / results_name(options.size))
    out.mkdir(parents=True, exist_ok=True)
    runs.mkdir(parents=True, exist_ok=True)
    study = Study(f"configs/{config}", settings, options.seed, runs, out.resolve(), options.size)
    for name in wanted:
        QUESTIONS[name](study)
    print(f"results: {out}")


def results_name(size: str) -> str:
    """<date>-<machine>: the folder of an earlier day where this machine has one, so that a study is in one place."""
    name = f"{machine()}-{os.cpu_count()}cores{'-gpu' * (size == 'gpu')}"
    earlier = sorted((HERE / "rounds" / "results").glob(f"*-{name}"))
    return earlier[-1].name if earlier else f"{date.today().isoformat()}-{name}"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"study: {error}")
