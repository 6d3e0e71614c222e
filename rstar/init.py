"""`rstar init DIR`: a config for own problems and an own model, each line explained, and problems to begin with."""

from __future__ import annotations

import json
from pathlib import Path

from rstar.types import UserError

PROBLEMS = (
    ("Calculate 7 * 12 - 59.", "25", "1"),
    ("Calculate (18 + 6) / 4 - 2.", "4", "1"),
    ("A baker fills 7 trays with 12 rolls each and sells 59 of them. How many rolls are left?", "25", "2"),
)

CONFIG = """\
# Four rounds of self-evolution on your problems, with your model:
#
#   rstar doctor {folder}/config.yaml              checks this machine, the problems, model and tokenizer
#   rstar evolve {folder}/config.yaml --dry-run    prints the plan of all rounds and what it may cost
#   rstar evolve {folder}/config.yaml              runs it; the same command resumes
#
# Input files are looked for beside this file, then in the folder where rstar is started. Every line can be overridden
# on the command line (search.rollouts=8), for one round too (rounds.r4.search.rollouts=8). What is not here has its
# default: rstar config {folder}/config.yaml
recipe: rstar_math
run:
  dir: "{folder}/run"  # trees, rows, models (round_04/policy, round_04/ppm) and report.html
  rounds: 4

model:
  base: smollm2  # yours: a folder or a hub id; smollm2 is SmolLM2-135M-Instruct from a package (extra quickstart)
  template: chat  # the tokenizer's chat template; slm: rStar-Math's own prompt; or a text with {{question}}
  step_tokens: true  # the step delimiters become tokens of its vocabulary

problems:
  name: file
  path: problems.jsonl  # json, jsonl, csv or parquet: a question and its final answer a record
  question: question  # the names of these fields in your file
  answer: answer
  level: level  # optional: difficulty, for the figures "solved by level"
  heldout: 1  # so many of the last problems measure each round and are never trained on; a few hundred are better
  decontaminate: []  # benchmarks or files whose problems are taken out of yours: [math500, gsm8k]
  families:  # generated problems, which only the warm-up below uses
    arithmetic: {{family: basic_arithmetic, settings: {{min_terms: 3, max_terms: 5, max_digits: 2}}}}
    words: {{family: gsm_symbolic}}

# A model that has never seen the step format is shown it on a few worked solutions of generated problems; every round's
# policy starts from there. Not needed where a large model writes the solutions of round 1 (the paper's way):
#   bootstrap: {{enabled: true, engine: {{kind: openai, url: "http://HOST:8000/v1", model: NAME}},
#               model: {{base: TOKENIZER, few_shot: configs/rstar_math/few_shot.yaml}}}}
warmup:
  enabled: true
  families: {{words: 16, arithmetic: 16}}  # solutions of each kind
  epochs: 2
  learning_rate: 2.0e-4  # for 135M parameters, as below; about 1e-5 suits a billion and more
  batch_size: 4

engine:
  kind: hf  # in this process, CPU or GPU; vllm: many times faster on a GPU
  max_context: 2048  # tokens of a prompt with its solution
cluster:
  address: inline  # local: Ray on this machine; auto or host:port: a Ray cluster
  workers: 1

search:
  rollouts: 8  # walks of a tree; the paper: 8, then 16
  candidates: 4  # steps sampled in each expansion; the paper: 5, 8, and 16 in round 4
  max_depth: 12  # steps of a solution
  max_step_tokens: 128
extract:
  min_margin: 0.5  # difference in Q of a preference pair; less gives more, noisier pairs
sft:
  epochs: 2
  learning_rate: 1.0e-4
  batch_size: 16
  micro_batch_tokens: 1024  # in one forward pass; a GPU takes 8192 and more
  max_length: 2048
ppm:
  epochs: 1
  learning_rate: 1.0e-4
  batch_size: 16
  micro_batch_tokens: 1024
  max_length: 2048
eval:
  methods: [greedy, mcts]
  rollouts: 4

rounds:  # what differs from round to round
  r3: {{search: {{use_ppm: true}}}}  # the PPM of the round before guides the search
  r4: {{search: {{use_ppm: true, candidates: 8, escalate: [16]}}}}  # problems still unsolved get 16 rollouts more
"""


def write_project(folder: Path) -> list[Path]:
    """Write config.yaml and problems.jsonl into `folder`. Raises UserError rather than replace a file."""
    config, problems = folder / "config.yaml", folder / "problems.jsonl"
    for path in (config, problems):
        if path.exists():
            raise UserError(f"{path} is there already", need="a new folder", how="name another, or remove the file")
    records = ({"question": question, "answer": answer, "level": level} for question, answer, level in PROBLEMS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        problems.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        config.write_text(CONFIG.format(folder=folder.as_posix()), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error})", need="a folder of yours") from None
    return [config, problems]
