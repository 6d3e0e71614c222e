"""Speed of the search, as one JSON object. Ratios are medians of repeats whose two sides take turns in one process.

    python -m tests.benchmarks.search --json [--only expansions,sandbox,growth,memory,simulated,engine,hf]
                                      [--engine vllm|hf] [--tokens 30000] [--repeats 3]

expansions_per_second          instant engine, 8 candidates, no code is run; by problems in flight; whole searches,
                               trees written to disk included
expansions_per_second_sandbox  the same with all code run
cost_growth                    CPU ms per expansion of a tree of 2,000 nodes over that of one of 100
peak_mb_per_tree               traced memory at its peak over the trees in flight, and how many nodes those had
simulated_efficiency_5000      64 problems, 8 candidates, steps of 40 tokens, real sandbox, an engine of 5,000 tokens/s:
                               the search's tokens/s over those of the same requests straight to the same engine
                               (`_of_nominal`: over 5,000)
engine_efficiency              the same ratio for a real engine with SmolLM2, 16 problems in flight, 4 candidates,
                               caches cold on both sides; `interval` is the range of the repeats. All repeats of the
                               search together generate --tokens. `_cpu`: of tokens per CPU second of this process
engine_mean_in_flight          requests in the engine, averaged over the search's time; 16 at most
hf_over_generate               tokens/s of the hf engine over transformers' generate() (left padding; same stop strings,
                               data type and batch size) on the prompts of a search; `_cpu`: per CPU second

A search of the efficiencies ends when its tokens are spent: what is in flight is waited for, nothing new is asked. Its
requests are then replayed in their order, as many at once as the search may have, sampled anew. A ratio can pass 1: the
search's prompts continue texts that its own engine wrote and still has in its cache, the replay's do not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rstar.config import EngineSection, ModelSection, SandboxSection, SearchSection
from rstar.engines.base import Policy
from rstar.engines.build import build_policy
from rstar.engines.simulated import SimulatedPolicy, arithmetic_script
from rstar.prompts import END_OF_ANSWER, END_OF_CODE, END_OF_STEP, step_prompt
from rstar.sandbox import Counts
from rstar.search.expand import Expander, Tools
from rstar.search.gather import gather
from rstar.search.mcts import Mcts
from rstar.search.worker import ProblemSummary, SearchJob, SearchTask, SearchWorker, WorkItem
from rstar.tree import Tree
from rstar.types import Execution, ExecutionStatus, Generation, Problem, PromptText, SamplingParams

PARTS = ("expansions", "sandbox", "growth", "memory", "simulated", "engine", "hf")
PROBLEMS_IN_FLIGHT = (1, 16, 64, 256)
AT_ONCE, CANDIDATES, BATCH = 16, 4, 64  # of the real engines: requests in flight, samples of each, samples in a batch
HF_REQUESTS = 16  # of a search, every second one, replayed by hf_over_generate: one batch
NOMINAL = 5000.0  # tokens/s of the simulated engine
CHARACTERS = 1.52  # of arithmetic_script's text in a simulated token: makes steps of 40 tokens on average
WORKED = (
    ("What is 12 + 7 * 3?", "<code>\n# Step 1: multiply first\nproduct = 7 * 3\n<end_of_step>\n# Step 2: add 12\n"
     "total = 12 + product\n<end_of_step>\n# Now print the final answer\nprint(total)\n<end_of_code>\n<output>33"
     "<end_of_output>\n<answer>The answer is \\boxed{33}.<end_of_answer>"),
    ("What is 45 - 8 + 19?", "<code>\n# Step 1: take 8 from 45\nrest = 45 - 8\n<end_of_step>\n# Step 2: add 19\n"
     "total = rest + 19\n<end_of_step>\n# Now print the final answer\nprint(total)\n<end_of_code>\n<output>56"
     "<end_of_output>\n<answer>The answer is \\boxed{56}.<end_of_answer>"),
)  # fmt: skip


def sums() -> Iterator[Problem]:
    """Sums of three to six terms, without end."""
    chance, number = random.Random(5), 0
    while True:
        terms = [chance.randint(2, 99) for _ in range(chance.randint(3, 6))]
        number += 1
        yield Problem(f"sum-{number}", f"What is {' + '.join(map(str, terms))}?", str(sum(terms)))


class InstantPolicy:
    """Four code steps, the code's end, an answer; every text is ready before it is asked for."""

    def __init__(self, candidates: int = 8) -> None:
        self._samples = [[self._sample(depth, i) for i in range(candidates)] for depth in range(6)]

    @staticmethod
    def _sample(depth: int, i: int) -> Generation:
        if depth < 4:
            text = (
                f"# Step {depth + 1}: the contribution of part {i} is the next one to count\nx{depth} = {i} + {depth}\n"
            )
            return Generation(text + END_OF_STEP, 40, -9.0, END_OF_STEP, False)
        if depth == 4:
            return Generation(
                f"# Now print the final answer, {i}\nprint(x0 + x3)\n{END_OF_CODE}", 20, -5.0, None, False
            )
        return Generation(f"The answer is \\boxed{{{i}}}.\n{END_OF_ANSWER}", 12, -2.0, END_OF_ANSWER, False)

    async def generate(self, prompt: PromptText, params: SamplingParams) -> list[Generation]:
        await asyncio.sleep(0)  # other trees get their turn, as beside a real engine
        return self._samples[min(5, len(prompt.segments) - 2)]

    async def close(self) -> None: ...


