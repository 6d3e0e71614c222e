"""The process preference model: its loss, its checkpoint, and what is measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rstar.config import PpmSection
from rstar.tokens import SegmentEncoder, load_tokenizer
from rstar.training.batching import micro_batches
from rstar.training.data import encode_outcome, encode_pair, encode_q_values
from rstar.training.losses import pairwise_losses, q_losses
from rstar.training.models import give_pad_token, load_ppm
from rstar.training.ppm import ScoreLoss, held_out_problems, pair_metrics, train_ppm
from rstar.types import QValueRow, UserError
from tests.training_rows import outcome_rows, pair_rows, q_rows

QUICK = PpmSection(epochs=6, learning_rate=3e-3, batch_size=8, micro_batch_tokens=2048, dtype="float32")


def test_pairwise_loss_has_the_golden_values() -> None:
    """r_pos = {1.2, 0.4}, r_neg = {-0.3, 0.1}, all four pairs; worked out by hand beside the paper's Eq. 4."""
    chosen, rejected = torch.tensor([1.2, 1.2, 0.4, 0.4]), torch.tensor([-0.3, 0.1, -0.3, 0.1])
    losses = pairwise_losses(chosen, rejected)
    assert losses.tolist() == pytest.approx([0.201413, 0.287335, 0.403186, 0.554355], abs=1e-6)
    assert float(losses.mean()) == pytest.approx(0.361572, abs=1e-6)
    assert float(pairwise_losses(chosen, rejected, tanh_scale=1.0).mean()) == pytest.approx(0.412201, abs=1e-6)


def test_tanh_in_the_loss_bounds_it_from_below() -> None:
    """ln(1 + e^-2) = 0.1269: no margin can be larger than 2."""
    loss = pairwise_losses(torch.tensor([1e4]), torch.tensor([-1e4]), tanh_scale=5.0)
    assert float(loss) == pytest.approx(0.126928, abs=1e-5)


def test_q_loss_is_on_the_served_score() -> None:
    assert float(q_losses(torch.tensor([5.0]), torch.tensor([np.tanh(1.0)]), scale=5.0)) == pytest.approx(0, abs=1e-10)


