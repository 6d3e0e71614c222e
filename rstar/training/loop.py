"""The HF Trainer with packed micro-batches: one item of its data loader is one optimizer step.

What the Trainer is used for: optimizer, schedule, clipping, mixed precision, DDP and FSDP, checkpoints, `report_to`.
What is ours: a step runs its micro-batches itself, because their number varies and their weights are already exact.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback

from rstar.config import TrainSection, digest
from rstar.store import read_lines, room_for, sync_files, write_rows
from rstar.training.batching import MicroBatch, OptimizerSteps
from rstar.training.data import EncodedRow
from rstar.training.models import Loaded, autocast_dtype, save_model, transformers_model
from rstar.types import TrainProgress, UserError


@dataclass(frozen=True)
class TrainResult:
    """What a training run did. Losses are those of the optimizer batches, before their steps."""

    output: str
    rows: int
    truncated: int  # of them, those that lost the end of their solution to max_length
    steps: int
    tokens: int  # computed, shared prefixes once
    flat_tokens: int  # what plain rows would have computed
    first_loss: float
    last_loss: float
    mean_loss: float  # over the last epoch
    seconds: float
    metrics: str  # path of the file with one line per optimizer step
    dropped: int = 0  # rows that were left out: too long for max_length


class LossModule(nn.Module):
    """A model and its loss: forward(MicroBatch) -> the micro-batch's share of the optimizer batch's loss.

    One module, so that DDP and FSDP wrap body, head and loss together.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def inputs(self, batch: MicroBatch) -> dict[str, Any]:
        """Keyword arguments of the model's body for a packed sequence."""
        return {
            "input_ids": batch.ids, "position_ids": batch.positions, "tree": batch.attention, "use_cache": False,
        }  # fmt: skip


def no_progress(progress: TrainProgress) -> None:
    """For callers that show no progress."""


def metrics_path(output: Path) -> Path:
    """Where the run that writes `output` logs its steps: beside it, under its name."""
    return output.parent / f"{output.name}-metrics.jsonl"


