"""Plain expert iteration, a recipe of one's own: sample solutions, keep correct ones, fine-tune the base on them.

python docs/examples/expert_iteration.py docs/examples/expert_iteration.yaml [key=value ...]
"""

import sys
from dataclasses import dataclass, field
from typing import Any

from rstar.config import (
    ClusterSection,
    EngineSection,
    EvalSection,
    ExtractSection,
    ModelSection,
    ProblemsSection,
    RunSection,
    SandboxSection,
    SearchSection,
    TrainSection,
    WarmupSection,
)
from rstar.recipes.base_model import prepare_base
from rstar.recipes.evaluation import evaluate
from rstar.recipes.rstar_math import extract, search, train_policy
from rstar.recipes.training import warm_up_training
from rstar.run import Run, main


@dataclass(frozen=True)
class Config:
    """What this recipe reads."""

    run: RunSection = field(default_factory=RunSection)
    cluster: ClusterSection = field(default_factory=ClusterSection)
    model: ModelSection = field(default_factory=ModelSection)
    engine: EngineSection = field(default_factory=EngineSection)
    sandbox: SandboxSection = field(default_factory=SandboxSection)
    problems: ProblemsSection = field(default_factory=ProblemsSection)
    warmup: WarmupSection = field(default_factory=WarmupSection)
    search: SearchSection = field(default_factory=lambda: SearchSection(method="sample"))
    extract: ExtractSection = field(default_factory=lambda: ExtractSection(sft_by="random"))
    sft: TrainSection = field(default_factory=TrainSection)
    eval: EvalSection = field(default_factory=lambda: EvalSection(methods=["greedy"]))
    rounds: dict[str, Any] = field(default_factory=dict)


def expert_iteration(run: Run, config: Config) -> None:
    """Sample, keep what is correct, fine-tune; again with the new policy."""
    c = config
    where = (c.engine, c.sandbox, c.cluster)
    sft = warm_up_training(c.sft, c.warmup)
    policy = base = run.round(0, c).stage(
        prepare_base, c.model, c.problems, c.warmup, sft, c.sandbox, c.run.seed, name="base"
    )
    for rnd, c in run.rounds(config):
        samples = rnd.stage(search, c.search, c.problems, c.model, policy, None, *where)
        rows = rnd.stage(extract, c.extract, "pairwise", samples, None, None)
        policy = rnd.stage(train_policy, c.sft, rows, base, c.model, c.run.seed, name="policy")
        rnd.stage(evaluate, policy, None, c.eval, c.search, c.problems, c.model, *where, name="eval")


if __name__ == "__main__":
    sys.exit(main(expert_iteration, Config))
