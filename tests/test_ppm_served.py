"""The folder that train_ppm saves: stock transformers and both engines score with it as training did, in float32."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rstar.config import EngineSection, PpmSection
from rstar.engines.base import Scorer, squash
from rstar.engines.hf import HfScorer
from rstar.tokens import SegmentEncoder, load_tokenizer
from rstar.training.batching import micro_batches
from rstar.training.data import encode_pair
from rstar.training.models import load_ppm
from rstar.training.ppm import ScoreLoss, train_ppm
from rstar.types import PreferenceRow, PromptText
from tests.training_rows import pair_rows

SECTION = PpmSection(
    epochs=3, learning_rate=3e-3, batch_size=8, micro_batch_tokens=2048, dtype="float32", score_scale=2.0
)
ENGINE = EngineSection(dtype="float32", max_context=512, cache_mib=64, score_batch_tokens=512)
ROWS = pair_rows(trees=4)


@pytest.fixture(scope="module")
def ppm(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "ppm"
    train_ppm(ROWS, str(tiny_model), folder, SECTION, seed=0)
    return folder


@pytest.fixture(scope="module")
def trained_scores(ppm: Path) -> dict[str, float]:
    """Text of chosen or rejected path -> raw score, as training computes it: all trees packed into one pass."""
    tokenizer = load_tokenizer(ppm)
    encoder = SegmentEncoder(tokenizer)
    module = ScoreLoss(load_ppm(str(ppm), SECTION, tokenizer).model, SECTION)
    plain = AutoModelForSequenceClassification.from_pretrained(ppm, dtype=torch.float32)
    module.model.load_state_dict(plain.state_dict())  # load_ppm made a new head
    module.eval()
    by_name = {encode_pair(row, encoder, 1000).name: row for row in ROWS}
    (batch,) = micro_batches([encode_pair(row, encoder, 1000) for row in ROWS], 100_000, tree_packing=True)[0]
    with torch.no_grad():
        raw = module(batch, scores_only=True)
    found = {}
    for name, chosen, rejected in zip(batch.rows, raw[batch.which], raw[batch.other], strict=True):
        row = by_name[name]
        found |= {row.prompt + row.chosen: float(chosen), row.prompt + row.rejected: float(rejected)}
    return found


def paths(row: PreferenceRow) -> dict[str, tuple[str, ...]]:
    return {row.prompt + row.chosen: row.chosen_segments, row.prompt + row.rejected: row.rejected_segments}


def test_stock_transformers_scores_a_padded_batch_as_training_did(ppm: Path, trained_scores: dict[str, float]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ppm)
    model = AutoModelForSequenceClassification.from_pretrained(ppm, dtype=torch.float32)
    assert model.config.num_labels == 1 and model.config.rstar_score_scale == SECTION.score_scale
    encoder = SegmentEncoder(tokenizer)
    segments = {text: (*row.prompt_segments, *path) for row in ROWS for text, path in paths(row).items()}
    ids = [{"input_ids": encoder.encode(path)} for path in segments.values()]
    batch = tokenizer.pad(ids, padding_side="right", return_tensors="pt")
    assert (batch["attention_mask"] == 0).any()
    with torch.no_grad():
        scores = model(**batch).logits[:, 0].tolist()
    assert scores == pytest.approx([trained_scores[text] for text in segments], abs=1e-4)
    assert np.ptp(scores) > 0.5  # training has told them apart


async def assert_served(scorer: Scorer, trained_scores: dict[str, float]) -> None:
    for row in ROWS[::3]:
        expected = [squash(trained_scores[text], SECTION.score_scale) for text in paths(row)]
        scores = await scorer.score(PromptText(row.prompt_segments), list(paths(row).values()))
        assert scores == pytest.approx(expected, abs=1e-4)


async def test_the_hf_engine_serves_the_scores_of_training(ppm: Path, trained_scores: dict[str, float]) -> None:
    scorer = HfScorer(ppm, ENGINE)
    await assert_served(scorer, trained_scores)
    await scorer.close()


@pytest.mark.vllm
async def test_vllm_serves_the_scores_of_training(ppm: Path, trained_scores: dict[str, float]) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: bash tests/run.sh --vllm")
    from rstar.engines.vllm import VllmScorer

    scorer = VllmScorer(ppm, dataclasses.replace(ENGINE, kind="vllm", max_batch=16))
    await assert_served(scorer, trained_scores)
    await scorer.close()
