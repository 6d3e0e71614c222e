"""The policy's fine-tuning: what is trained on, what comes out, and how it stops."""

from __future__ import annotations

import dataclasses
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from rstar.config import TrainSection
from rstar.tokens import SegmentEncoder, load_tokenizer
from rstar.training.batching import micro_batches
from rstar.training.data import encode_sft, read_rows
from rstar.training.launch import in_processes
from rstar.training.loop import PackedTrainer, TrainResult, metrics_path
from rstar.training.models import load_policy, save_model
from rstar.training.sft import TokenLoss, train_policy
from rstar.types import PreferenceRow, SftRow, TrainProgress, UserError
from tests.training_rows import make_a_mistake, sft_rows

QUICK = TrainSection(
    epochs=2, learning_rate=1e-3, batch_size=4, micro_batch_tokens=512, dtype="float32", weight_decay=0.0
)


def curve(output: Path, figure: str = "loss") -> list[float]:
    return [json.loads(line)[figure] for line in metrics_path(output).read_text().splitlines()]


def test_a_handful_of_solutions_is_memorised_up_to_the_end_token(tiny_model: Path, tmp_path: Path) -> None:
    rows = sft_rows(trees=4, count=1)
    section = dataclasses.replace(QUICK, epochs=60, learning_rate=5e-3, warmup_ratio=0.1)
    seen: list[TrainProgress] = []
    result = train_policy(rows, str(tiny_model), tmp_path / "policy", section, seed=0, on_progress=seen.append)
    assert result.first_loss > 2 and result.last_loss < 0.05
    assert [p.step for p in seen] == list(range(1, result.steps + 1)) and result.steps == 60
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    encoder = SegmentEncoder(tokenizer)
    for row in rows:
        prompt = encoder.encode(row.prompt_segments)
        written = model.generate(torch.tensor([prompt]), max_new_tokens=80, do_sample=False)[0, len(prompt) :]
        first, last = (text for text, _ in row.segments[:2])
        assert tokenizer.decode(written).startswith(first + last)
        shown = encoder.encode((*row.prompt_segments, *(text for text, _ in row.segments[:3])))
        answer = model.generate(torch.tensor([shown]), max_new_tokens=80, do_sample=False)[0, len(shown) :]
        assert tokenizer.decode(answer) == row.segments[3][0] + tokenizer.eos_token


def test_only_the_models_own_tokens_are_trained(tiny_model: Path) -> None:
    """Other labels for prompt and interpreter output leave the loss as it is; others for own segments do not."""
    encoder = SegmentEncoder(load_tokenizer(tiny_model))
    row = encode_sft(sft_rows()[0], encoder, 1000)
    module = TokenLoss(load_policy(str(tiny_model), TrainSection(), encoder.tokenizer).model)
    (batch,), = micro_batches([row], 1000, tree_packing=True)  # fmt: skip
    segments = [*((text, False) for text in sft_rows()[0].prompt_segments), *sft_rows()[0].segments]
    expected = [mine for text, mine in segments for _ in encoder.encode([text])[1 if text is None else 0 :]]
    assert len(row.trained) == len(expected) + 1 and row.trained[-1]  # the end token
    trained_text = encoder.tokenizer.decode(row.paths[0][row.trained])
    own = "".join(text for text, mine in segments if mine)
    assert trained_text == own + encoder.tokenizer.eos_token
    assert batch.other.tolist() == row.paths[0][row.trained].tolist()
    loss = float(module(batch).detach())
    batch.other[0] = (batch.other[0] + 1) % 100
    assert float(module(batch).detach()) != pytest.approx(loss, abs=1e-4)


def test_a_solution_that_does_not_end_with_own_text_gets_no_end_token(tiny_model: Path) -> None:
    encoder = SegmentEncoder(load_tokenizer(tiny_model))
    row = dataclasses.replace(sft_rows()[0], segments=sft_rows()[0].segments[:3])
    assert encode_sft(row, encoder, 1000).paths[0][-1] != encoder.tokenizer.eos_token_id


