"""`rstar train` from rows and from trees, as a user calls it."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rstar.cli import run
from rstar.store import TreeWriter, write_rows
from tests.training_rows import q_rows, search_trees, sft_rows

QUICK = ["batch_size=4", "epochs=1", "learning_rate=1e-3", "dtype=float32"]


def train(what: str, source: Path, model: Path, output: Path, *more: str) -> int:
    section = "sft" if what == "policy" else "ppm"
    settings = [f"{section}.{text}" for text in QUICK]
    return run(["train", what, str(source), "--model", str(model), "--out", str(output), *settings, *more])


def test_rows_train_a_policy_and_trees_its_ppm(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "sft.jsonl", sft_rows())
    with TreeWriter(tmp_path / "trees-w0.jsonl.zst") as writer:
        for tree in search_trees(problems=2):
            tree.complete = True
            writer.append(tree)
    assert train("policy", tmp_path / "sft.jsonl", tiny_model, tmp_path / "policy") == 0
    assert "12 rows (0 truncated, 0 dropped), 3 steps" in capsys.readouterr().out
    assert train("ppm", tmp_path, tmp_path / "policy", tmp_path / "ppm", "extract.min_margin=0.1") == 0
    assert "training pairs" in capsys.readouterr().out
    assert train("policy", tmp_path, tiny_model, tmp_path / "second") == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "ppm").config.num_labels == 1


def test_the_loss_says_which_rows_are_read(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "pqm.jsonl", q_rows())
    assert train("ppm", tmp_path / "pqm.jsonl", tiny_model, tmp_path / "pqm", "ppm.loss=mse") == 0
    assert train("ppm", tmp_path / "pqm.jsonl", tiny_model, tmp_path / "ppm") == 2
    assert "pqm.jsonl:1 has no chosen, chosen_segments, kind" in capsys.readouterr().err


def test_a_folder_of_other_things_is_not_replaced_by_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    precious = tmp_path / "runs" / "mine" / "round_01" / "eval.json"
    precious.parent.mkdir(parents=True)
    precious.write_text("{}")
    write_rows(tmp_path / "rows.jsonl", sft_rows())
    made = ["train", "policy", str(tmp_path / "rows.jsonl"), "--model", "tiny", "--out", str(tmp_path / "runs")]
    assert run(made) == 2
    assert "holds other things" in capsys.readouterr().err and precious.exists()


def test_mistakes_are_told_before_anything_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "policy", "rows.jsonl"]) == 2
    assert "need --model and --out" in capsys.readouterr().err
    assert train("policy", tmp_path / "none", tmp_path, tmp_path / "out") == 2
    assert "no file or folder" in capsys.readouterr().err
    write_rows(tmp_path / "sft.jsonl", [])
    assert train("policy", tmp_path / "sft.jsonl", tmp_path / "nowhere", tmp_path / "out") == 2
    assert "no model" in capsys.readouterr().err
    assert train("policy", tmp_path / "sft.jsonl", tmp_path, tmp_path / "out", "sft.batchsize=1") == 2
    assert "sft.batch_size" in capsys.readouterr().err
