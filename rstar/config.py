"""Frozen section dataclasses and `load(schema, path, overrides) -> dataclass`.

A recipe composes sections into its own schema. YAML files and `key=value` overrides are checked against the schema: an
unknown key or a wrong type is a UserError that names the key, what was expected, and the nearest valid key.
Per-round settings are overlays by string key: `rounds.r2.search.rollouts=16`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

from omegaconf import DictConfig, OmegaConf

from rstar.overrides import file_layers, merge, override_node, resolve_inputs, schema_node, to_object
from rstar.types import UserError
from rstar.values import check_values

T = TypeVar("T")

HOW: Mapping[str, Any] = {"shapes": False}
"""Marks a setting that says how a stage is run, not what it makes: it may change within a run. A section of such
settings names the others in `compared`."""
INPUT: Mapping[str, Any] = {"input": True}
"""Marks a setting that names input files: two values are the same where the contents are."""


@dataclass(frozen=True)
class RunSection:
    """Which run this is and where it lives."""

    name: str = "run"
    dir: str = ""  # folder of the run; empty: runs/<name>
    rounds: int = 4
    seed: int = 0


@dataclass(frozen=True)
class ClusterSection:
    """Where search workers run."""

    compared: ClassVar[tuple[str, ...]] = ()  # where a stage runs changes nothing that it makes

    address: str = "inline"  # inline: this process; local: Ray on this machine; auto or host:port: join a Ray cluster
    workers: int = 1  # search workers, each with its own engines and sandbox
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    max_failures: int = 3  # workers that may die over the same problem before the stage stops
    max_failure_rate: float = 0.25  # share of steps that may time out, or be lost with a worker, before it stops


@dataclass(frozen=True)
class ModelSection:
    """The policy's base model."""

    base: str = field(
        default="???", metadata=INPUT
    )  # a folder or a hub id; "smollm2" is the registry package's SmolLM2-135M-Instruct
    template: str = (
        "chat"  # chat: the tokenizer's chat template; slm: rStar-Math's own prompt; else a text with {question}
    )
    system: str = ""  # system message of the chat template; where the template is a text, its first paragraph
    step_tokens: bool = False  # add the step delimiters to the vocabulary (the base of all rounds is then a copy)
    few_shot: str = field(
        default="", metadata=INPUT
    )  # a YAML file of worked examples put before the question (bootstrap policies)


@dataclass(frozen=True)
class EngineSection:
    """What generates and scores."""

    compared: ClassVar[tuple[str, ...]] = ("kind", "model")  # the others say how fast and where

    kind: str = "hf"  # hf, vllm, openai, simulated
    dtype: str = "auto"  # auto, float32, bfloat16, float16
    device: str = "auto"  # auto, cpu, cuda, cuda:1 (the first GPU to use, of those this worker sees)
    scorer_device: str = ""  # of the PPM, as `device`; empty: the policy's
    max_batch: int = 64  # sequences decoded together
    max_context: int = 2048  # tokens, prompt and continuation together
    threads: int = 0  # CPU threads of the model; 0: all cores
    cache_mib: int = 2048  # KV cache kept for prefixes (hf) or KV space (vllm on CPU)
    score_batch_tokens: int = 4096  # tokens in one forward pass of the scorer
    url: str = ""  # openai: base URL, ".../v1"
    model: str = ""  # openai: model name on the server; simulated: worked_teacher, else the solver of sums
    api_key_env: str = "OPENAI_API_KEY"  # openai: the environment variable that holds the key
    concurrency: int = 64  # openai: requests in flight
    timeout: float = 600.0  # openai: seconds for one request
    retries: int = 6  # openai: tries after 429, 5xx, time-outs
    gpu_memory: float = 0.45  # vllm on GPU: share of memory for the policy; the scorer gets the same share
    tensor_parallel: int = 1  # vllm on GPU
    tokens_per_second: float = 0.0  # simulated: throughput model; 0: instant


@dataclass(frozen=True)
class BootstrapSection:
    """Who writes round 1's solutions in place of the base model, which is still what round 1's policy starts from."""

    enabled: bool = False
    engine: EngineSection = field(default_factory=lambda: EngineSection(kind="openai"))
    model: ModelSection = field(default_factory=lambda: ModelSection(base=""))  # base: only for its chat template


