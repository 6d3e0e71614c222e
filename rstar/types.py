"""The words of the system as data: problems, steps, executions, trajectories, rows, terminal reasons, user errors.

Nothing here computes and nothing here imports the rest of the project. Everything that crosses a module border is one
of these frozen dataclasses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class UserError(Exception):
    """A mistake the user can mend. The command line prints it without a traceback and exits with code 2.

    Say what was got, what was needed, and how to mend it, each in a few words.
    """

    def __init__(self, got: str, *, need: str = "", how: str = "") -> None:
        self.got, self.need, self.how = got, need, how
        super().__init__("; ".join(part for part in (got, need and f"need {need}", how) if part))


@dataclass(frozen=True)
class Problem:
    """One question with its reference answer."""

    id: str
    question: str
    answer: str  # reference answer as text, never shown to a model
    source: str = ""  # where it comes from: a family of a generator, a benchmark's name
    level: str = ""  # difficulty as text ("1" is easiest); the unit of the "solved by level" table
    solution: str = ""  # worked solution if the data has one; only warm-up and baselines read it
    category: str = ""  # kind of task, for which Orca 2 chooses a strategy; a generated problem's label


class StepKind(StrEnum):
    """Which delimiter closed a step."""

    STEP = "step"  # <end_of_step>: thought and code, more to come
    CODE = "code"  # <end_of_code>: the last code, its printed output is shown to the policy
    ANSWER = "answer"  # <end_of_answer>: the final answer, a terminal


@dataclass(frozen=True)
class Step:
    """One parsed step of a solution."""

    kind: StepKind
    text: str  # exactly what the model wrote, closing delimiter included
    code: str | None = None  # what is run; None where the step has nothing to run
    answer: str | None = None  # last balanced \\boxed{} of an answer step


class ExecutionStatus(StrEnum):
    """How a run of untrusted code ended. Everything but OK makes the step a code_error."""

    OK = "ok"
    ERROR = "error"  # raised an exception, or did not compile
    TIMEOUT = "timeout"  # used up its CPU time (or the wall-clock backstop)
    MEMORY = "memory"  # ran out of its memory allowance
    OUTPUT_LIMIT = "output_limit"  # printed more than allowed
    DENIED = "denied"  # tried something the sandbox forbids
    KILLED = "killed"  # ended by a signal or left early


@dataclass(frozen=True)
class Execution:
    """What one run of a step's code did. `stdout` is exactly what this step printed, never rounded or altered."""

    status: ExecutionStatus
    stdout: str = ""
    error: str = ""  # one line, empty when status is OK
    cpu_ms: float = 0.0  # CPU time of this step alone


class TerminalReason(StrEnum):
    """Why a node has no continuation."""

    ANSWER = "answer"  # an answer step; reward +1/-1 from the grader in data generation
    CODE_ERROR = "code_error"  # its code failed; filtered, kept as a record, never backed up
    MALFORMED = "malformed"  # unparsable, cut off, empty, or imitates our delimiters; never backed up
    MAX_DEPTH = "max_depth"  # depth limit reached without an answer; reward -1
    DEAD_END = "dead_end"  # an expansion gave no live child, no answer and no max_depth; reward -1


@dataclass(frozen=True)
class PromptText:
    """A prompt as segments. Engines and trainers tokenise each segment by itself and concatenate the ids, so the ids of
    a path are a prefix of the ids of every continuation (prefix-stable step borders, prefix caches hit)."""

    segments: tuple[str, ...]

    @property
    def text(self) -> str:
        return "".join(self.segments)

    def plus(self, *segments: str) -> PromptText:
        return PromptText(self.segments + segments)


@dataclass(frozen=True)
class Trajectory:
    """One root-to-answer path of a tree, read by the extractors."""

    tree_id: str
    node_ids: tuple[int, ...]  # root excluded, answer node included
    segments: tuple[tuple[str, bool], ...]  # rendered path: (text, whether the model wrote it)
    q_values: tuple[float, ...]  # in [-1, 1], one per node
    answer: str
    reward: float  # +1 or -1
    codes: tuple[str, ...] = ()  # what was run, in order
    multiplicity: float = 1.0  # mean over the steps: samples that had exactly a step's text
    logprob: float = float("-inf")  # natural log of the path's probability under the policy; -inf where unknown
    clean: bool = True  # the answer step holds nothing but the answer's sentence (rstar.prompts.clean_answer)

    @property
    def mean_q(self) -> float:
        """Mean Q over the steps, in [-1, 1]."""
        return sum(self.q_values) / len(self.q_values)


