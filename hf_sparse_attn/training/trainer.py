"""The joint stage as a piece of Transformers' Trainer (and TRL's SFTTrainer)."""

from __future__ import annotations

import inspect
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..attention.call import SparseCall
from ..config import IGNORE_INDEX
from ..models.convert import take_routers
from ..system.environment import peak_bytes
from .config import SparseTrainingConfig
from .distributed import mean_over_processes
from .objective import RouterStatistics, SparseObjective, TrainingForward, mean_statistics, split_parameters

PREVIEW_TOKENS = 12  # of a batch that gave no finite loss


class NonFiniteLossError(RuntimeError):
    """A loss or gradient that is NaN or infinite; the state before the step was saved."""


class SparseTrainerMixin:
    """In front of a Trainer class: ``class Mine(SparseTrainerMixin, SFTTrainer)``. Takes ``sparse_training``, a
    SparseTrainingConfig.

    Adds the routers' KL to the loss, exactly: weighted as the task loss is over micro-batches and processes. Gives
    routers a learning rate of their own, runs every so many steps dense, anneals, logs what the routers do, and stops
    at the first loss that is not finite, with the state before it saved.

    A reference model that the trainer makes itself (TRL's DPO, KTO, GRPO, RLOO) gets the routers of the model that is
    trained; where such a trainer logs a ``kl`` of its own, that of the routers is ``router_kl``. ``model_init`` is
    served.

    Raises:
        ValueError: the model has no routers, or the settings do not fit it.
    """

    args: TrainingArguments
    state: Any
    accelerator: Any
    model: Any

    def __init__(self, *args: Any, sparse_training: SparseTrainingConfig | None = None, **kwargs: Any) -> None:
        self._sparse_training = sparse_training
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                "nn.DataParallel over several GPUs of one process is not supported: start the script with accelerate "
                "launch"
            )
        self.objective = SparseObjective(self.model, sparse_training)
        # also what was given by position: a reference model of the user's own is left as it is
        given = {**kwargs, **inspect.signature(super().__init__).bind_partial(*args, **kwargs).arguments}
        reference = getattr(self, "ref_model", None)
        # TRL loaded it from the folder that the model once came from
        if given.get("ref_model") is None and reference is not None:
            take_routers(self.accelerator.unwrap_model(reference), self.model)
        self._begin()

    def _begin(self) -> None:
        """Forget what was collected for the log."""
        self._statistics: list[RouterStatistics] = []
        self._tokens, self._kl = 0, 0.0
        self._logged_step = self.state.global_step
        self._since = time.perf_counter()
        self._micro_step = (-1, 0)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As Trainer's; the model that it makes is the one whose routers are trained."""
        model: nn.Module = super().call_model_init(trial)  # type: ignore[misc]
        self.objective = SparseObjective(model, self._sparse_training)
        return model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        exists = getattr(self, "optimizer", None) is not None  # the user's own
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)  # type: ignore[misc]
        routers, _ = split_parameters(self.model if model is None else model)
        if exists or not routers:
            return optimizer
        # the stock method has put them among the other weights
        known = set(map(id, routers))
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in known]
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        optimizer.add_param_group({"params": routers, **self.objective.router_group})
        return optimizer

    # loss = task loss + share · kl_weight · KL, share the part of the step's label tokens that this micro-batch has
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        forward = self.objective.forward(self.state.global_step, self.state.max_steps)
        share = self._share(inputs, num_items_in_batch)
        called = {**inputs, "sparse_call": forward}
        with self._handed_on(forward):
            got = super().compute_loss(model, called, return_outputs, num_items_in_batch)  # type: ignore[misc]
        # TRL runs the model again for outputs that are asked for
        loss, outputs = got if return_outputs else (got, None)
        kl = forward.kl_loss(share).to(loss)
        loss = loss + kl
        # the KL as it enters the step: where Trainer divides the loss by the micro-batches, the KL is divided, too
        self._note(
            forward,
            inputs,
            float(kl.detach()) / (1 if self._undivided(num_items_in_batch) else self.args.gradient_accumulation_steps),
        )
        self._check_finite(loss, inputs)
        return (loss, outputs) if return_outputs else loss

    def _share(self, inputs: dict[str, Any], num_items: Any) -> Any:
        """The part of the optimiser step's loss that this micro-batch is: what is done to the task loss, for a mean."""
        if not self._undivided(num_items):
            return 1.0
        labels = inputs.get("shift_labels", inputs.get("labels"))
        if num_items is None or labels is None:
            return 1 / self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
        if "shift_labels" not in inputs and self._loss_shifts_labels:  # type: ignore[attr-defined]
            labels = labels[..., 1:]
        # Trainer multiplies a loss over all processes' tokens by their number, since gradients are averaged over them
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return processes * labels.ne(IGNORE_INDEX).sum() / num_items

    def _undivided(self, num_items: Any) -> bool:
        """Whether Trainer takes the loss as it is, and does not divide it by the number of micro-batches:
        its rule in `training_step`.
        """
        # of trainers with a loss of their own, as TRL's
        scales: bool | None = getattr(self, "loss_is_scaled_for_ga", None)
        if scales is not None:
            return scales
        counted = num_items is not None and self.model_accepts_loss_kwargs  # type: ignore[attr-defined]
        return counted or self.compute_loss_func is not None  # type: ignore[attr-defined]

    @contextmanager
    def _handed_on(self, call: SparseCall) -> Iterator[None]:
        """Give the model's passes with gradients ``call``, also where a trainer makes the model's arguments itself, as
        GRPO does.
        """

        def hand_on(_model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            # passes without gradients are those of a reference or of generation: the routers decide there as always
            learns = torch.is_grad_enabled() and "sparse_call" not in kwargs
            return args, {**kwargs, "sparse_call": call} if learns else kwargs

        # of a compiled model every new hook would make a new graph
        hook = None if self.args.torch_compile else self.model.register_forward_pre_hook(hand_on, with_kwargs=True)
        try:
            yield
        finally:
            if hook is not None:
                hook.remove()

    def _note(self, forward: TrainingForward, inputs: dict[str, Any], kl: float) -> None:
        step, micro = self._micro_step
        if self.state.global_step < step:  # another run
            self._begin()
        self._statistics.append(forward.statistics())
        self._kl += kl
        main = inputs.get(getattr(self.model, "main_input_name", "input_ids"), inputs.get("input_ids"))
        self._tokens += 0 if main is None else main.shape[0] * (main.shape[1] if main.ndim > 1 else 1)
        if step < 0:  # the first micro-batch of this process, perhaps of a resumed run
            self._logged_step = self.state.global_step
        self._micro_step = (self.state.global_step, micro + 1 if step == self.state.global_step else 0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._statistics and "loss" in logs:
            seconds, self._since = time.perf_counter() - self._since, time.perf_counter()
            steps, self._logged_step = self.state.global_step - self._logged_step, self.state.global_step
            statistics = {**mean_statistics(self._statistics), "own_kl": self._kl, "tokens": float(self._tokens)}
            means = mean_over_processes(statistics, self.accelerator.device)
            if "kl" in getattr(self, "_metrics", {}).get("train", ()):  # TRL's, of the policy from its reference
                means["router_kl"] = means.pop("kl")
            # Trainer logs the sum of both
            logs["task_loss"] = logs["loss"] - means.pop("own_kl") / max(1, steps)
            logs["tokens_per_second"] = means.pop("tokens") * self.accelerator.num_processes / seconds
            logs.update(means)
            logs["peak_memory_bytes"] = peak_bytes()
            self._statistics, self._tokens, self._kl = [], 0, 0.0
        super().log(logs, start_time)  # type: ignore[misc]

    # -- losses that are not finite --------------------------------------------------------------------------------

    def _check_finite(self, loss: Tensor, inputs: dict[str, Any]) -> None:
        bad = (~torch.isfinite(loss.detach())).float().reshape(1)
        if self.accelerator.num_processes > 1:  # all processes stop together
            bad = self.accelerator.gather(bad)
        if bool(bad.any()):
            cause = "" if torch.isfinite(loss.detach()) else f" on the batch that begins with {self._preview(inputs)}"
            self._stop(f"the loss is {float(loss.detach())}{cause}")

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        # with a loss scaler (fp16) infinite gradients belong to the search for a scale: it skips the step
        norm = super()._clip_grad_norm(model)  # type: ignore[misc]
        if norm is not None and getattr(self.accelerator, "scaler", None) is None and not math.isfinite(float(norm)):
            self._stop(f"the gradient's norm is {float(norm)}")
        return norm

    def _stop(self, what: str) -> None:
        step, micro = self._micro_step
        self._save_checkpoint(self.model, trial=None)  # type: ignore[attr-defined]
        raise NonFiniteLossError(
            f"{what}, in optimiser step {step + 1}, micro-batch {micro + 1}. The state before this step is in "
            f"{self.args.output_dir}/{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}: look at this batch, or lower "
            "the learning rate"
        )

    def _preview(self, inputs: dict[str, Any]) -> str:
        ids = inputs.get("input_ids")
        if ids is None:
            return ", ".join(
                f"{name} {tuple(value.shape)}" for name, value in inputs.items() if hasattr(value, "shape")
            )
        tokens = ids[0, :PREVIEW_TOKENS].tolist()
        decode = getattr(getattr(self, "processing_class", None), "decode", None)
        return f"tokens {tokens}" + ("" if decode is None else f" ({decode(tokens)!r})")


class SparseTrainer(SparseTrainerMixin, Trainer):  # type: ignore[misc]
    """Transformers' Trainer with the joint stage."""


def last_checkpoint(folder: str | Path, below: int | None = None) -> Path | None:
    """The newest complete checkpoint of a run's folder, of a step ``below`` that one if given.

    Trainer writes its state last, so a checkpoint without it was cut off.
    """
    checkpoints = []
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            state = json.loads((path / "trainer_state.json").read_text())
        except (OSError, json.JSONDecodeError):
            continue
        if below is None or state["global_step"] < below:
            checkpoints.append((int(state["global_step"]), path))
    return max(checkpoints)[1] if checkpoints else None
