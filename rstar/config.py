"""Frozen section dataclasses and `load(schema, path, overrides) -> dataclass`.

A recipe composes sections into its own schema. YAML files and `key=value` overrides are checked against the schema: an
unknown key or a wrong type is a UserError that names the key, what was expected, and the nearest valid key.
Per-round settings are overlays by string key: `rounds.r2.search.rollouts=16`.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

import yaml
from annotated_types import Ge, Gt, Le
from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError

from rstar.types import UserError

T = TypeVar("T")

MISSING = "???"  # a setting without a default

Count = Annotated[int, Ge(0)]
Positive = Annotated[int, Ge(1)]
NonNegative = Annotated[float, Ge(0)]
SearchMethod = Literal["mcts", "beam", "dvts", "sample", "flow"]
EvalMethod = Literal["greedy", "sample", "beam", "dvts", "mcts"]

HOW: Mapping[str, Any] = {"shapes": False}
"""Marks a setting that says how a stage is run, not what it makes: it may change within a run. A section of such
settings names the others in `compared`."""
INPUT: Mapping[str, Any] = {"input": True}
"""Marks a setting that names input files: two values are the same where the contents are."""


def input_or(*names: str) -> Mapping[str, Any]:
    """Marks as `INPUT` does a setting that also takes these names, which are no files even where such files are."""
    return {**INPUT, "names": names}


def named_file(field: dataclasses.Field[Any], value: str, folder: Path = Path()) -> Path | None:
    """The file or folder that a value of an `INPUT` field names, relative to `folder`; None where there is none."""
    path = folder / Path(value).expanduser()
    return path if value and value not in field.metadata.get("names", ()) and path.exists() else None


def _each_once(values: list[int]) -> list[int]:
    if not values or len(set(values)) < len(values):
        raise ValueError("one or more, each once")
    return values


@dataclass(frozen=True)
class RunSection:
    """Which run this is and where it lives."""

    name: str = "run"
    dir: str = ""  # folder of the run; empty: runs/<name>
    rounds: Count = 4
    seed: int = 0


@dataclass(frozen=True)
class ClusterSection:
    """Where search workers run."""

    compared: ClassVar[tuple[str, ...]] = ()  # where a stage runs changes nothing that it makes

    address: str = "inline"  # inline: this process; local: Ray on this machine; auto or host:port: join a Ray cluster
    workers: Positive = 1  # search workers, each with its own engines and sandbox
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    max_failures: int = 3  # workers that may die over the same problem before the stage stops
    max_failure_rate: float = 0.25  # share of steps that may time out, or be lost with a worker, before it stops


@dataclass(frozen=True)
class ModelSection:
    """The policy's base model."""

    base: str = field(
        default="???", metadata=input_or("smollm2", "tiny")
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

    kind: Literal["hf", "vllm", "openai", "simulated"] = "hf"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"  # auto, cpu, cuda, cuda:1 (the first GPU to use, of those this worker sees)
    scorer_device: str = ""  # of the PPM, as `device`; empty: the policy's
    max_batch: Positive = 64  # sequences decoded together
    max_context: Positive = 2048  # tokens, prompt and continuation together
    threads: int = 0  # CPU threads of the model; 0: all cores
    cache_mib: int = 2048  # KV cache kept for prefixes (hf) or KV space (vllm on CPU)
    score_batch_tokens: Positive = 4096  # tokens in one forward pass of the scorer
    url: str = ""  # openai: base URL, ".../v1"
    model: str = ""  # openai: model name on the server; simulated: worked_teacher, else the solver of sums
    api_key_env: str = "OPENAI_API_KEY"  # openai: the environment variable that holds the key
    concurrency: Positive = 64  # openai: requests in flight
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
    memory_mib: Positive = 512
    output_kib: Positive = 64
    processes: Count = 0  # zygotes; 0: one per core, at most 4
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
    source: Literal["families", "pool", "gsm8k"] = (
        "families"  # families: fresh problems of the pool's families; pool: the pool's own; gsm8k: needs path
    )
    families: dict[str, int] = field(default_factory=dict)  # label of problems.families -> rows
    path: str = field(default="", metadata=INPUT)  # GSM8K's train.jsonl
    rows: int = 0  # at most so many; 0: all
    epochs: int = 2
    learning_rate: float = 1e-4
    batch_size: int = 8


@dataclass(frozen=True)
class SearchSection:
    """How a tree is grown."""

    method: SearchMethod = "mcts"
    rollouts: Positive = 16
    # problems without a correct answer get this many rollouts beyond `rollouts`, in steps: [64, 128] adds 128 in all
    escalate: list[Positive] = field(default_factory=list)
    second_pass: Count = (
        0  # rollouts of a fresh tree, with the next seed, for problems that are unsolved after all that
    )
    candidates: Positive = 8  # samples per expansion
    answer_candidates: Count = 0  # samples of the answer step, which mostly copies the printed output; 0: as candidates
    temperature: NonNegative = 1.0
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    max_depth: Positive = 16  # steps, the answer step counts
    max_step_tokens: Positive = 256
    # steps: executed code steps; text: solutions in words, methods sample and flow only; stated: words of any form that
    # state an answer (rstar.grading), method sample only
    form: Literal["steps", "text", "stated"] = "steps"
    calculator: bool = False  # results of `<<48/2=` annotations are written for the model
    chain_temperature: float = 0.0  # of flow: of all but the deviations, which are drawn at `temperature`
    deviations: bool = True  # of flow: one at each output of the base chain; false: the base chain alone
    c: NonNegative = 2.0  # exploration constant of UCT
    selection: Literal["uct", "puct"] = "uct"
    unvisited_first: bool = True  # UCT is infinite at N = 0; false: 0, as in the official code (D1)
    drop_failed_steps: bool = (
        True  # only steps whose code runs are kept; false: without output, and never run again (D20)
    )
    use_ppm: bool = False  # PPM-augmented instead of terminal-guided
    ppm: str = field(default="", metadata=INPUT)  # folder of that PPM; empty: the one of the round before
    beam_width: Positive = 8  # of beam: nodes kept at each depth; dvts splits it into beam_width / candidates subtrees
    ppm_prior_visits: int = 1  # 1: the PPM's value is a new child's first visit; 0: kept outside N
    rollouts_in_flight: Positive = 1  # walks of one tree at once (virtual loss); 1 is the reference
    trees_in_flight: Positive = field(default=32, metadata=HOW)  # problems searched at once by a worker
    seeds: Annotated[list[int], AfterValidator(_each_once)] = field(default_factory=lambda: [0])  # one tree each
    # save an unfinished tree after so many rollouts, all ended; 0: only when it is done
    checkpoint_rollouts: Count = field(default=0, metadata=HOW)


@dataclass(frozen=True)
class ExtractSection:
    """Which rows are taken from the trees (rStar-Math section 3.4 and code)."""

    merge_seeds: bool = True  # a problem's trees of several seeds are merged by prefix before rows are taken
    sft_top: Count = 2  # correct trajectories kept per problem
    sft_by: Literal["mean_q", "random"] = "mean_q"  # which: mean_q, or random (the rival of rStar-Math's Table 7)
    min_synthetic_accuracy: float = 0.5  # synthetic problems with a smaller share of correct answers give no SFT row
    positives: Positive = 2  # per prefix
    negatives: Positive = 2
    widen_pairs: bool = True  # where one side of a prefix has a single step, the other may give twice as many
    min_margin: float = 0.5  # Q(chosen) - Q(rejected); code only, the paper has none
    min_edit_distance: int = 20  # characters between two steps; code only
    answer_pairs: bool = True  # final-answer pairs across trajectories
    max_pairs_per_problem: Count = 0  # 0: no cap


@dataclass(frozen=True)
class TrainSection:
    """Shared by the policy's SFT and the PPM."""

    epochs: NonNegative = 2
    learning_rate: NonNegative = 7e-6
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = 0.0
    weight_decay: float = 0.1
    batch_size: Positive = 128  # rows per optimizer step, over all processes
    micro_batch_tokens: Positive = field(default=4096, metadata=HOW)  # tokens in one forward pass of a process
    max_length: Positive = 4096  # tokens of a row; what is longer is cut off or dropped (training.data)
    max_grad_norm: float = 1.0
    tree_packing: bool = True  # compute shared prefixes once; false: one sequence a row
    tree_rows: Count = 0  # rows of one tree that stay together in an optimizer step; 0: all, up to batch_size
    in_order: bool = False  # sequences are filled in the order of the shuffled rows (Orca 2); false: by first fit
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of autocast; weights stay float32
    gradient_checkpointing: bool = field(default=False, metadata=HOW)
    lora_rank: Count = 0  # 0: full fine-tuning
    lora_alpha: int = 0  # 0: twice the rank
    lora_dropout: float = 0.0
    dropout: float = 0.0  # on what every attention and MLP block adds to the residual stream
    frozen_layers: Count = 0  # the embeddings and so many of the lowest layers stay as they are (faster on a CPU)
    report_to: list[str] = field(default_factory=list, metadata=HOW)  # tensorboard, wandb
    processes: Positive = field(default=1, metadata=HOW)  # a training's processes, one per GPU
    launcher: Literal["torchrun", "ray"] = (
        "torchrun"  # what starts them: torchrun (on this node) or ray (Ray Train, on the cluster's nodes)
    )
    fsdp: bool | None = None  # weights sharded over the processes, else whole in each; null: on GPUs without LoRA
    save_steps: Count = field(default=0, metadata=HOW)  # checkpoints for resuming; 0: only at the end


@dataclass(frozen=True)
class PpmSection(TrainSection):
    """The process preference model."""

    epochs: NonNegative = 1  # 0: the round trains no PPM
    batch_size: Positive = 512  # pairs per optimizer step
    score_scale: float = 5.0  # score = tanh(raw / scale)
    tanh_in_loss: bool = False
    loss: Literal["pairwise", "mse", "bce"] = "pairwise"  # pairwise (PPM), mse (PQM), bce (ORM)
    heldout: float = 0.05  # share of problems kept for pair accuracy


@dataclass(frozen=True)
class VerifierSection(TrainSection):
    """The outcome verifier."""

    epochs: NonNegative = 1
    learning_rate: NonNegative = 1e-5
    init: str = field(
        default="generator", metadata=input_or("generator", "base", "smollm2", "tiny")
    )  # generator, base, or a model folder or hub id of another size
    level: Literal["token", "solution"] = (
        "token"  # token: a value after every token of a solution; solution: after its last one
    )
    lm_weight: float = 1.0  # of the language-model loss; 0: values only


@dataclass(frozen=True)
class DpoSection:
    """Online DPO of LoRA adapters; the reference is the model without its adapter (Flow-DPO appendix A)."""

    beta: float = 1.0
    learning_rate: float = 5e-6
    batch_size: Positive = 32  # pairs of one adapter's optimizer step
    micro_batch_tokens: Positive = 4096  # tokens in one forward pass
    max_length: Positive = 4096  # tokens of prompt and completion; a longer pair is dropped
    max_grad_norm: float = 1.0
    lora_rank: Positive = 8
    lora_alpha: int = 8
    lora_dropout: float = 0.05
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of autocast; weights stay float32


@dataclass(frozen=True)
class EvalSection:
    """What each round is measured by, on the fixed held-out set."""

    methods: list[EvalMethod] = field(default_factory=lambda: ["greedy", "mcts"])
    problems: Count = 0  # use the first N held-out problems; 0: all
    search_problems: Count = 0  # the same for search methods
    samples: Positive = 8  # of method "sample": pass@k and maj@k
    rollouts: Positive = 4  # of method "mcts"
    candidates: Positive = 8
    temperature: NonNegative = 1.0
    trajectories: Positive = 1  # independent searches per problem
    top_k: Positive = 8  # voters among the trajectories, by PPM score

    def without_search(self) -> EvalSection:
        """The section with what only searches read at its defaults: for a round without a PPM to search with."""
        plain = EvalSection()
        own = ("rollouts", "candidates", "trajectories", "top_k", "search_problems")
        return dataclasses.replace(self, **{name: getattr(plain, name) for name in own})


# -- files and overrides ----------------------------------------------------------------------------------------------


def load(schema: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """Read a YAML file and `key=value` overrides into a frozen instance of `schema`.

    A YAML file may name another as `base: other.yaml` (relative to itself), whose values it overlays. Nothing in a text
    is interpolated. Raises UserError for a missing file, broken YAML, an unknown key, or a value that cannot be used.
    """
    merged = to_json(schema())
    for file, layer in file_layers(Path(path)) if path is not None else []:
        merge(schema, merged, spelled_out(schema, _beside(schema, layer, file.parent)))
    for text in overrides:
        merge(schema, merged, spelled_out(schema, _override(schema, text)))
    config = _validated(schema, merged)
    rounds = getattr(config, "rounds", None)
    for name in rounds if isinstance(rounds, dict) else ():  # an overlay with a typo is found now, not in round 3
        if not (name[1:].isdigit() and name == f"r{int(name[1:])}"):
            raise UserError(f"rounds.{name}", need="round keys r1, r2, ...", how=f"write rounds.r1.{name}=...")
        for_round(config, int(name[1:]))
    return config


def for_round(config: T, number: int) -> T:
    """The configuration of round `number`: its overlay `rounds.r<number>` merged onto the shared sections."""
    overlay = cast(Mapping[str, Any], getattr(config, "rounds", {})).get(f"r{number}")
    if overlay is None:
        return config
    where = f"rounds.r{number}"
    if not isinstance(overlay, Mapping):
        raise UserError(f"{where}={overlay}", need=f"settings: {where}.search.rollouts=8")
    merged = to_json(config)
    merge(type(config), merged, overlay, f"{where}.")
    return _validated(type(config), merged, f"{where}.")


def file_layers(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """(file, its settings) of a config file and of those it is based on, the lowest first."""
    if not path.is_file():
        raise UserError(f"no config file {path}", need="a YAML file", how="see configs/ for shipped ones")
    if path.resolve() in seen:
        raise UserError(f"{path} is its own base", need="a chain of `base:` files that ends")
    node = read_yaml(path)
    if not isinstance(node, dict):
        raise UserError(f"{path} holds no mapping", need="`section:` keys at the top level")
    base = node.pop("base", None)
    below = file_layers(path.parent / str(base), (*seen, path.resolve())) if base else []
    return [*below, (path, node)]


class _Loader(yaml.SafeLoader):
    """YAML in which a key that is given twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"{twice} is given twice", node.start_mark)
        return cast(dict[Any, Any], super().construct_mapping(node, deep))


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, {} where it is empty. Raises UserError with the line where it is not readable."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{place} is not readable YAML: {getattr(error, 'problem', None) or error}") from error


def recipe_name(path: str | Path) -> str:
    """The `recipe:` key of a config file or of the files it is based on; rstar_math where none names one."""
    for _, layer in reversed(file_layers(Path(path))):
        if "recipe" in layer:
            return str(layer["recipe"])
    return "rstar_math"


SHORTHANDS = {"problems": "name", "cluster": "address", "engine": "kind", "model": "base"}
"""`problems=gsm8k` means `problems.name=gsm8k`, and so on, where the key is a section."""


def merge(
    schema: Any,
    base: dict[str, Any],
    layer: Mapping[str, Any],
    prefix: str = "",
    path: str = "",
    known: Sequence[str] = (),
) -> None:
    """Lay `layer` over `base`, a whole config of `schema` as plain values.

    `prefix` stands before keys in messages, `path` is the section that `base` is, `known` are all keys of the config.
    Raises UserError for an unknown key, with the nearest one, and for a value in place of a section.
    """
    kinds = field_types(schema) if dataclasses.is_dataclass(schema) else None
    known = known or keys(schema)
    for key, value in layer.items():
        name = f"{path}{key}"
        if kinds is None:  # a free mapping: families, overlays
            base[key] = _merged_mapping(base.get(key), value)
            continue
        if key not in kinds:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            hint = f"the nearest key is {prefix}{near[0]}" if near else ""
            raise UserError(f"unknown key {prefix}{name}", need="a key of this recipe's config", how=hint)
        kind = kinds[key]
        if dataclasses.is_dataclass(kind) or isinstance(base.get(key), dict):
            if not isinstance(value, Mapping):
                raise UserError(f"{prefix}{name}={value}", need=_words(kind), how="see `rstar config FILE`")
            merge(kind, base[key], value, prefix, f"{name}.", known)
        else:
            base[key] = value


def spelled_out(schema: Any, layer: Mapping[str, Any]) -> dict[str, Any]:
    """The layer with what shorthands stand for, in overlays of rounds too."""
    kinds, made = field_types(schema), dict(layer)
    for name, value in layer.items():
        kind = kinds.get(name)
        if name == "rounds" and isinstance(value, Mapping):
            made[name] = {
                key: spelled_out(schema, one) if isinstance(one, Mapping) else one for key, one in value.items()
            }
        elif dataclasses.is_dataclass(kind):
            if isinstance(value, Mapping):
                made[name] = spelled_out(kind, value)
            elif name in SHORTHANDS:
                made[name] = {SHORTHANDS[name]: value}
    return made


def _merged_mapping(base: Any, value: Any) -> Any:
    if isinstance(base, Mapping) and isinstance(value, Mapping):
        return {**base, **{key: _merged_mapping(base.get(key), one) for key, one in value.items()}}
    return value


def _override(schema: type[Any], text: str) -> dict[str, Any]:
    """One `key=value` as a layer. What the schema takes as a text is the value as it stands, unless it is in quotes:
    YAML would see a mapping in {question} and nothing in an empty one."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override {text!r}", need="key=value", how="for example search.rollouts=16")
    parsed: Any = value
    if _kind(schema, key) is not str or value[:1] in ("'", '"') or value == "null":
        try:
            parsed = yaml.load(value, _Loader)
        except yaml.YAMLError as error:
            reason = getattr(error, "problem", None) or str(error).splitlines()[0]
            raise UserError(f"override {text!r} has an unreadable value: {reason}") from error
    for name in reversed(key.split(".")):
        parsed = {name: parsed}
    return cast(dict[str, Any], parsed)


def _beside(schema: type[Any], layer: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The layer of a file with the relative paths of input files (settings marked `INPUT`) made absolute where they are
    there in the file's own folder; the others stay relative to the working folder."""

    def found(field: dataclasses.Field[Any], value: Any) -> Any:
        if isinstance(value, list):
            return [found(field, one) for one in value]
        if isinstance(value, Mapping):
            return {key: found(field, one) for key, one in value.items()}
        path = named_file(field, value, folder) if isinstance(value, str) else None
        return str(path.resolve()) if path is not None else value

    def below(kind: Any, node: Mapping[str, Any]) -> dict[str, Any]:
        fields = {one.name: one for one in dataclasses.fields(kind)}
        kinds = field_types(kind)
        made = dict(node)
        for name in fields.keys() & node.keys():
            if fields[name].metadata.get("input"):
                made[name] = found(fields[name], node[name])
            elif dataclasses.is_dataclass(kinds[name]) and isinstance(node[name], Mapping):
                made[name] = below(kinds[name], node[name])
        return made

    made = below(schema, layer)
    if isinstance(overlays := made.get("rounds"), Mapping):
        made["rounds"] = {
            name: below(schema, one) if isinstance(one, Mapping) else one for name, one in overlays.items()
        }
    return made


@cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    """A tuple, because a dataclass by itself takes no configuration of pydantic's."""
    return TypeAdapter(tuple[schema], config=ConfigDict(coerce_numbers_to_str=True))


def _validated(schema: type[T], values: dict[str, Any], prefix: str = "") -> T:
    """The values as an instance of `schema`. Raises UserError that names the first setting that cannot be."""
    if values.get("model", {}).get("base") == MISSING:
        raise UserError(f"{prefix}model.base has no value", need="str", how=f"set it: {prefix}model.base=...")
    try:
        return cast(T, _adapter(cast(Any, schema)).validate_python((values,))[0])
    except ValidationError as error:
        first = error.errors()[0]
        key, context = ".".join(map(str, first["loc"][1:])), first.get("ctx", {})
        bounds = {"ge": "{} or more", "gt": "more than {}", "le": "at most {}"}
        need = next((words.format(f"{context[name]:g}") for name, words in bounds.items() if name in context), "")
        if first["type"] == "literal_error":
            need = f"one of {', '.join(typing.get_args(_kind(schema, key)) or [context['expected']])}"
        elif first["type"] == "value_error":
            need = str(context["error"])
        raise UserError(
            f"{prefix}{key}={first['input']}", need=need or _words(_kind(schema, key)), how="see `rstar config FILE`"
        ) from error


# -- reading a schema -------------------------------------------------------------------------------------------------


def field_types(schema: Any) -> dict[str, Any]:
    """The types of a dataclass's fields, without their bounds."""
    hints = typing.get_type_hints(schema)
    return {one.name: hints[one.name] for one in dataclasses.fields(schema)}


def keys(schema: Any, prefix: str = "") -> list[str]:
    """All dotted keys of a schema."""
    found: list[str] = []
    for name, kind in field_types(schema).items():
        found.append(prefix + name)
        if dataclasses.is_dataclass(kind):
            found.extend(keys(kind, f"{prefix}{name}."))
    return found


def _kind(schema: Any, key: str) -> Any:
    """The type of a dotted key, in a round's overlay too; of a list's item that of the items; None where there is no
    such key."""
    names = key.split(".")
    kind: Any = schema
    for name in names[2:] if names[0] == "rounds" else names:
        if dataclasses.is_dataclass(kind):
            kind = field_types(kind).get(name)
        else:
            kind = typing.get_args(kind)[0] if name.isdigit() and typing.get_args(kind) else None
    return kind


def _words(kind: Any) -> str:
    """What a setting takes, in words."""
    if dataclasses.is_dataclass(kind):
        return f"a section with {', '.join(field_types(kind))}"
    return str(getattr(kind, "__name__", kind)) if not typing.get_args(kind) else str(kind)


# -- plain values -----------------------------------------------------------------------------------------------------


def to_json(value: Any) -> Any:
    """A value as JSON: dataclasses as objects, paths as texts."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: to_json(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def only(section: T, *names: str) -> T:
    """The section with all settings but these at their defaults: what a stage reads of it."""
    plain: Any = type(section)()
    return cast(T, dataclasses.replace(plain, **{name: getattr(section, name) for name in names}))


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dict of a config dataclass."""
    return cast(dict[str, Any], to_json(config))


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML, as `rstar config` prints it."""
    return str(yaml.safe_dump(to_json(config), sort_keys=False, allow_unicode=True, width=120))


def digest(value: Any) -> str:
    """Short sha256 of a JSON-able value or dataclass; the identity of a stage's settings."""
    return hashlib.sha256(json.dumps(to_json(value), sort_keys=True, default=str).encode()).hexdigest()[:16]
