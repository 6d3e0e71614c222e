"""A packed tree must compute what its rows compute one by one, by an independent implementation: plain transformers."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rstar.config import PpmSection, TrainSection
from rstar.extract.outcomes import outcome_rows as extract_outcomes
from rstar.extract.preferences import preference_rows
from rstar.extract.q_values import q_rows as extract_q
from rstar.tokens import SegmentEncoder, load_tokenizer
from rstar.training import packing
from rstar.training.batching import MicroBatch, OptimizerSteps, micro_batches, optimizer_batches
from rstar.training.data import EncodedRow, encode_sft
from rstar.training.models import load_policy, load_ppm
from rstar.training.packing import FLEX_BLOCK, TreeAttention, pack, tree_attention, trie_tokens
from rstar.training.ppm import ScoreLoss, encoded_rows
from rstar.training.sft import TokenLoss
from tests.training_rows import outcome_rows, pair_rows, q_rows, search_trees, sft_rows

Gradients = dict[str, Tensor]


@pytest.fixture(scope="module")
def searched_rows() -> dict[str, list[Any]]:
    """Rows of trees that an MCTS has grown, by loss."""
    trees = search_trees()
    return {
        "pairwise": [row for tree in trees for row in preference_rows(tree)],
        "mse": [row for tree in trees for row in extract_q(tree)],
        "bce": [row for tree in trees for row in extract_outcomes(tree)],
    }


def encoder_of(model: Path) -> SegmentEncoder:
    return SegmentEncoder(load_tokenizer(model))


def gradients(model: torch.nn.Module) -> Gradients:
    return {name.removeprefix("model."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def run(module: torch.nn.Module, batches: list[MicroBatch]) -> tuple[float, Gradients]:
    module.zero_grad()
    losses = [module(batch) for batch in batches]
    for loss in losses:
        loss.backward()
    return sum(float(loss.detach()) for loss in losses), gradients(module.model)


def assert_equal(a: tuple[float, Gradients], b: tuple[float, Gradients]) -> None:
    assert a[0] == pytest.approx(b[0], abs=1e-5)
    a_grads, b_grads = ({k.removeprefix("model."): v for k, v in grads.items()} for grads in (a[1], b[1]))
    assert a_grads.keys() == b_grads.keys()
    for name, grad in a_grads.items():
        torch.testing.assert_close(grad, b_grads[name], atol=1e-5, rtol=1e-4)


def plain_sft(model: Path, rows: list[EncodedRow]) -> tuple[float, Gradients]:
    """The flat loss by its definition: mean over all rows' target tokens, each times its row's weight."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    total, count = torch.zeros(()), 0.0
    for row in rows:
        ids = torch.from_numpy(row.paths[0])
        losses = functional.cross_entropy(plain(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        total = total + row.weight * losses[torch.from_numpy(row.trained[1:])].sum()
        count += row.weight * row.trained.sum()
    (total / count).backward()
    return float(total.detach() / count), gradients(plain)


@pytest.mark.parametrize("tree_packing", [True, False])
@pytest.mark.parametrize("budget", [60, 400, 100_000])
def test_policy_loss_and_gradients_equal_those_of_plain_rows(tiny_model: Path, tree_packing: bool, budget: int) -> None:
    encoder = encoder_of(tiny_model)
    rows = [encode_sft(row, encoder, 1000) for row in sft_rows(weights=True)]
    module = TokenLoss(load_policy(str(tiny_model), TrainSection(), encoder.tokenizer).model)
    (batches,) = micro_batches(rows, budget, tree_packing=tree_packing)
    assert (len(batches) > 1) == (budget < 1000)
    assert_equal(run(module, batches), plain_sft(tiny_model, rows))


def test_searched_trees_give_the_policy_loss_of_plain_rows(
    tiny_model: Path, searched_rows: dict[str, list[Any]]
) -> None:
    encoder = encoder_of(tiny_model)
    rows = [encode_sft(row, encoder, 2000) for row in searched_rows["bce"][:18]]  # paths with shared steps
    module = TokenLoss(load_policy(str(tiny_model), TrainSection(), encoder.tokenizer).model)
    (batches,) = micro_batches(rows, 600, tree_packing=True)
    assert len(batches) > 1 and sum(batch.tokens for batch in batches) < 0.8 * sum(row.tokens for row in rows)
    assert_equal(run(module, batches), plain_sft(tiny_model, rows))


LOSSES = {
    "pairwise": PpmSection(),
    "tanh": PpmSection(tanh_in_loss=True, score_scale=1.5),
    "mse": PpmSection(loss="mse", score_scale=1.5),
    "bce": PpmSection(loss="bce", score_scale=1.5),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("source", ["made_up", "searched"])
def test_score_loss_and_gradients_equal_those_of_plain_rows(
    tiny_model: Path, tmp_path: Path, searched_rows: dict[str, list[Any]], name: str, source: str
) -> None:
    """Flat: every path by itself through stock transformers, the loss by its definition."""
    encoder, section = encoder_of(tiny_model), LOSSES[name]
    made_up = {"pairwise": pair_rows(), "mse": q_rows(), "bce": outcome_rows()}
    rows = (made_up if source == "made_up" else searched_rows)[section.loss]
    ppm = load_ppm(str(tiny_model), section, encoder.tokenizer).model
    torch.manual_seed(0)
    torch.nn.init.normal_(ppm.score.weight, std=0.3)
    ppm.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).train()

    def logit(prompt: tuple[str, ...], texts: Iterable[str]) -> Tensor:
        return plain(torch.tensor([encoder.encode((*prompt, *texts))])).logits[0, 0]

    def score(prompt: tuple[str, ...], texts: Iterable[str]) -> Tensor:
        raw = logit(prompt, texts)
        return raw if section.loss == "pairwise" and not section.tanh_in_loss else torch.tanh(raw / 1.5)

    terms, weights = [], []
    for row in rows:
        if section.loss == "pairwise":
            chosen, rejected = (score(row.prompt_segments, s) for s in (row.chosen_segments, row.rejected_segments))
            terms.append(-functional.logsigmoid(chosen - rejected))
            weights.append(row.weight)
        elif section.loss == "mse":
            for k, q in enumerate(row.q_values):
                path = [text for step in row.steps[: k + 1] for text in step]
                terms.append((score(row.prompt_segments, path) - q) ** 2)
                weights.append(1.0)
        else:
            # Minus the log of p = (1 + tanh(raw / 1.5)) / 2 or of 1 - p. p is sigmoid(2 raw / 1.5), of which softplus
            # takes the log exactly; in float32 tanh loses the digits of a probability near 0.
            raw = logit(row.prompt_segments, (text for text, _ in row.segments))
            terms.append(functional.softplus(-2 * raw / 1.5 if row.label else 2 * raw / 1.5))
            weights.append(1.0)
    weight = torch.tensor(weights)
    expected = (weight * torch.stack(terms)).sum() / weight.sum()
    expected.backward()
    encoded = encoded_rows(rows, section.loss, encoder, 2000)
    flat = sum(row.tokens for row in encoded)
    for budget in (400, 100_000):
        (batches,) = micro_batches(encoded, budget, tree_packing=True)
        assert sum(batch.tokens for batch in batches) < 0.8 * flat
        assert_equal(run(ScoreLoss(ppm, section), batches), (float(expected.detach()), gradients(plain)))


def test_sharing_saves_tokens_and_padding_to_a_multiple_changes_nothing(tiny_model: Path) -> None:
    encoder = encoder_of(tiny_model)
    rows = [encode_sft(row, encoder, 1000) for row in sft_rows()]
    module = TokenLoss(load_policy(str(tiny_model), TrainSection(), encoder.tokenizer).model)
    (shared,) = micro_batches(rows, 100_000, tree_packing=True)
    (flat,) = micro_batches(rows, 100_000, tree_packing=False)
    (filled,) = micro_batches(rows, 100_000, tree_packing=True, multiple_of=128)
    assert flat[0].tokens == sum(row.tokens for row in rows) > 1.5 * shared[0].tokens
    assert filled[0].tokens % 128 == 0
    assert_equal(run(module, shared), run(module, filled))


@pytest.mark.parametrize("window", [0, 5])
def test_flex_attention_gives_what_the_dense_masks_give(window: int) -> None:
    """Two tries, a chain and the filling behind each other, grouped heads. (No backward on CPU.)"""
    chance = np.random.default_rng(0)
    tries = [[chance.integers(0, 3, chance.integers(20, 60)) for _ in range(6)] for _ in range(2)]
    packed = pack([*tries, [chance.integers(0, 3, 40)]], multiple_of=FLEX_BLOCK)
    query, key, value = (torch.randn(1, heads, len(packed.ids), 16) for heads in (4, 2, 2))
    outputs = []
    for flex in (False, True):
        tree = TreeAttention.of(packed, torch.device("cpu"))
        tree.flex = flex
        options = {"scaling": 0.2, "sliding_window": window or None, "tree": tree}
        outputs.append(tree_attention(torch.nn.Module(), query, key, value, None, **options)[0])
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)
    assert outputs[0].shape == (1, len(packed.ids), 4, 16)


def test_flex_attention_stays_compiled_in_any_thread_after_many_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond dynamo's limit it runs uncompiled, on all scores at once; a thread begins with the limit of 8."""
    limits: list[int] = []
    monkeypatch.setattr(packing, "_flex", lambda: limits.append(torch._dynamo.config.recompile_limit))
    for _ in range(2):
        thread = threading.Thread(target=packing._compiled_flex)
        thread.start()
        thread.join()
    assert len(limits) == 2 and min(limits) > 2 * 2 * 2 * 2  # dtypes, windows, gradients, a single block or more


def test_a_model_with_flex_attention_has_the_same_loss(tiny_model: Path) -> None:
    encoder = encoder_of(tiny_model)
    rows = [encode_sft(row, encoder, 1000) for row in sft_rows()]
    module = TokenLoss(load_policy(str(tiny_model), TrainSection(), encoder.tokenizer).model)
    (batch,), = micro_batches(rows, 100_000, tree_packing=True, multiple_of=FLEX_BLOCK)  # fmt: skip
    with torch.no_grad():
        dense = float(module(batch))
        batch.attention.flex, batch.attention.masks = True, {}
        assert float(module(batch)) == pytest.approx(dense, abs=1e-5)


paths_strategy = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=8)


