"""What computing shared prefixes once is worth: plain rows against packed trees, same loss, same gradients.

    python -m tests.benchmarks.training [--json] [--trees FOLDER [--model FOLDER]] [--problems 12] [--repeats 2]

Rows are extracted as in a round, from the trees of an MCTS with SmolLM2-135M-Instruct: those of the folder given with
--trees, else of a search with 8 rollouts of 8 candidates after the quickstart's warm-up. That search is made once (ten
minutes on two cores) and kept in the cache folder; it goes on where it was stopped. Rows are tokenised and trained with
the policy of that search. Plain rows run without padding, so the figures are what sharing alone gives.

Prints `ppm_tree_speedup` and `sft_tree_speedup` (seconds of plain rows over seconds of packed trees, forward and
backward; `_cpu`: the same in CPU seconds, which other load on the machine disturbs less), `tokens_flat_over_packed`,
`max_loss_diff`, `max_grad_diff` (absolute, over all parameters). With CUDA it runs flex attention in bfloat16 and adds
the model FLOPs utilisation.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rstar.config import PpmSection, TrainSection, load
from rstar.extract.preferences import preference_rows
from rstar.extract.sft import sft_rows
from rstar.manifest import run_dir
from rstar.recipes import rstar_math
from rstar.run import Artifact, Run, Stage
from rstar.store import cache_folder, read_trees
from rstar.tokens import SegmentEncoder, load_tokenizer
from rstar.training.batching import MicroBatch, micro_batches
from rstar.training.data import EncodedRow, encode_pair, encode_rows, encode_sft
from rstar.training.loop import LossModule
from rstar.training.models import load_policy, load_ppm, smollm2_checkpoint
from rstar.training.packing import FLEX_BLOCK
from rstar.training.ppm import ScoreLoss
from rstar.training.sft import TokenLoss
from rstar.tree import Tree

PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12}  # dense FLOP/s, the makers' figures


QUICKSTART = Path(__file__).parents[2] / "configs/rstar_math/quickstart.yaml"
SETTINGS = ["cluster.address=inline", "search.rollouts=8", "search.candidates=8", "search.answer_candidates=0"]


def searched() -> tuple[Path, Path]:
    """Folder of the trees of the quickstart's first round, searched longer, and their policy; made where missing."""
    run = cache_folder() / "benchmarks" / "training"
    families = load(rstar_math.Config, QUICKSTART).problems.families
    fewer = [f"problems.families.{name}.count=2" for name in families]
    config = load(rstar_math.Config, QUICKSTART, [f"run.dir={run}", *SETTINGS, *fewer])
    made = run_dir(config.run)

    def act(stage: Stage) -> Artifact:
        if (stage.round.number, stage.name) in ((0, "base"), (1, "search")) and stage.finished() is None:
            stage.execute()
        return stage.artifact()

    rstar_math.RECIPE.function(Run(made.path, act), config)
    return made.round(1).trees, made.round(0).policy


@dataclass
class Pass:
    """One forward and backward of all rows."""

    tokens: int
    loss: float
    gradients: dict[str, Tensor]
    seconds: float
    cpu_seconds: float


def forward_backward(module: LossModule, batches: list[MicroBatch], device: torch.device) -> Pass:
    module.zero_grad()
    module.train()
    moved = [batch.to(device) for batch in batches]
    if device.type == "cuda":
        torch.cuda.synchronize()
    began, cpu = time.perf_counter(), time.process_time()
    total = 0.0
    for batch in moved:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = module(batch)
        loss.backward()
        total += float(loss.detach())
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return Pass(sum(batch.tokens for batch in batches), total, gradients, seconds, cpu)