def test_a_long_solution_is_cut_at_its_end_and_learns_no_end_token(tiny_model: Path) -> None:
    encoder = SegmentEncoder(load_tokenizer(tiny_model))
    row = sft_rows()[0]
    whole = encode_sft(row, encoder, 1000)
    assert whole is not None and not whole.truncated
    question = len(encoder.encode(row.prompt_segments))
    for room in range(question + 1, len(whole.paths[0])):
        cut = encode_sft(row, encoder, room)
        assert cut is not None and cut.truncated and cut.trained.any()
        assert cut.paths[0].tolist() == whole.paths[0][:room].tolist()
        assert cut.trained.tolist() == whole.trained[:room].tolist()
    for room in range(2, question + 1):
        assert encode_sft(row, encoder, room) is None  # nothing is trained without its whole question


def test_rows_whose_question_does_not_fit_are_dropped_and_counted(tiny_model: Path, tmp_path: Path) -> None:
    rows = sft_rows()
    long = dataclasses.replace(rows[0], prompt_segments=("a long question " * 200, *rows[0].prompt_segments))
    section = dataclasses.replace(QUICK, max_length=400)
    result = train_policy([*rows, long], str(tiny_model), tmp_path / "with", section, seed=0)
    assert (result.rows, result.truncated, result.dropped) == (len(rows), 0, 1)
    train_policy(rows, str(tiny_model), tmp_path / "without", section, seed=0)
    assert curve(tmp_path / "with") == curve(tmp_path / "without")
    with pytest.raises(UserError, match="all 1 rows are longer than max_length=400"):
        train_policy([long], str(tiny_model), tmp_path / "none", section, seed=0)


def test_packed_and_plain_rows_give_the_same_curve(tiny_model: Path, tmp_path: Path) -> None:
    rows = sft_rows(trees=6, weights=True)
    sections = {
        "packed": QUICK,
        "small": dataclasses.replace(QUICK, micro_batch_tokens=100),
        "plain": dataclasses.replace(QUICK, tree_packing=False),
        "checkpointed": dataclasses.replace(QUICK, gradient_checkpointing=True),
    }
    results = {
        name: train_policy(rows, str(tiny_model), tmp_path / name, section, seed=3)
        for name, section in sections.items()
    }
    expected = curve(tmp_path / "packed")
    assert len(expected) == 12 and expected[-1] < expected[0]
    for name in sections:
        assert curve(tmp_path / name) == pytest.approx(expected, abs=1e-4), name
    assert results["packed"].tokens < results["plain"].tokens == results["packed"].flat_tokens


def test_bfloat16_is_an_autocast_of_the_forward_pass_only(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("float32", "bfloat16"):
        section = dataclasses.replace(QUICK, dtype=name, save_steps=2)
        train_policy(sft_rows(), str(tiny_model), tmp_path / name, section, seed=0)
    assert curve(tmp_path / "bfloat16") == pytest.approx(curve(tmp_path / "float32"), rel=0.02)
    assert curve(tmp_path / "bfloat16") != pytest.approx(curve(tmp_path / "float32"), rel=1e-5)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16", dtype="auto")
    assert {p.dtype for p in saved.parameters()} == {torch.float32}
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "bfloat16").iterdir()]
    assert set(modes) == {0o644}  # others who share the storage may read a checkpoint


def test_the_same_seed_gives_the_same_weights(tiny_model: Path, tmp_path: Path) -> None:
    rows = sft_rows()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_policy(rows, str(tiny_model), tmp_path / name, QUICK, seed=seed)
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"] != weights["c"]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_learning_rate_follows_the_schedule(tiny_model: Path, tmp_path: Path, schedule: str) -> None:
    section = dataclasses.replace(QUICK, schedule=schedule, warmup_ratio=0.25, epochs=8, batch_size=12)
    train_policy(sft_rows(), str(tiny_model), tmp_path / "p", section, seed=0)
    rates = curve(tmp_path / "p", "learning_rate")
    assert len(rates) == 8 and rates[:3] == pytest.approx([0.0, 0.5e-3, 1e-3])
    assert rates[-1] == pytest.approx({"linear": 1e-3 / 6, "cosine": 6.7e-5, "constant": 1e-3}[schedule], rel=0.01)