def test_pairs_are_learnt_and_the_checkpoint_scores_as_in_training(tiny_model: Path, tmp_path: Path) -> None:
    rows = pair_rows(trees=12)
    result = train_ppm(rows, str(tiny_model), tmp_path / "ppm", dataclasses.replace(QUICK, heldout=0.2), seed=0)
    assert result.heldout_problems == 2
    assert result.train_before is not None and result.train_after is not None and result.heldout_after is not None
    assert result.train_before.loss == pytest.approx(np.log(2), abs=0.02)  # a small head calls every pair a draw
    assert result.train_after.accuracy > 0.95 > result.train_before.accuracy
    assert result.train_after.pairs == 10 * 7 and result.heldout_after.pairs == 2 * 7

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ppm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ppm")
    assert model.config.rstar_score_scale == 5.0 and model.config.num_labels == 1
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id
    encoder = SegmentEncoder(tokenizer)
    held = [encode_pair(row, encoder, 4096) for row in rows]
    trained = ScoreLoss(load_ppm(str(tmp_path / "ppm"), QUICK, tokenizer).model, QUICK)
    trained.model.load_state_dict(model.state_dict())  # load_ppm made a new head
    metrics = pair_metrics(trained, [row for row in held if row.problem_id not in held_out(rows)], QUICK)
    assert metrics is not None and metrics.loss == pytest.approx(result.train_after.loss, abs=1e-5)
    assert metrics.accuracy == result.train_after.accuracy
    # stock scoring of a right-padded batch of paths of different lengths gives the packed pass's scores
    (batch,), = micro_batches(held[:7], 100_000, tree_packing=True)  # fmt: skip
    with torch.no_grad():
        packed = trained.scores(batch)
        by_name = {row.name: row for row in held[:7]}
        paths = [list(path) for name in batch.rows for path in by_name[name].paths]
        width = max(len(path) for path in paths)
        padded = torch.tensor([path + [tokenizer.pad_token_id] * (width - len(path)) for path in paths])
        mask = torch.tensor([[1] * len(path) + [0] * (width - len(path)) for path in paths])
        stock = model(input_ids=padded, attention_mask=mask).logits[:, 0]
    torch.testing.assert_close(packed[batch.which], stock[0::2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[batch.other], stock[1::2], atol=1e-5, rtol=1e-5)


def held_out(rows: list) -> set[str]:
    return held_out_problems([row.problem_id for row in rows], 0.2, 0)


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_labels_are_learnt_and_measured_by_the_pairs_they_order(tiny_model: Path, tmp_path: Path, loss: str) -> None:
    section = dataclasses.replace(QUICK, loss=loss, epochs=30, score_scale=1.0, heldout=0.2)
    rows = q_rows(trees=10)
    if loss == "bce":
        rows = [dataclasses.replace(row, label=float("way 1" in row.completion)) for row in outcome_rows(trees=10)]
    result = train_ppm(rows, str(tiny_model), tmp_path / "v", section, seed=0)
    assert result.training.last_loss < 0.5 * result.training.first_loss
    assert result.train_before is not None and result.train_after is not None and result.heldout_after is not None
    assert result.train_after.accuracy > 0.7 > result.train_before.accuracy
    held = [row for row in rows if row.problem_id in held_out_problems([r.problem_id for r in rows], 0.2, 0)]
    values = {
        tree: [v for r in held if r.tree_id == tree for v in (r.q_values if isinstance(r, QValueRow) else [r.label])]
        for tree in {r.tree_id for r in held}
    }
    assert result.heldout_after.pairs == sum(a > b for found in values.values() for a in found for b in found) > 0


def test_rows_of_the_wrong_kind_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ppm.loss=pairwise with a OutcomeRow; need rows of kind PreferenceRow"):
        train_ppm(outcome_rows(), str(tiny_model), tmp_path / "v", QUICK, seed=0)
    with pytest.raises(UserError, match="need pairwise, mse, bce"):
        train_ppm(outcome_rows(), str(tiny_model), tmp_path / "v", dataclasses.replace(QUICK, loss="hinge"), seed=0)


def test_a_long_solution_is_scored_at_the_steps_that_fit(tiny_model: Path) -> None:
    encoder = SegmentEncoder(load_tokenizer(tiny_model))
    row = q_rows()[0]
    whole = encode_q_values(row, encoder, 1000)
    assert whole.labels.tolist() == list(row.q_values) and not whole.truncated
    for place, step in zip(whole.scored, row.steps, strict=True):
        assert encoder.tokenizer.decode(whole.paths[0][: place + 1]).endswith(step[-1])
    second = int(whole.scored[1]) + 1
    cut = encode_q_values(row, encoder, second + 1)  # the third step does not fit whole
    assert cut.truncated and cut.paths[0].tolist() == whole.paths[0][:second].tolist()
    assert cut.labels.tolist() == list(row.q_values[:2]) and cut.scored.tolist() == whole.scored[:2].tolist()
    assert encode_q_values(row, encoder, int(whole.scored[0])) is None  # not even the first
    with pytest.raises(UserError, match="3 steps and 2 Q-values"):
        encode_q_values(dataclasses.replace(row, q_values=(0.0, 0.5)), encoder, 1000)


def test_no_pairs_stop_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no pairs to train on"):
        train_ppm([], "/nowhere", tmp_path / "v", QUICK, seed=0)


def test_pairs_and_outcomes_that_are_too_long_are_dropped_and_counted(tiny_model: Path, tmp_path: Path) -> None:
    encoder = SegmentEncoder(load_tokenizer(tiny_model))
    row, outcome = pair_rows()[0], outcome_rows()[0]
    longest = max(len(path) for path in encode_pair(row, encoder, 1000).paths)
    assert encode_pair(row, encoder, longest) is not None and encode_pair(row, encoder, longest - 1) is None
    end = len(encode_outcome(outcome, encoder, 1000).paths[0])
    assert encode_outcome(outcome, encoder, end) is not None and encode_outcome(outcome, encoder, end - 1) is None
    section, rows = dataclasses.replace(QUICK, max_length=longest, epochs=1), [row, row]
    long = dataclasses.replace(row, rejected_segments=(*row.rejected_segments, "one word more"))
    found = train_ppm([*rows, long], str(tiny_model), tmp_path / "v", section, seed=0)
    assert (found.training.rows, found.training.dropped) == (2, 1)


def test_no_problem_is_on_both_sides_and_few_problems_are_not_split() -> None:
    ids = [f"p{k % 40}" for k in range(200)]
    held = held_out_problems(ids, 0.05, 1)
    assert len(held) == 2 and held <= set(ids) and held == held_out_problems(ids, 0.05, 1)
    assert held_out_problems(ids[:9], 0.05, 1) == set() == held_out_problems(ids, 0.0, 1)


def test_the_pad_token_is_never_the_end_token(tiny_model: Path) -> None:
    """Scoring reads the last token that is not padding: with pad == eos a path that ends in eos would be misread."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    own = tokenizer.pad_token
    give_pad_token(model, tokenizer)
    assert tokenizer.pad_token == own  # one of its own is kept
    tokenizer.pad_token = tokenizer.eos_token
    give_pad_token(model, tokenizer)
    assert tokenizer.pad_token == own and model.config.pad_token_id == tokenizer.pad_token_id  # a spare one serves
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = own + str(tokenizer.chat_template)  # now no spare one is left
    before = len(tokenizer)
    give_pad_token(model, tokenizer)
    assert tokenizer.pad_token_id == before == model.get_input_embeddings().weight.shape[0] - 1


def test_scores_are_float32_under_bfloat16_too(tiny_model: Path) -> None:
    encoder = SegmentEncoder(load_tokenizer(tiny_model))
    rows = [encode_pair(row, encoder, 1000) for row in pair_rows()]
    (batch,), = micro_batches(rows, 100_000, tree_packing=True)  # fmt: skip
    for lora_rank in (0, 4):
        section = dataclasses.replace(QUICK, lora_rank=lora_rank)
        module = ScoreLoss(load_ppm(str(tiny_model), section, encoder.tokenizer).model, section)
        with torch.autocast("cpu", torch.bfloat16):
            scores, loss = module.scores(batch), module(batch)
        loss.backward()
        assert scores.dtype == torch.float32 and (scores != scores.bfloat16()).float().mean() > 0.9
        (gradient,) = (p.grad for name, p in module.named_parameters() if "score" in name and p.requires_grad)
        assert gradient is not None and (gradient != gradient.bfloat16()).float().mean() > 0.9


def test_before_and_after_training_are_measured_in_the_same_dtype(tiny_model: Path, tmp_path: Path) -> None:
    still = dataclasses.replace(QUICK, dtype="bfloat16", learning_rate=0.0, epochs=1, heldout=0.2)
    result = train_ppm(pair_rows(trees=10), str(tiny_model), tmp_path / "ppm", still, seed=0)
    assert result.train_before == result.train_after and result.heldout_before == result.heldout_after
    exact = train_ppm(
        pair_rows(trees=10), str(tiny_model), tmp_path / "exact", dataclasses.replace(still, dtype="float32"), seed=0
    )
    assert result.train_before != exact.train_before == exact.train_after


def test_a_head_beside_adapters_is_the_one_that_was_trained(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    section, rows = dataclasses.replace(QUICK, lora_rank=4, learning_rate=1e-2, epochs=10), pair_rows(trees=9)
    result = train_ppm(rows, str(tiny_model), tmp_path / "ppm", section, seed=0)
    assert result.train_before is not None and result.train_after is not None
    assert result.train_after.loss < result.train_before.loss - 0.1
    tokenizer = load_tokenizer(tmp_path / "ppm")
    saved = ScoreLoss(load_ppm(str(tmp_path / "ppm"), QUICK, tokenizer).model, QUICK)
    saved.model.load_state_dict(AutoModelForSequenceClassification.from_pretrained(tmp_path / "ppm").state_dict())
    metrics = pair_metrics(saved, [encode_pair(row, SegmentEncoder(tokenizer), 4096) for row in rows], QUICK)
    assert metrics is not None and metrics.loss == pytest.approx(result.train_after.loss, abs=1e-4)


@pytest.mark.slow
def test_two_processes_with_bfloat16_shards_learn_pairs_nearly_as_one_with_float32(
    tiny_model: Path, tmp_path: Path
) -> None:
    one = dataclasses.replace(QUICK, epochs=2)
    two = dataclasses.replace(one, micro_batch_tokens=1, processes=2, fsdp=True, dtype="bfloat16")
    found = [
        train_ppm(pair_rows(trees=12), str(tiny_model), tmp_path / str(k), section, seed=0)
        for k, section in enumerate((one, two))
    ]
    losses = [[result.training.first_loss, result.training.last_loss] for result in found]
    assert losses[1] == pytest.approx(losses[0], rel=0.05) and losses[0][1] < 0.8 * losses[0][0]
    whole, sharded = (result.train_after for result in found)
    assert whole is not None and sharded is not None
    assert sharded.loss == pytest.approx(whole.loss, rel=0.05)


def test_calibration_error_of_certain_but_wrong_scores_is_large(tiny_model: Path) -> None:
    encoder = SegmentEncoder(load_tokenizer(tiny_model))
    rows = [encode_pair(row, encoder, 1000) for row in pair_rows()]
    module = ScoreLoss(load_ppm(str(tiny_model), QUICK, encoder.tokenizer).model, QUICK)
    draw = pair_metrics(module, rows, QUICK)
    torch.manual_seed(0)
    torch.nn.init.normal_(module.model.score.weight, std=30.0)
    certain = pair_metrics(module, rows, QUICK)
    assert draw is not None and certain is not None
    assert certain.calibration_error == pytest.approx(1 - certain.accuracy, abs=0.05)
    assert draw.calibration_error == pytest.approx(abs(draw.accuracy - 0.5), abs=0.05)