@dataclass(frozen=True)
class SftRow:
    """A row of supervised fine-tuning: columns `prompt, completion` as the ecosystem reads them.

    `segments` are the completion cut at its step borders; each is (text, whether the model wrote it). Concatenated they
    equal `completion`; the loss is on the model's own segments only.
    """

    prompt: str
    completion: str
    segments: tuple[tuple[str, bool], ...]
    problem_id: str
    tree_id: str
    node_ids: tuple[int, ...]
    weight: float = 1.0
    prompt_segments: tuple[str, ...] = ()  # token borders inside `prompt`; empty: the prompt is one segment


@dataclass(frozen=True)
class PreferenceRow:
    """A pair for the PPM: columns `prompt, chosen, rejected`. Segments are token borders as in SftRow (all scored)."""

    prompt: str
    chosen: str
    rejected: str
    prompt_segments: tuple[str, ...]
    chosen_segments: tuple[str, ...]
    rejected_segments: tuple[str, ...]
    q_margin: float  # Q(chosen) - Q(rejected), in (0, 2]
    weight: float  # 1 / (pairs that survive the filters at this prefix)
    kind: str  # "step" (siblings) or "answer" (whole trajectories); of a flow: the role "answer" or "stop"
    problem_id: str
    tree_id: str
    node_ids: tuple[int, ...]  # (chosen's last node, rejected's last node)
    chosen_ends: bool = False  # of a flow: the model ended here by itself, so an end token follows
    rejected_ends: bool = False


@dataclass(frozen=True)
class QValueRow:
    """A completion with the Q-value of every step (Q regression, the paper's PQM): columns `prompt, completion`.

    `steps` are the token borders: the segments each step adds to the path, what we write after it included. Joined they
    equal `completion`. The path that ends with steps[i] is scored against q_values[i].
    """

    prompt: str
    completion: str
    steps: tuple[tuple[str, ...], ...]
    q_values: tuple[float, ...]  # in [-1, 1], one per step
    problem_id: str
    tree_id: str
    node_ids: tuple[int, ...]  # one per step
    prompt_segments: tuple[str, ...] = ()  # as in SftRow


@dataclass(frozen=True)
class OutcomeRow:
    """A labelled completion: columns `prompt, completion, label` (outcome verifiers, ORM)."""

    prompt: str
    completion: str
    segments: tuple[tuple[str, bool], ...]
    label: float  # 1.0 correct, 0.0 wrong; soft labels in between are allowed
    problem_id: str
    tree_id: str
    node_ids: tuple[int, ...]
    prompt_segments: tuple[str, ...] = ()  # as in SftRow
    weight: float = 1.0  # samples that were exactly this


@dataclass(frozen=True)
class SamplingParams:
    """How a policy samples. Lengths are in tokens."""

    n: int = 1
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    calculator: bool = False  # write the results of `<<48/2=` annotations for the model (rstar.calculator)
    seed: int = 0  # honoured by the simulated engine only; real engines are not batch-invariant
    adapter: str | None = None  # name of a LoRA adapter the engine has loaded


@dataclass(frozen=True)
class Generation:
    """One sample of a policy."""

    text: str  # ends with the stop string where one was met
    tokens: int  # generated tokens, the paid ones
    logprob: float  # sum of the sampled tokens' log-probabilities (natural log, temperature 1); nan if unknown
    stop: str | None  # the stop string that ended it; None: end of sequence or cut off
    cut_off: bool  # ended by max_tokens


@dataclass(frozen=True)
class TrainProgress:
    """One optimizer step of a training, as progress displays hear of it."""

    step: int  # steps done
    steps: int  # steps in all
    loss: float
    tokens: int  # tokens that went through the model in this step
    seconds: float  # of this step


@dataclass
class Usage:
    """What a stretch of work paid for; adds up."""

    generated_tokens: int = 0
    prompt_tokens: int = 0
    engine_calls: int = 0
    scored: int = 0

    def add(self, other: Usage) -> None:
        self.generated_tokens += other.generated_tokens
        self.prompt_tokens += other.prompt_tokens
        self.engine_calls += other.engine_calls
        self.scored += other.scored


JsonScalar = str | int | float | bool | None
JsonValue = JsonScalar | list["JsonValue"] | Mapping[str, "JsonValue"]