class NoSandbox:
    """Takes a sandbox's place and runs nothing."""

    level = "none"
    counts = Counts()

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def session(self, seed: int) -> NoSandbox:
        return self

    def state(self, codes: Sequence[str]) -> None: ...

    async def run(self, parent: None, code: str) -> tuple[None, Execution]:
        return None, Execution(ExecutionStatus.OK)


@dataclass
class Recorder:
    """Passes requests on to a policy and keeps them; once `budget` tokens are generated nothing new is passed on."""

    policy: Policy
    budget: float = float("inf")
    requests: list[tuple[PromptText, SamplingParams]] = field(default_factory=list)
    tokens: int = 0
    samples: int = 0
    in_flight: int = 0
    begun: float = 0.0
    ended: float = 0.0
    cpu_begun: float = 0.0
    cpu_ended: float = 0.0
    request_seconds: float = 0.0
    spent: asyncio.Event = field(default_factory=asyncio.Event)

    async def generate(self, prompt: PromptText, params: SamplingParams) -> list[Generation]:
        if self.tokens >= self.budget:
            await asyncio.Event().wait()  # for ever: the caller's task is cancelled at the end
        started = time.perf_counter()
        if not self.begun:
            self.begun, self.cpu_begun = started, time.process_time()
        self.requests.append((prompt, params))
        self.in_flight += 1
        found = await self.policy.generate(prompt, params)
        self.in_flight -= 1
        self.ended, self.cpu_ended = time.perf_counter(), time.process_time()
        self.request_seconds += self.ended - started
        self.tokens += sum(g.tokens for g in found)
        self.samples += len(found)
        if self.tokens >= self.budget and not self.in_flight:
            self.spent.set()
        return found

    async def close(self) -> None: ...

    @property
    def rate(self) -> float:
        """Tokens per second, from the first request to the end of the last."""
        return self.tokens / (self.ended - self.begun)

    @property
    def cpu_rate(self) -> float:
        """Tokens per CPU second of this process, which other load on the machine disturbs less."""
        return self.tokens / (self.cpu_ended - self.cpu_begun)

    @property
    def mean_in_flight(self) -> float:
        return self.request_seconds / (self.ended - self.begun)


async def started_worker(
    folder: Path, policy: Policy, search: SearchSection, *, execute: bool = True, model: ModelSection | None = None
) -> SearchWorker:
    """A search worker with `policy` for its engine, which stays open when the worker closes."""
    job = SearchJob(
        passes=(SearchTask(Path(tempfile.mkdtemp(dir=folder)), search),),
        engine=EngineSection(kind="simulated"),
        sandbox=SandboxSection(),
        model=model or ModelSection(base="none", template="slm"),
        policy=model.base if model else "",
    )
    worker = SearchWorker(job, "bench")
    if not execute:
        worker.sandbox = NoSandbox()  # type: ignore[assignment]
    await worker.start()
    worker._policy = policy
    return worker


def items(count: int) -> list[WorkItem]:
    return [WorkItem(0, problem) for problem, _ in zip(sums(), range(count), strict=False)]