@dataclass(frozen=True)
class SandboxSection:
    """Bounds on untrusted code. Times in seconds of one step."""

    compared: ClassVar[tuple[str, ...]] = ()  # bounds only; a tree names the sandbox that it was grown with

    cpu_seconds: float = 5.0
    wall_seconds: float = 30.0  # backstop only: time-outs are decided on CPU time
    memory_mib: int = 512
    output_kib: int = 64
    processes: int = 0  # zygotes; 0: one per core, at most 4
    unsafe_local_exec: bool = False  # run without the locks where a host has none; says what is lost


@dataclass(frozen=True)
class ProblemsSection:
    """Training pool and held-out set."""

    name: str = "reasoning_gym"  # reasoning_gym, or a benchmark's name (gsm8k, math, ...), or "file"
    path: str = field(
        default="", metadata=INPUT
    )  # local json/jsonl/parquet/csv; needed for "file", overrides the hub for benchmarks
    question: str = "question"  # field names in the file
    answer: str = "answer"
    answers: str = ""  # field with the answers (or solutions) of several attempts: its problems are synthetic
    min_agreement: int = 3  # so many of them must agree, else a synthetic problem is dropped
    level: str = "level"  # field with the difficulty
    category: str = "category"  # field with the kind of task (orca2)
    split: str = "train"
    limit: int = 0  # use the first N after de-duplication; 0: all
    heldout: int = 64  # problems kept apart for evaluation; of families, of those that name no number of their own
    heldout_path: str = field(default="", metadata=INPUT)  # a file of its own for the held-out set
    families: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # reasoning_gym: label -> {family, level, count, heldout, settings}
    levels: list[str] = field(default_factory=list)  # keep only these levels; empty: all
    decontaminate: list[str] = field(
        default_factory=list, metadata=INPUT
    )  # benchmarks or files whose problems are removed from the pool
    seed: int = 1


@dataclass(frozen=True)
class WarmupSection:
    """A small supervised start for base models that cannot follow the step format at all. Off in the paper's recipe."""

    enabled: bool = False
    source: str = "families"  # families: fresh problems of the pool's families; pool: the pool's own; gsm8k: needs path
    families: dict[str, int] = field(default_factory=dict)  # label of problems.families -> rows
    path: str = field(default="", metadata=INPUT)  # GSM8K's train.jsonl
    rows: int = 0  # at most so many; 0: all
    epochs: int = 2
    learning_rate: float = 1e-4
    batch_size: int = 8


@dataclass(frozen=True)
class SearchSection:
    """How a tree is grown."""

    method: str = "mcts"  # mcts, beam, dvts, sample, flow
    rollouts: int = 16
    escalate: list[int] = field(
        default_factory=list
    )  # problems without a correct answer get this many rollouts beyond `rollouts`, in steps: [64, 128] adds 128 in all
    second_pass: int = 0  # rollouts of a fresh tree, with the next seed, for problems that are unsolved after all that
    candidates: int = 8  # samples per expansion
    answer_candidates: int = 0  # samples of the answer step, which mostly copies the printed output; 0: as candidates
    temperature: float = 1.0
    top_p: float = 1.0
    max_depth: int = 16  # steps, the answer step counts
    max_step_tokens: int = 256
    form: str = "steps"  # steps: executed code steps; text: solutions in words, methods sample and flow only
    # stated: words of any form that state an answer (grading.extract_answer), method sample only
    calculator: bool = False  # results of `<<48/2=` annotations are written for the model
    chain_temperature: float = 0.0  # of flow: of all but the deviations, which are drawn at `temperature`
    deviations: bool = True  # of flow: one at each output of the base chain; false: the base chain alone
    c: float = 2.0  # exploration constant of UCT
    selection: str = "uct"  # uct or puct
    unvisited_first: bool = True  # UCT is infinite at N = 0; false: 0, as in the official code (D1)
    back_up_dead_ends: bool = True  # false: a dead end's -1 stays with its node (as in the official code, D3)
    back_up_max_depth: bool = True  # false: the same for max_depth (D4)
    drop_failed_steps: bool = (
        True  # only steps whose code runs are kept; false: without output, and never run again (D20)
    )
    first_answer_only: bool = False  # an expansion with an answer keeps its first and nothing else (official code, D5)
    use_ppm: bool = False  # PPM-augmented instead of terminal-guided
    ppm: str = field(default="", metadata=INPUT)  # folder of that PPM; empty: the one of the round before
    beam_width: int = 8  # of beam: nodes kept at each depth; dvts splits it into beam_width / candidates subtrees
    ppm_prior_visits: int = 1  # 1: the PPM's value is a new child's first visit; 0: kept outside N
    rollouts_in_flight: int = 1  # walks of one tree at once (virtual loss); 1 is the reference
    trees_in_flight: int = field(default=32, metadata=HOW)  # problems searched at once by a worker
    seeds: list[int] = field(default_factory=lambda: [0])  # one tree per problem and seed
    checkpoint_rollouts: int = field(
        default=0, metadata=HOW
    )  # save an unfinished tree after so many rollouts; 0: only when its search is done