def measure(module: LossModule, rows: list[EncodedRow], *, budget: int, repeats: int) -> dict[str, float]:
    """Best of `repeats` passes each, in turn, so that both meet the same load."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module.to(device)
    multiple_of = FLEX_BLOCK if device.type == "cuda" else 1
    best: dict[bool, Pass] = {}
    for repeat in range(repeats + (device.type == "cuda")):
        for packing in (True, False):
            (batches,) = micro_batches(rows, budget, tree_packing=packing, multiple_of=multiple_of)
            done = forward_backward(module, batches, device)
            done.gradients = {name: grad.cpu() for name, grad in done.gradients.items()} if repeat == 0 else {}
            if packing not in best:
                best[packing] = done
            elif repeat == 1 and device.type == "cuda":  # the first pass compiled
                best[packing].seconds, best[packing].cpu_seconds = done.seconds, done.cpu_seconds
            else:
                best[packing].seconds = min(best[packing].seconds, done.seconds)
                best[packing].cpu_seconds = min(best[packing].cpu_seconds, done.cpu_seconds)
    packed, flat = best[True], best[False]
    differences = [float((packed.gradients[name] - grad).abs().max()) for name, grad in flat.gradients.items()]
    figures = {
        "rows": len(rows),
        "tokens_packed": packed.tokens,
        "tokens_flat": flat.tokens,
        "tokens_flat_over_packed": round(flat.tokens / packed.tokens, 2),
        "tree_speedup": round(flat.seconds / packed.seconds, 2),
        "tree_speedup_cpu": round(flat.cpu_seconds / packed.cpu_seconds, 2),
        "packed_tokens_per_second": round(packed.tokens / packed.seconds, 1),
        "loss": round(packed.loss, 6),
        "max_loss_diff": abs(packed.loss - flat.loss),
        "max_grad_diff": max(differences),
        "max_grad": max(float(grad.abs().max()) for grad in flat.gradients.values()),
    }
    peak = next((v for k, v in PEAK_BF16.items() if device.type == "cuda" and k in torch.cuda.get_device_name()), None)
    if peak:
        weights = sum(p.numel() for p in module.parameters())
        figures["model_flops_utilisation"] = round(6 * weights * packed.tokens / packed.seconds / peak, 4)
    return figures


def run(trees: list[Tree], model: Path, *, budget: int, repeats: int) -> dict[str, float]:
    """All figures, those of the PPM under `ppm_`, of the policy under `sft_`."""
    encoder = SegmentEncoder(load_tokenizer(model))
    problems: dict[str, list[Tree]] = {}
    for tree in trees:
        problems.setdefault(tree.problem.id, []).append(tree)
    solutions = [row for group in problems.values() for row in sft_rows(group)]
    pairs = [row for tree in trees for row in preference_rows(tree)]
    assert solutions and pairs, "the trees hold no rows: search more problems"
    torch.manual_seed(0)
    tasks: dict[str, Callable[[], tuple[LossModule, list[EncodedRow]]]] = {
        "sft": lambda: (
            TokenLoss(load_policy(str(model), TrainSection(), encoder.tokenizer).model),
            encode_rows(solutions, encode_sft, encoder, 4096),
        ),
        "ppm": lambda: (
            ScoreLoss(load_ppm(str(model), PpmSection(), encoder.tokenizer).model, PpmSection()),
            encode_rows(pairs, encode_pair, encoder, 4096),
        ),
    }
    figures: dict[str, float] = {"trees": len(trees)}
    for name, make in tasks.items():
        module, rows = make()
        found = measure(module, rows, budget=budget, repeats=repeats)
        figures |= {f"{name}_{key}": value for key, value in found.items()}
    for key in ("max_loss_diff", "max_grad_diff"):
        figures[key] = max(figures[f"sft_{key}"], figures[f"ppm_{key}"])
    packed, flat = (sum(figures[f"{name}_tokens_{kind}"] for name in tasks) for kind in ("packed", "flat"))
    figures["tokens_flat_over_packed"] = round(flat / packed, 2)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--trees", type=Path, help="folder with trees-*.jsonl.zst of a search")
    parser.add_argument("--model", type=Path, help="model to train on those trees (default SmolLM2)")
    parser.add_argument("--problems", type=int, default=12, help="trees to use, of those with both outcomes")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    arguments = parser.parse_args()
    if arguments.trees:
        folder, model = arguments.trees, arguments.model or smollm2_checkpoint(cache_folder())
    else:
        with contextlib.redirect_stdout(sys.stderr):  # progress lines
            folder, model = searched()
    trees = [tree for tree in read_trees(folder) if len({node.reward for node in tree.answers()}) > 1][
        : arguments.problems
    ]
    figures = run(trees, model, budget=arguments.micro_batch_tokens, repeats=arguments.repeats)
    if arguments.json:
        print(json.dumps(figures))
    else:
        for key, value in figures.items():
            print(f"{key:32} {value:g}")


if __name__ == "__main__":
    main()