async def replay(policy: Policy, requests: Sequence[tuple[PromptText, SamplingParams]], at_once: int) -> Recorder:
    """Send `requests` in their order, `at_once` of them in the engine at any time."""
    recorder, left = Recorder(policy), iter(requests)

    async def sender() -> None:
        for prompt, params in left:
            await recorder.generate(prompt, params)

    await asyncio.gather(*(sender() for _ in range(at_once)))
    return recorder


async def collect(
    items: Sequence[WorkItem],
    search_problem: Callable[[WorkItem], Awaitable[ProblemSummary]],
    *,
    in_flight: int,
    on_done: Callable[[ProblemSummary], object],
) -> None:
    """Push `items` through `search_problem`, at most `in_flight` at once, in the order of the list."""
    queue = iter(items)

    async def puller() -> None:
        for item in queue:
            on_done(await search_problem(item))

    await gather(*(puller() for _ in range(min(in_flight, len(items)))))


async def expansion_rate(folder: Path, problems: int, *, execute: bool) -> float:
    """Expansions per second with `problems` in flight; a small number goes through several lots."""
    rollouts = 1 if execute else 16
    worker = await started_worker(
        folder, InstantPolicy(), SearchSection(rollouts=rollouts, candidates=8), execute=execute
    )
    calls: list[int] = []
    work = items(max(problems, 8 if execute else 32))
    begun = time.perf_counter()
    await collect(
        work, worker.search_problem, in_flight=problems, on_done=lambda summary: calls.append(summary.engine_calls)
    )
    spent = time.perf_counter() - begun
    await worker.close()
    return sum(calls) / spent


async def expansions(folder: Path, repeats: int, *, execute: bool) -> dict[str, Any]:
    rates: dict[int, list[float]] = {problems: [] for problems in PROBLEMS_IN_FLIGHT}
    for _ in range(repeats):
        for problems, found in rates.items():
            found.append(await expansion_rate(folder, problems, execute=execute))
    name = "expansions_per_second_sandbox" if execute else "expansions_per_second"
    return {name: {str(problems): statistics.median(found) for problems, found in rates.items()}}


def lone_search() -> Mcts:
    """The search of one tree with an instant engine, nothing executed, every answer wrong."""

    async def grade(answer: str, problem: Problem) -> bool:
        return False

    tree = Tree("growth", next(sums()), step_prompt("What is 1 + 1?\n").segments)
    tools = Tools(InstantPolicy(), None, NoSandbox().session, grade)  # type: ignore[arg-type]
    return Mcts(Expander(tree, tools, SearchSection(candidates=8)))


async def growth(repeats: int) -> dict[str, Any]:
    ratios = []
    for _ in range(repeats):
        small: list[float] = []
        large: list[float] = []
        for _ in range(20):
            mcts = lone_search()
            tree = mcts.tree
            for sizes, costs in (((60, 140), small), ((1900, 2100), large)):
                while len(tree.nodes) < sizes[0]:
                    await mcts.rollout()
                calls, begun = tree.engine_calls, time.process_time()
                while len(tree.nodes) < sizes[1]:
                    await mcts.rollout()
                costs.append((time.process_time() - begun) * 1e3 / (tree.engine_calls - calls))
        ratios.append((statistics.median(small), statistics.median(large)))
    return {
        "cost_growth": statistics.median(large / small for small, large in ratios),
        "ms_per_expansion": {
            "100": statistics.median(small for small, _ in ratios),
            "2000": statistics.median(large for _, large in ratios),
        },
    }


async def memory(folder: Path) -> dict[str, Any]:
    problems = 64
    worker = await started_worker(folder, InstantPolicy(), SearchSection(rollouts=16, candidates=8), execute=False)
    nodes: list[int] = []
    work = items(problems)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    await collect(
        work, worker.search_problem, in_flight=problems, on_done=lambda s: nodes.append(sum(s.outcomes.values()))
    )
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    await worker.close()
    return {"peak_mb_per_tree": peak / problems / 1e6, "nodes_per_tree": statistics.mean(nodes)}