@dataclass(frozen=True)
class ExtractSection:
    """Which rows are taken from the trees (rStar-Math section 3.4 and code)."""

    merge_seeds: bool = True  # a problem's trees of several seeds are merged by prefix before rows are taken
    sft_top: int = 2  # correct trajectories kept per problem
    sft_by: str = "mean_q"  # which: mean_q, or random (the rival of rStar-Math's Table 7)
    min_synthetic_accuracy: float = 0.5  # synthetic problems with a smaller share of correct answers give no SFT row
    positives: int = 2  # per prefix
    negatives: int = 2
    widen_pairs: bool = True  # where one side of a prefix has a single step, the other may give twice as many
    min_margin: float = 0.5  # Q(chosen) - Q(rejected); code only, the paper has none
    min_edit_distance: int = 20  # characters between two steps; code only
    answer_pairs: bool = True  # final-answer pairs across trajectories
    max_pairs_per_problem: int = 0  # 0: no cap


@dataclass(frozen=True)
class TrainSection:
    """Shared by the policy's SFT and the PPM."""

    epochs: float = 2
    learning_rate: float = 7e-6
    schedule: str = "linear"  # linear, cosine, constant
    warmup_ratio: float = 0.0
    weight_decay: float = 0.1
    batch_size: int = 128  # rows per optimizer step, over all processes
    micro_batch_tokens: int = field(default=4096, metadata=HOW)  # tokens in one forward pass of a process
    max_length: int = 4096  # tokens of a row
    max_grad_norm: float = 1.0
    tree_packing: bool = True  # compute shared prefixes once; false: one sequence a row
    tree_rows: int = 0  # rows of one tree that stay together in an optimizer step; 0: all, up to batch_size
    in_order: bool = False  # sequences are filled in the order of the shuffled rows (Orca 2); false: by first fit
    dtype: str = "auto"  # autocast dtype; weights stay float32
    gradient_checkpointing: bool = field(default=False, metadata=HOW)
    lora_rank: int = 0  # 0: full fine-tuning
    lora_alpha: int = 0  # 0: twice the rank
    lora_dropout: float = 0.0
    dropout: float = 0.0  # on what every attention and MLP block adds to the residual stream
    frozen_layers: int = 0  # the embeddings and so many of the lowest layers stay as they are (faster on a CPU)
    report_to: list[str] = field(default_factory=list, metadata=HOW)  # tensorboard, wandb
    processes: int = field(default=1, metadata=HOW)  # a training's processes, one per GPU
    launcher: str = "torchrun"  # what starts them: torchrun (on this node) or ray (Ray Train, on the cluster's nodes)
    fsdp: bool | None = None  # weights sharded over the processes, else whole in each; null: on GPUs without LoRA
    save_steps: int = field(default=0, metadata=HOW)  # checkpoints for resuming; 0: only at the end


@dataclass(frozen=True)
class PpmSection(TrainSection):
    """The process preference model."""

    epochs: float = 1  # 0: the round trains no PPM
    batch_size: int = 512  # pairs per optimizer step
    score_scale: float = 5.0  # score = tanh(raw / scale)
    tanh_in_loss: bool = False
    margin: float = 0.0  # times a pair's Q margin: by how much its scores are to differ at least; the paper has none
    loss: str = "pairwise"  # pairwise (PPM), mse (PQM), bce (ORM)
    heldout: float = 0.05  # share of problems kept for pair accuracy