@settings(max_examples=200)
@given(st.lists(paths_strategy, min_size=1, max_size=3), st.integers(1, 5))
def test_every_path_sees_exactly_itself(trees: list[list[list[int]]], multiple_of: int) -> None:
    """Whatever the tries: a path's places hold its tokens, and its last token attends to those places only."""
    arrays = [[np.array(path, dtype=np.int64) for path in paths] for paths in trees]
    packed = pack(arrays, multiple_of=multiple_of)
    distinct = sum(len({tuple(p[: k + 1]) for p in paths for k in range(len(p))}) for paths in trees)
    assert sum(trie_tokens(paths) for paths in arrays) == distinct
    assert len(packed.ids) == -(-distinct // multiple_of) * multiple_of
    attention = TreeAttention.of(packed, torch.device("cpu"))
    length = len(packed.ids)
    visible = torch.zeros(length, length, dtype=torch.bool)
    for (start, stop), mask in zip(packed.blocks, attention.block_masks(0), strict=True):
        n = stop - start
        visible[start:stop, start:stop] = torch.ones(n, n, dtype=torch.bool).tril() if mask is None else mask
    for paths, where in zip(arrays, packed.where, strict=True):
        for path, places in zip(paths, where, strict=True):
            assert packed.ids[places].tolist() == path.tolist()
            assert packed.depth[places].tolist() == list(range(len(path)))
            assert visible[places[-1]].nonzero()[:, 0].tolist() == places.tolist()


def test_a_sliding_window_counts_steps_on_the_path() -> None:
    packed = pack([[np.array([1, 2, 3, 4]), np.array([1, 2, 5, 6])]])
    mask = TreeAttention.of(packed, torch.device("cpu")).block_masks(2)[0]
    assert mask is not None
    assert mask.int().tolist()[5] == [
        0,
        0,
        0,
        0,
        1,
        1,
    ]  # 6 sees 5 and itself, not 4
    assert mask.int().tolist()[4] == [0, 1, 0, 0, 1, 0]  # 5 sees 2, three places back but one step on the path


@settings(max_examples=100)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(1, 16), st.integers(0, 3))
def test_optimizer_batches_hold_every_row_once_and_whole_trees(sizes: list[int], batch_size: int, seed: int) -> None:
    trees = [f"t{t}" for t, size in enumerate(sizes) for _ in range(size)]
    batches = optimizer_batches(trees, batch_size, np.random.default_rng(seed))
    assert sorted(k for batch in batches for k in batch) == list(range(len(trees)))
    assert all(len(batch) < 2 * batch_size for batch in batches)
    for t, size in enumerate(sizes):
        if size <= batch_size:
            assert sum(any(trees[k] == f"t{t}" for k in batch) for batch in batches) == 1