async def simulated(folder: Path, repeats: int) -> dict[str, Any]:
    def engine() -> SimulatedPolicy:
        return SimulatedPolicy(
            arithmetic_script, tokens_per_second=NOMINAL, count_tokens=lambda text: int(len(text) / CHARACTERS) + 1
        )

    ratios, rates, replayed, recorder = [], [], [], Recorder(engine())
    for _ in range(repeats):
        worker = await started_worker(folder, recorder, SearchSection(rollouts=2, candidates=8, max_step_tokens=512))
        recorder = worker._policy = Recorder(engine())
        await collect(items(64), worker.search_problem, in_flight=64, on_done=lambda summary: None)
        await worker.close()
        straight = await replay(engine(), recorder.requests, 64)
        rates.append(recorder.rate)
        replayed.append(straight.rate)
        ratios.append(recorder.rate / straight.rate)
    return {
        "simulated_efficiency_5000": statistics.median(ratios),
        "simulated_efficiency_5000_of_nominal": statistics.median(rates) / NOMINAL,
        "simulated_tokens_per_second": {"search": statistics.median(rates), "replay": statistics.median(replayed)},
        "simulated_tokens_per_step": recorder.tokens / recorder.samples,
    }


def checkpoint(folder: Path) -> str:
    """SmolLM2's folder."""
    from rstar.recipes.base_model import base_model

    return base_model(ModelSection(base="smollm2"), folder)


async def cold(kind: str, model: str, policy: Any = None) -> Any:
    """An engine that has nothing cached: a new one, or `policy` after it forgot everything."""
    if kind == "vllm" and policy is not None:
        await policy.load_weights(model)
        return policy
    if policy is not None:
        await policy.close()
    return build_policy(EngineSection(kind=kind, max_batch=BATCH, max_context=2048), model)


async def searched(folder: Path, policy: Policy, model: str, tokens: float) -> Recorder:
    """A search of sums with 16 problems in flight, until `tokens` are generated."""
    few_shot = folder / "worked.json"
    few_shot.write_text(json.dumps([{"question": q, "solution": s} for q, s in WORKED]))
    search = SearchSection(rollouts=8, candidates=CANDIDATES, max_step_tokens=64, max_depth=10)
    recorder = Recorder(policy, tokens)
    worker = await started_worker(folder, recorder, search, model=ModelSection(base=model, few_shot=str(few_shot)))
    growing = asyncio.create_task(
        collect(items(10_000), worker.search_problem, in_flight=AT_ONCE, on_done=lambda summary: None)
    )
    spent = asyncio.create_task(recorder.spent.wait())
    await asyncio.wait({growing, spent}, return_when=asyncio.FIRST_COMPLETED)
    if growing.done():
        await growing  # it ends early only by failing
    growing.cancel()
    await asyncio.gather(growing, return_exceptions=True)
    await worker.close()
    return recorder


async def real_engine(folder: Path, kind: str, tokens: int, repeats: int) -> dict[str, Any]:
    if kind == "vllm":
        import rstar.engines.vllm  # noqa: F401 - sets the environment of its threads; torch is not loaded yet
    model = checkpoint(folder)
    policy = await cold(kind, model)
    await searched(folder, policy, model, 500)  # the first use of an engine is slower: kernels, memory pages
    searches, replays = [], []
    for _ in range(repeats):
        policy = await cold(kind, model, policy)
        searches.append(await searched(folder, policy, model, tokens / repeats))
        policy = await cold(kind, model, policy)
        replays.append(await replay(policy, searches[-1].requests, AT_ONCE))
    await policy.close()
    ratios = [one.rate / other.rate for one, other in zip(searches, replays, strict=True)]
    cpu_ratios = [one.cpu_rate / other.cpu_rate for one, other in zip(searches, replays, strict=True)]
    return {
        "engine": kind,
        "engine_efficiency": statistics.median(ratios),
        "engine_efficiency_interval": [min(ratios), max(ratios)],
        "engine_efficiency_cpu": statistics.median(cpu_ratios),
        "engine_mean_in_flight": statistics.median(one.mean_in_flight for one in searches),
        "engine_tokens": sum(one.tokens for one in searches),
        "engine_tokens_per_second": {
            "search": statistics.median(one.rate for one in searches),
            "replay": statistics.median(one.rate for one in replays),
        },
        "engine_tokens_per_sample": statistics.mean(one.tokens / one.samples for one in searches),
    }