@dataclass(frozen=True)
class VerifierSection(TrainSection):
    """The outcome verifier."""

    epochs: float = 1
    learning_rate: float = 1e-5
    init: str = "generator"  # generator, base, or a model folder or hub id of another size
    level: str = "token"  # token: a value after every token of a solution; solution: after its last one
    lm_weight: float = 1.0  # of the language-model loss; 0: values only


@dataclass(frozen=True)
class DpoSection:
    """Online DPO of LoRA adapters; the reference is the model without its adapter (Flow-DPO appendix A)."""

    beta: float = 1.0
    learning_rate: float = 5e-6
    batch_size: int = 32  # pairs of one adapter's optimizer step
    micro_batch_tokens: int = 4096  # tokens in one forward pass
    max_length: int = 4096  # tokens of prompt and completion; a longer prompt loses its beginning
    max_grad_norm: float = 1.0
    lora_rank: int = 8
    lora_alpha: int = 8
    lora_dropout: float = 0.05
    dtype: str = "auto"  # autocast dtype; weights stay float32


@dataclass(frozen=True)
class EvalSection:
    """What each round is measured by, on the fixed held-out set."""

    methods: list[str] = field(default_factory=lambda: ["greedy", "mcts"])  # greedy, sample, beam, dvts, mcts
    problems: int = 0  # use the first N held-out problems; 0: all
    search_problems: int = 0  # the same for search methods
    samples: int = 8  # of method "sample": pass@k and maj@k
    rollouts: int = 4  # of method "mcts"
    candidates: int = 8
    temperature: float = 1.0
    trajectories: int = 1  # independent searches per problem
    top_k: int = 8  # voters among the trajectories, by PPM score

    def without_search(self) -> EvalSection:
        """The section with what only searches read at its defaults: for a round without a PPM to search with."""
        plain = EvalSection()
        own = ("rollouts", "candidates", "trajectories", "top_k", "search_problems")
        return dataclasses.replace(self, **{name: getattr(plain, name) for name in own})


def load(schema: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """Read a YAML file and `key=value` overrides into a frozen instance of `schema`.

    A YAML file may name another as `base: other.yaml` (relative to itself), whose values it overlays.
    Raises UserError for a missing file, broken YAML, an unknown key, or a value that no stage could use.
    """
    merged = schema_node(schema)
    for file, layer in file_layers(Path(path)) if path is not None else []:
        resolve_inputs(schema, layer, file)
        merged = merge(schema, merged, layer)
    for text in overrides:
        merged = merge(schema, merged, override_node(schema, text))
    config = to_object(schema, merged)
    check_values(config)
    rounds = getattr(config, "rounds", None)
    if isinstance(rounds, dict):
        for name in rounds:  # an overlay with a typo is found now, not in round 3
            if not (name[1:].isdigit() and name == f"r{int(name[1:])}"):
                raise UserError(f"rounds.{name}", need="round keys r1, r2, ...", how=f"write rounds.r1.{name}=...")
            if not isinstance(rounds[name], dict):
                raise UserError(f"rounds.{name}={rounds[name]}", need=f"settings: rounds.{name}.search.rollouts=8")
            check_values(for_round(config, int(name[1:])), f"rounds.{name}.")
    return config


def for_round(config: T, number: int) -> T:
    """The configuration of round `number`: its overlay `rounds.r<number>` merged onto the shared sections."""
    overlay = cast(Mapping[str, Any], getattr(config, "rounds", {})).get(f"r{number}")
    if not overlay:
        return config
    schema = type(config)
    merged = OmegaConf.merge(schema_node(schema), OmegaConf.create(to_dict(config)))
    return to_object(
        schema, merge(schema, cast(DictConfig, merged), OmegaConf.create(dict(overlay)), f"rounds.r{number}.")
    )


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dict of a config dataclass."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML, as `rstar config` prints it."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def digest(value: Any) -> str:
    """Short sha256 of a JSON-able value or dataclass; the identity of a stage's settings."""
    plain = to_dict(value) if dataclasses.is_dataclass(value) else value
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]


def recipe_name(path: str | Path) -> str:
    """The `recipe:` key of a config file or of the files it is based on; rstar_math where none names one."""
    for _, layer in reversed(file_layers(Path(path))):
        if "recipe" in layer:
            return str(layer["recipe"])
    return "rstar_math"