@pytest.mark.parametrize(("sizes", "batch_size"), [([65, 65], 64), ([17, 17, 17], 16), ([9], 8)])
def test_a_tree_over_the_batch_size_leaves_no_step_of_a_few_rows(sizes: list[int], batch_size: int) -> None:
    trees = [f"t{t}" for t, size in enumerate(sizes) for _ in range(size)]
    for seed in range(20):
        batches = optimizer_batches(trees, batch_size, np.random.default_rng(seed))
        assert min(map(len, batches)) >= batch_size // 2


def test_order_depends_on_seed_and_epoch_only(tiny_model: Path) -> None:
    encoder = encoder_of(tiny_model)
    rows = [encode_sft(row, encoder, 1000) for row in sft_rows(trees=8)]

    def order(seed: int, epochs: float, tree_packing: bool = True) -> list[list[int]]:
        steps = OptimizerSteps(rows, batch_size=8, epochs=epochs, seed=seed, budget=400, tree_packing=tree_packing)
        return steps.batches

    assert order(0, 2) == order(0, 2, tree_packing=False) != order(1, 2)
    assert order(0, 1.5) == order(0, 2)[: len(order(0, 1)) + 2]
    first, second = order(0, 2)[:4], order(0, 2)[4:]
    assert first != second


def test_processes_share_a_batch_with_as_many_passes_each(tiny_model: Path) -> None:
    encoder = encoder_of(tiny_model)
    rows = [encode_sft(row, encoder, 1000) for row in sft_rows(trees=3)]
    module = TokenLoss(load_policy(str(tiny_model), TrainSection(), encoder.tokenizer).model)
    alone = run(module, micro_batches(rows, 150, tree_packing=True)[0])
    shares = micro_batches(rows, 150, tree_packing=True, processes=5)
    assert len(shares) == 5 and len({len(share) for share in shares}) == 1
    assert_equal(run(module, [batch for share in shares for batch in share]), alone)