def plain_generate(
    model: Any, tokenizer: Any, requests: Sequence[tuple[PromptText, SamplingParams]]
) -> tuple[float, float]:
    """Tokens per second, and per CPU second, of transformers' generate(): batches of BATCH samples, in order."""
    import torch

    tokens, begun, cpu_begun, width = 0, time.perf_counter(), time.process_time(), BATCH // CANDIDATES
    for start in range(0, len(requests), width):
        batch = requests[start : start + width]
        params = batch[0][1]
        inputs = tokenizer([p.text for p, _ in batch], return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                do_sample=True,
                temperature=params.temperature,
                top_k=0,
                top_p=params.top_p,
                max_new_tokens=params.max_tokens,
                num_return_sequences=params.n,
                stop_strings=list(params.stop),
                tokenizer=tokenizer,
                pad_token_id=tokenizer.pad_token_id,
            )
        ended = output[:, inputs["input_ids"].shape[1] :] == tokenizer.pad_token_id
        tokens += int((~ended).sum())
    return tokens / (time.perf_counter() - begun), tokens / (time.process_time() - cpu_begun)


async def over_generate(folder: Path, repeats: int) -> dict[str, Any]:
    model = checkpoint(folder)
    policy = await cold("hf", model)
    found = await searched(folder, policy, model, 40 * CANDIDATES * HF_REQUESTS)  # enough: a sample has at most 64
    requests = found.requests[: 2 * HF_REQUESTS : 2]
    from transformers import AutoModelForCausalLM

    tokenizer = policy.tokenizer
    tokenizer.padding_side = "left"
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=policy.model.dtype).eval()
    ours, theirs = [], []
    for _ in range(repeats):
        policy = await cold("hf", model, policy)
        ours.append(await replay(policy, requests, BATCH // CANDIDATES))
        theirs.append(await asyncio.to_thread(plain_generate, plain, tokenizer, requests))
    await policy.close()
    return {
        "hf_over_generate": statistics.median(one.rate / wall for one, (wall, _) in zip(ours, theirs, strict=True)),
        "hf_over_generate_cpu": statistics.median(
            one.cpu_rate / cpu for one, (_, cpu) in zip(ours, theirs, strict=True)
        ),
        "hf_tokens_per_second": {
            "engine": statistics.median(one.rate for one in ours),
            "generate": statistics.median(wall for wall, _ in theirs),
        },
        "hf_requests": len(requests),
        "hf_dtype": str(plain.dtype).removeprefix("torch."),
    }


async def measure(parts: Sequence[str], engine: str, tokens: int, repeats: int) -> dict[str, Any]:
    """Figures of the chosen parts, and the machine they stand for."""
    load = os.getloadavg()[0]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measurements: dict[str, Callable[[], Coroutine[Any, Any, dict[str, Any]]]] = {
            "expansions": lambda: expansions(folder, repeats, execute=False),
            "sandbox": lambda: expansions(folder, repeats, execute=True),
            "growth": lambda: growth(repeats),
            "memory": lambda: memory(folder),
            "simulated": lambda: simulated(folder, repeats),
            "engine": lambda: real_engine(folder, engine, tokens, repeats),
            "hf": lambda: over_generate(folder, repeats),
        }
        for part, measurement in measurements.items():
            if part in parts:
                print(f"{part} ...", file=sys.stderr, flush=True)
                figures = await measurement()
                print(json.dumps(rounded(figures)), file=sys.stderr, flush=True)
                found |= figures
    return found | {"cores": len(os.sched_getaffinity(0)), "load_at_start": load, "repeats": repeats}


def rounded(value: Any) -> Any:
    """Four significant digits all the way down."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object (else one line per figure)")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure: " + ", ".join(PARTS))
    parser.add_argument("--engine", choices=("vllm", "hf"), default="vllm", help="of engine_efficiency")
    parser.add_argument("--tokens", type=int, default=30_000, help="of engine_efficiency, over all repeats")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--only {arguments.only}: choose among {', '.join(PARTS)}")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line does, before torch is loaded
    found = rounded(asyncio.run(measure(parts, arguments.engine, arguments.tokens, arguments.repeats)))
    if arguments.json:
        print(json.dumps(found))
    else:
        for key, value in found.items():
            print(f"{key:38} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
