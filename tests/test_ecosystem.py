"""What a run leaves is read by others as it is: `datasets` trees, TRL rows, vLLM's own server models."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rstar.config import EngineSection, PpmSection
from rstar.engines.base import squash
from rstar.engines.hf import HfPolicy, HfScorer
from rstar.engines.openai import OpenAIPolicy
from rstar.extract.preferences import preference_rows
from rstar.extract.sft import sft_rows
from rstar.store import TreeWriter, write_rows
from rstar.tokens import SegmentEncoder, load_tokenizer
from rstar.training.ppm import train_ppm
from rstar.types import PromptText, SamplingParams
from tests.training_rows import pair_rows, search_trees

SECTION = EngineSection(dtype="float32", max_context=512, cache_mib=64)
PROMPT = PromptText(("What is 3 plus 4?\n", "<code>\n"))


@pytest.fixture(scope="module")
def ppm(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ecosystem") / "ppm"
    section = PpmSection(epochs=1, learning_rate=3e-3, batch_size=8, dtype="float32", score_scale=2.0)
    train_ppm(pair_rows(trees=2), str(tiny_model), folder, section, seed=0)
    return folder


def test_a_shard_of_trees_is_a_data_set_of_heads_and_nodes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    trees = search_trees(2)
    for shard, part in (("w0", trees[:1]), ("w1", trees[1:])):
        with TreeWriter(tmp_path / f"trees-{shard}.jsonl.zst") as writer:
            for tree in part:
                writer.append(tree)
    files = str(tmp_path / "trees-*.jsonl.zst")
    table = datasets.load_dataset("json", data_files=files, cache_dir=str(tmp_path / "cache"), split="train")
    heads = [row for row in table if row["tree_id"] is not None]
    assert [row["tree_id"] for row in heads] == [tree.tree_id for tree in trees]
    assert heads[0]["problem"]["question"] == trees[0].problem.question
    nodes = [row for row in table if row["tree_id"] is None]
    assert [row["n"] for row in nodes] == [node.visit_count for tree in trees for node in tree.nodes]


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["SFT", "DPO", "Reward"])
def test_rows_train_with_trl_unchanged(trainer: str, tiny_model: Path, ppm: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "rows.jsonl"
    trees = search_trees()
    pairs = [row for tree in trees for row in preference_rows(tree)]
    rows: list[Any] = [row for tree in trees for row in sft_rows([tree])] if trainer == "SFT" else pairs
    assert write_rows(path, rows) >= 3
    table = datasets.load_dataset("json", data_files=str(path), cache_dir=str(tmp_path / "cache"), split="train")
    section = getattr(trl, f"{trainer}Config")(
        output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
        logging_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy="no",
    )  # fmt: skip
    model = str(ppm if trainer == "Reward" else tiny_model)
    made = getattr(trl, f"{trainer}Trainer")(model=model, train_dataset=table, args=section)
    before = {name: value.detach().clone() for name, value in made.model.named_parameters()}
    made.train()
    assert len(made.train_dataset) == len(rows)  # none was dropped
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(float(loss) > 0 for loss in losses)
    assert any(not value.equal(before[name]) for name, value in made.model.named_parameters())


# -- vLLM's own command ------------------------------------------------------------------------------------------------


@contextmanager
def served(folder: Path, log: Path, *options: str) -> Iterator[str]:
    """Base URL of vLLM's own server for a checkpoint, as the README starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    small = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "512", "--block-size", "32"]
    with log.open("w") as out:
        server = subprocess.Popen(
            [*command, *small, *options], env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}, stdout=out, stderr=out,
            start_new_session=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 400
            while not _healthy(port):
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _healthy(port: int) -> bool:
    try:
        return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200)
    except OSError:
        return False


@pytest.mark.vllm
@pytest.mark.slow
async def test_vllm_serves_the_policy_by_its_own_command(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: bash tests/run.sh --vllm")
    greedy = SamplingParams(n=1, temperature=0.0, max_tokens=24, stop=("\n",))
    here = HfPolicy(str(tiny_model), SECTION)
    (expected,) = await here.generate(PROMPT, greedy)
    await here.close()
    with served(tiny_model, tmp_path / "log") as url:
        section = EngineSection(kind="openai", url=f"{url}/v1", model=str(tiny_model), max_context=512)
        policy = OpenAIPolicy(section, str(tiny_model))
        (found,) = await policy.generate(PROMPT, greedy)
        await policy.close()
    half = "\ufffd"  # of a character that was cut off: the server keeps it back
    assert (found.text.rstrip(half), found.tokens) == (expected.text.rstrip(half), expected.tokens)
    assert found.cut_off and expected.cut_off


@pytest.mark.vllm
@pytest.mark.slow
async def test_vllm_serves_the_ppm_by_its_own_command(ppm: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: bash tests/run.sh --vllm")
    step = ("# Step 1: add\nx = 3 + 4\n<end_of_step>\n",)
    scorer = HfScorer(str(ppm), SECTION)
    expected = await scorer.score(PROMPT, [step])
    await scorer.close()
    ids = SegmentEncoder(load_tokenizer(ppm)).encode([*PROMPT.segments, *step])
    with served(ppm, tmp_path / "log", "--runner", "pooling", "--pooler-config", '{"use_activation": false}') as url:
        request = urllib.request.Request(
            f"{url}/classify", json.dumps({"input": list(ids)}).encode(), {"Content-Type": "application/json"}
        )
        raw = json.loads(urllib.request.urlopen(request, timeout=60).read())["data"][0]["probs"][0]
    scale = json.loads((ppm / "config.json").read_text())["rstar_score_scale"]
    assert squash(raw, scale) == pytest.approx(expected[0], abs=1e-4)