def test_no_weight_decay_on_norms(tiny_model: Path, tmp_path: Path) -> None:
    section = dataclasses.replace(
        QUICK, learning_rate=1e-2, weight_decay=0.5, epochs=1, batch_size=12, max_grad_norm=1e-30
    )
    train_policy(sft_rows(), str(tiny_model), tmp_path / "p", section, seed=0)
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tiny_model, tmp_path / "p"))
    shrunk = {name for name in before if (after[name].abs().sum() < 0.9999 * before[name].abs().sum())}
    norms = {name for name in before if "norm" in name}
    assert norms and not norms & shrunk
    assert "model.layers.0.mlp.up_proj.weight" in shrunk


def test_lora_is_merged_into_a_plain_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    section = dataclasses.replace(QUICK, lora_rank=4, epochs=10, learning_rate=1e-2)
    result = train_policy(sft_rows(), str(tiny_model), tmp_path / "p", section, seed=0)
    assert result.last_loss < result.first_loss - 0.5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "p")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert model.state_dict().keys() == base.state_dict().keys()
    assert torch.equal(model.model.norm.weight, base.model.norm.weight)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_an_interrupted_run_resumes_to_the_same_weights(tiny_model: Path, tmp_path: Path, lora_rank: int) -> None:
    """Weights, optimizer, schedule, order of the rows, and random numbers: the model drops attention."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    rows = sft_rows(trees=8)
    section = dataclasses.replace(QUICK, save_steps=3, schedule="cosine", lora_rank=lora_rank)

    def stop_at_8(progress: TrainProgress) -> None:
        if progress.step == 8:
            raise Interrupted

    train_policy(rows, str(model), tmp_path / "whole", section, seed=5)
    with pytest.raises(Interrupted):
        train_policy(rows, str(model), tmp_path / "cut", section, seed=5, on_progress=stop_at_8)
    assert not (tmp_path / "cut").exists()
    half = tmp_path / ".cut-checkpoints" / "checkpoint-7"  # as a crash while saving would leave it
    half.mkdir()
    with metrics_path(tmp_path / "cut").open("a") as file:
        file.write('{"step": 8, "lo')
    torch.manual_seed(99)
    steps: list[int] = []
    result = train_policy(
        rows, str(model), tmp_path / "cut", section, seed=5, on_progress=lambda p: steps.append(p.step)
    )
    assert steps == list(range(7, 17)) and result.steps == 16
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert not list(tmp_path.glob(".*"))  # nothing temporary is left


@pytest.mark.parametrize("other", ["seed", "base"])
def test_checkpoints_of_another_run_are_not_resumed(tiny_model: Path, tmp_path: Path, other: str) -> None:
    section = dataclasses.replace(QUICK, save_steps=1)

    def stop(progress: TrainProgress) -> None:
        if progress.step == 3:
            raise Interrupted

    model = str(shutil.copytree(tiny_model, tmp_path / "model"))
    with pytest.raises(Interrupted):
        train_policy(sft_rows(), model, tmp_path / "p", section, seed=5, on_progress=stop)
    if other == "base":  # the base was made again, at the same path
        base = AutoModelForCausalLM.from_pretrained(model)
        base.model.norm.weight.data += 0.5
        base.save_pretrained(model)
    steps: list[int] = []
    seed = 6 if other == "seed" else 5
    train_policy(sft_rows(), model, tmp_path / "p", section, seed=seed, on_progress=lambda p: steps.append(p.step))
    assert steps[0] == 1 and len(curve(tmp_path / "p")) == len(steps)


def test_no_rows_stop_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no solutions to train on"):
        train_policy([], "/nowhere", tmp_path / "p", QUICK, seed=0)


def test_a_loss_that_is_not_finite_names_the_rows(tiny_model: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = load_tokenizer(tiny_model)
    digit = tokenizer("7", add_special_tokens=False)["input_ids"][-1]
    model.model.embed_tokens.weight.data[digit] = float("nan")
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    model.config.tie_word_embeddings = False
    save_model(model, tokenizer, tmp_path / "broken")
    rows = [row for row in sft_rows(trees=8) if row.tree_id in ("t2", "t7")]  # only t7's rows hold a 7
    section = dataclasses.replace(QUICK, batch_size=100, micro_batch_tokens=1, tree_packing=False)
    with pytest.raises(UserError, match="nan at step 1 on the rows t7/") as caught:
        train_policy(rows, str(tmp_path / "broken"), tmp_path / "p", section, seed=0)
    assert "t2/" not in str(caught.value) and not (tmp_path / "p").exists()


def test_a_gpu_out_of_memory_names_the_setting(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PackedTrainer, "training_step", full)
    with pytest.raises(UserError, match="micro_batch_tokens=512"):
        train_policy(sft_rows(), str(tiny_model), tmp_path / "p", QUICK, seed=0)


def test_rows_come_back_from_their_file(tmp_path: Path) -> None:
    rows = sft_rows(weights=True)
    path = tmp_path / "sft.jsonl"
    path.write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))
    assert read_rows(path, SftRow) == rows
    with pytest.raises(UserError, match=r"sft.jsonl:1 has no chosen"):
        read_rows(path, PreferenceRow)
    path.write_text('{"prompt": \n')
    with pytest.raises(UserError, match=r"sft.jsonl:1 is not JSON"):
        read_rows(path, SftRow)


def test_losses_are_reported_to_tensorboard_too(tiny_model: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    section = dataclasses.replace(QUICK, report_to=["tensorboard"])
    train_policy(sft_rows(), str(tiny_model), tmp_path / "p", section, seed=0)
    events = accumulator.EventAccumulator(str(tmp_path / "p-tensorboard")).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(curve(tmp_path / "p"), abs=1e-5)


def test_losses_are_reported_to_wandb_too(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CONSOLE", "off")  # its copy of stdout outlives teardown() and fails in later tests
    wandb = pytest.importorskip("wandb")
    section = dataclasses.replace(QUICK, report_to=["wandb"])
    result = train_policy(sft_rows(), str(tiny_model), tmp_path / "p", section, seed=0)
    logged = dict(wandb.run.summary)
    wandb.teardown()  # as at the end of the stage's process
    assert logged["train/loss"] == pytest.approx(result.last_loss) and logged["train/global_step"] == result.steps
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"train/loss" in file.read_bytes()


def test_adapters_start_from_the_seed_and_not_from_what_the_process_drew_before(
    tiny_model: Path, tmp_path: Path
) -> None:
    section = dataclasses.replace(QUICK, lora_rank=4)
    losses = []
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        torch.rand(7)
        train_policy(sft_rows(), str(tiny_model), tmp_path / name, section, seed=seed)
        losses.append(curve(tmp_path / name))
    assert losses[0] == losses[1] != losses[2]


def test_the_gathered_weights_of_a_sharded_model_are_the_models_own() -> None:
    """A verifier's loss has a gain and a bias beside its model: they are kept in its config, not in its weights."""
    module = torch.nn.Module()
    module.model, module.gain = torch.nn.Linear(2, 2), torch.nn.Parameter(torch.ones(()))
    trainer: Any = SimpleNamespace(is_fsdp_enabled=True, model=module, args=SimpleNamespace(process_index=0))
    assert (PackedTrainer.full_state(trainer) or {}).keys() == module.model.state_dict().keys()