def train(
    loss_module: LossModule,
    loaded: Loaded,
    rows: Sequence[EncodedRow],
    section: TrainSection,
    *,
    output: Path,
    seed: int,
    on_progress: Callable[[TrainProgress], None],
    before_saving: Callable[[], None] = lambda: None,
) -> TrainResult:
    """Train on `rows` and write the checkpoint `output` (complete or not there), resuming where a run was cut off.

    Under torchrun every process calls this with the same arguments. `before_saving` runs on the trained model.
    """
    began = time.monotonic()
    checkpoints = output.parent / f".{output.name}-checkpoints"
    args = _arguments(loss_module, section, checkpoints, seed)
    steps = OptimizerSteps(
        rows,
        batch_size=section.batch_size,
        epochs=section.epochs,
        seed=seed,
        budget=section.micro_batch_tokens,
        tree_packing=section.tree_packing,
        in_order=section.in_order,
        tree_rows=section.tree_rows,
        process=args.process_index,
        processes=args.world_size,
        flex=args.device.type == "cuda",
    )
    args.warmup_steps = math.ceil(section.warmup_ratio * len(steps))
    named = [(row.name, row.tokens, row.weight, row.labels.tolist()) for row in rows]
    identity = digest([asdict(section), seed, named, args.world_size, _starting_point(loss_module.model)])
    with args.main_process_first(local=False, desc="checkpoints"):
        resume = _resumable(checkpoints, identity, main=args.process_index == 0)
    metrics = Metrics(
        metrics_path(output), steps, on_progress, resumed_step=_step_of(resume), main=args.process_index == 0
    )
    callbacks = [_tensorboard(output)] if "tensorboard" in section.report_to and args.process_index == 0 else []
    trainer = PackedTrainer(model=loss_module, args=args, train_dataset=steps, metrics=metrics, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    with memory_advice(section):
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        before_saving()
    state = trainer.full_state()
    if args.process_index == 0:
        save_model(loss_module.model, loaded.tokenizer, output, state)
        shutil.rmtree(checkpoints, ignore_errors=True)
    if args.world_size > 1:
        dist.barrier()
    return metrics.result(output, rows, section, time.monotonic() - began)


def _starting_point(model: nn.Module) -> list[list[float]]:
    """Some of the weights that a run begins with: a base of the same shape, or at the same path, is another."""
    named = transformers_model(model).base_model.named_parameters()
    return [value.detach().flatten()[:2].tolist() for name, value in named if "lora_" not in name]


@contextmanager
def memory_advice(section: TrainSection) -> Iterator[None]:
    """Name the setting to lower where a GPU runs out of memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU ran out of memory at micro_batch_tokens={section.micro_batch_tokens}", need="less at once",
            how="lower micro_batch_tokens or set gradient_checkpointing=true: sft.KEY, ppm.KEY, ..., or, where earlier"
            " rounds are done, rounds.rN.sft.KEY",
        ) from error  # fmt: skip


def _arguments(loss_module: LossModule, section: TrainSection, checkpoints: Path, seed: int) -> TrainingArguments:
    schedules = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
    if section.schedule not in schedules:
        raise UserError(f"train.schedule {section.schedule!r}", need=", ".join(schedules))
    for name in section.report_to:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"report_to={name} needs the package {name}", how=f"pip install {name}")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    fsdp = torch.cuda.is_available() and not section.lora_rank if section.fsdp is None else section.fsdp
    if fsdp and section.lora_rank:
        raise UserError("fsdp=true with lora_rank", need="one of them", how="adapters are small: fsdp=false")
    sharded: dict[str, Any] = {}
    if processes > 1 and fsdp:
        layers = list(transformers_model(loss_module.model)._no_split_modules or [])
        sharded = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": layers}}
    args = TrainingArguments(
        output_dir=str(checkpoints),
        seed=seed,
        per_device_train_batch_size=1,  # one item is one optimizer step
        gradient_accumulation_steps=1,
        num_train_epochs=1,  # the data set is the whole run
        learning_rate=section.learning_rate,
        lr_scheduler_type=schedules[section.schedule],
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        bf16=autocast_dtype(section) is torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),  # without it, processes on CPU would not find each other
        ddp_backend="gloo" if processes > 1 and not torch.cuda.is_available() else None,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if section.save_steps else "no",
        save_steps=section.save_steps or 1,
        save_total_limit=2,
        report_to=[name for name in section.report_to if name != "tensorboard"] or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        **sharded,
    )
    if args.n_gpu > 1:  # several GPUs without torchrun: use one, never DataParallel
        args._n_gpu = 1
    return args


def _tensorboard(output: Path) -> TensorBoardCallback:
    """Writes beside the checkpoint; the Trainer's own place is among the checkpoints, which go when it is done."""
    from torch.utils.tensorboard import SummaryWriter

    return TensorBoardCallback(SummaryWriter(log_dir=str(output.parent / f"{output.name}-tensorboard")))


_COMPLETE = "rstar_complete"
_IDENTITY = "rstar_identity"


def _resumable(checkpoints: Path, identity: str, *, main: bool) -> Path | None:
    """The last whole checkpoint of the same run. The main process first removes those of another run and halves."""
    known = checkpoints / _IDENTITY
    if main and (not known.is_file() or known.read_text() != identity):
        shutil.rmtree(checkpoints, ignore_errors=True)
        checkpoints.mkdir(parents=True)
        known.write_text(identity)
    found = {_step_of(path): path for path in checkpoints.glob("checkpoint-*")}
    for step in sorted(found):
        if not (found[step] / _COMPLETE).is_file():
            if main:
                shutil.rmtree(found[step])
            del found[step]
    return found[max(found)] if found else None


def _step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


class Metrics:
    """One line a step in a .jsonl file, and the figures of the result."""

    def __init__(
        self,
        path: Path,
        steps: OptimizerSteps,
        on_progress: Callable[[TrainProgress], None],
        *,
        resumed_step: int,
        main: bool,
    ) -> None:
        self.path, self.steps, self.on_progress, self.main = path, steps, on_progress, main
        self.lines: list[dict[str, float]] = []
        if resumed_step and path.is_file():
            self.lines = [line for line in read_lines(path) if line["step"] <= resumed_step]
        if main:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_rows(path, self.lines)  # replaced: another process may be reading the lines of the run before

    def add(self, line: dict[str, float]) -> None:
        self.lines.append(line)
        if not self.main:
            return
        with room_for(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.on_progress(
            TrainProgress(
                step=int(line["step"]),
                steps=len(self.steps),
                loss=line["loss"],
                tokens=int(line["tokens"]),
                seconds=line["seconds"],
            )
        )

    def result(self, output: Path, rows: Sequence[EncodedRow], section: TrainSection, seconds: float) -> TrainResult:
        losses = [line["loss"] for line in self.lines]
        last_epoch = losses[-max(1, round(len(losses) / max(section.epochs, 1))) :]
        return TrainResult(
            output=str(output),
            rows=len(rows),
            truncated=sum(row.truncated for row in rows),
            steps=len(losses),
            tokens=int(sum(line["tokens"] for line in self.lines)),
            flat_tokens=sum(rows[k].tokens for batch in self.steps.batches for k in batch),
            first_loss=losses[0],
            last_loss=losses[-1],
            mean_loss=sum(last_epoch) / len(last_epoch),
            seconds=round(seconds, 3),
            metrics=str(self.path),
        )


class PackedTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """HF Trainer whose batch is the list of one optimizer step's micro-batches."""

    def __init__(self, *, metrics: Metrics, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.metrics = metrics
        self._step_began = 0.0
        self._step_tokens = 0

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and self.args.use_cpu:  # accelerate has no FSDP on CPU, torch has
            state = self.accelerator.state
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and self.args.bf16:
            # accelerate's own casts whatever enters a module (a loss's weights and labels, copying the attention's
            # masks for each layer) and sums gradients in bfloat16
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )

    def get_train_dataloader(self) -> DataLoader[list[MicroBatch]]:
        """In order, unsharded: the data set itself gives each process its share."""
        return DataLoader(self.train_dataset, batch_size=1, shuffle=False, collate_fn=itemgetter(0))

    def training_step(self, model: nn.Module, inputs: list[MicroBatch], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a whole optimizer batch; returns its loss, equal on all processes."""
        self._step_began = time.monotonic()
        model.train()
        losses: list[Tensor] = []
        for k, batch in enumerate(inputs):
            last = k == len(inputs) - 1
            # FSDP would keep every gradient whole on each GPU until the last pass
            with nullcontext() if last or self.is_fsdp_enabled else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    loss = model(batch.to(self.args.device))
                # processes are averaged, and the batch's weights already sum to one over all of them
                self.accelerator.backward(loss * self.args.world_size)
            losses.append(loss.detach().float())
        tokens = sum(batch.tokens for batch in inputs)
        totals = torch.stack([torch.stack(losses).sum(), torch.tensor(float(tokens), device=self.args.device)])
        if self.args.world_size > 1:
            dist.all_reduce(totals)
        self._check_finite(totals[0], losses, inputs)
        self._step_tokens = int(totals[1])
        return totals[0]

    def _check_finite(self, total: Tensor, losses: Sequence[Tensor], inputs: Sequence[MicroBatch]) -> None:
        if torch.isfinite(total):
            return
        rows = [
            name for loss, batch in zip(losses, inputs, strict=True) if not torch.isfinite(loss) for name in batch.rows
        ]
        raise UserError(
            f"the loss became {float(total)} at step {self.state.global_step + 1}"
            + (f" on the rows {', '.join(rows[:32])}" if rows else " on another process's rows"),
            need="a finite loss",
            how="look at these rows, or lower the learning rate (sft.learning_rate, ppm.learning_rate, ...)",
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if "loss" in logs:
            line = {"step": self.state.global_step, "epoch": self.state.global_step / len(self.train_dataset)}
            line["epoch"] = round(line["epoch"] * self.train_dataset.epochs, 4)
            line |= {"steps": len(self.train_dataset)} | {
                key: float(logs[key]) for key in ("loss", "learning_rate", "grad_norm") if key in logs
            }
            seconds = round(time.monotonic() - self._step_began, 4)
            self.metrics.add(line | {"tokens": self._step_tokens, "seconds": seconds})

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the Trainer's estimate needs padded inputs

    def full_state(self) -> dict[str, Tensor] | None:
        """The model's weights gathered from all shards by the first process; None where each has them whole."""
        if not self.is_fsdp_enabled:
            return None
        whole = {}
        for name, value in self.model.state_dict().items():
            gathered = value.full_tensor() if isinstance(value, DTensor) else value  # every process takes part
            if self.args.process_index == 0 and name.startswith("model."):  # a loss may have weights of its own
                whole[name.removeprefix("model.")] = gathered.cpu()
        return whole

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Weights of a checkpoint to resume from; torch's format keeps tied weights and adapters as they are."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(state_dict if state_dict is not None else self.model.state_dict(), folder / "weights.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            path = Path(resume_from_checkpoint) / "weights.pt"
            (model or self.model).load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's checkpoint, then a mark that says it is whole."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with room_for(folder):
            super()._save_checkpoint(model, trial)
        if self.args.world_size > 1:
            dist.barrier()
        if self.args.process_index == 0:
            sync_files(folder)
            (folder / _COMPLETE).touch()