def test_a_tracker_that_is_not_installed_is_named(tiny_model: Path, tmp_path: Path) -> None:
    section = dataclasses.replace(QUICK, report_to=["comet_ml"])
    with pytest.raises(UserError, match="pip install comet_ml"):
        train_policy(sft_rows(), str(tiny_model), tmp_path / "p", section, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp", "ray"])
def test_two_processes_train_as_one(
    tiny_model: Path, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of 8 rows is eight passes of a row each over two processes, or one packed pass: equal losses, weights."""
    monkeypatch.setenv("RAY_worker_niceness", "0")  # Ray's own is 15: its workers starve where the machine is busy
    rows = sft_rows(trees=6, weights=True)
    one = dataclasses.replace(QUICK, batch_size=8, micro_batch_tokens=4096)
    two = dataclasses.replace(
        one, micro_batch_tokens=1, tree_packing=False, processes=2, fsdp=way == "fsdp", save_steps=4,
        launcher="ray" if way == "ray" else "torchrun",
    )  # fmt: skip
    train_policy(rows, str(tiny_model), tmp_path / "one", one, seed=0)
    seen: list[TrainProgress] = []
    result = train_policy(rows, str(tiny_model), tmp_path / "two", two, seed=0, on_progress=seen.append)
    assert result.steps == 6 == seen[-1].step == seen[-1].steps and result.last_loss == seen[-1].loss
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), abs=1e-5)
    assert curve(tmp_path / "two", "grad_norm") == pytest.approx(curve(tmp_path / "one", "grad_norm"), rel=1e-4)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    for key, value in AutoModelForCausalLM.from_pretrained(tmp_path / "two").state_dict().items():
        torch.testing.assert_close(value, expected[key], atol=2e-4, rtol=1e-3)
    assert not list(tmp_path.glob(".*"))  # nothing temporary is left


@pytest.mark.slow
def test_two_processes_with_bfloat16_shards_train_nearly_as_one_with_float32(tiny_model: Path, tmp_path: Path) -> None:
    rows = sft_rows(trees=6, weights=True)
    one = dataclasses.replace(QUICK, batch_size=8, micro_batch_tokens=4096)
    two = dataclasses.replace(one, micro_batch_tokens=1, tree_packing=False, processes=2, fsdp=True, dtype="bfloat16")
    train_policy(rows, str(tiny_model), tmp_path / "one", one, seed=0)
    train_policy(rows, str(tiny_model), tmp_path / "two", two, seed=0)
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=0.01)
    assert curve(tmp_path / "two") != pytest.approx(curve(tmp_path / "one"), rel=1e-5)
    assert curve(tmp_path / "two", "grad_norm") == pytest.approx(curve(tmp_path / "one", "grad_norm"), rel=0.05)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "two", dtype="auto")
    assert {p.dtype for p in saved.parameters()} == {torch.float32}


def test_shards_leave_the_loss_s_inputs_and_the_sum_of_gradients_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU accelerate gives FSDP a policy of its own for bfloat16, which casts both."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    trainer = PackedTrainer.__new__(PackedTrainer)
    trainer.args = SimpleNamespace(fsdp=True, use_cpu=False, bf16=True)
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", lambda self: None)
    trainer.create_accelerator_and_postprocess()
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert not policy.cast_forward_inputs and policy.output_dtype is None


@pytest.mark.parametrize(("sharded", "unsynchronised"), [(False, 2), (True, 0)])
def test_gradients_wait_for_the_last_pass_only_where_they_are_whole_anyway(sharded: bool, unsynchronised: int) -> None:
    kept: list[object] = []

    def no_sync(model: object) -> Any:
        kept.append(model)
        return nullcontext()

    model = torch.nn.Linear(1, 1)
    batch = SimpleNamespace(to=lambda device: torch.ones(1), tokens=1)
    trainer: Any = SimpleNamespace(
        is_fsdp_enabled=sharded,
        accelerator=SimpleNamespace(no_sync=no_sync, backward=lambda loss: loss.backward()),
        args=SimpleNamespace(device=torch.device("cpu"), world_size=1),
        compute_loss_context_manager=nullcontext, _check_finite=lambda *_: None,
    )  # fmt: skip
    PackedTrainer.training_step(trainer, model, [batch] * 3)  # type: ignore[list-item]
    assert len(kept) == unsynchronised and model.weight.grad == 3


def quiet(folder: Path) -> dict[str, Any]:
    return {"returns": TrainResult, "metrics": folder / "none", "on_progress": lambda progress: None}


def test_more_processes_than_this_node_has_gpus_are_refused_before_they_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    eight = dataclasses.replace(QUICK, processes=8)
    with pytest.raises(UserError, match=r"processes=8 .* 4 GPUs") as caught:
        in_processes(eight, make_a_mistake, {}, (), **quiet(tmp_path))
    assert "processes=4 (sft.processes, ppm.processes, ...)" in caught.value.how and "launcher=ray" in caught.value.how


def test_a_mistake_in_a_process_is_told_as_one(tmp_path: Path) -> None:
    two = dataclasses.replace(QUICK, processes=2)
    with pytest.raises(UserError, match="a mistake") as caught:
        in_processes(two, make_a_mistake, {}, (), **quiet(tmp_path))
    assert (caught.value.need, caught.value.how) == ("none", "mend it")
