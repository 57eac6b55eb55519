"""Task ``forecasting``: PatchTST on series of many channels, trained from scratch if there is no pretrained one."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PatchTSTConfig, PatchTSTForPrediction, PreTrainedModel, Trainer, TrainingArguments

from ...models.registration import sparse_class, sparse_config
from ...system.files import replaced_folder
from ...training.lora import collate_rows
from ...training.trainer import last_checkpoint
from ..recipe import RecipeError
from ..rows.time_series import SeriesRows, SeriesTable, evaluation_rows, read_series
from ..scores.task_scores import Row, forecast_errors, forecast_score, forecast_table
from .selection_scores import TaskRun

NEW = "new:patchtst"


class ForecastingRun(TaskRun):
    """A token is a patch of one channel."""

    score = staticmethod(forecast_score)

    @cached_property
    def table(self) -> SeriesTable:
        data, series = self.recipe.data, self.recipe.series
        if data["split"] is None:
            raise RecipeError("task forecasting cuts every series in time: set data.split and no data.eval")
        return read_series(
            data["train"], data["split"], series["time"], series["machine"], series["channels"], series["time_format"]
        )

    @property
    def context(self) -> int:
        """Steps that the model reads."""
        return self._one_length() * int(self.recipe.series["patch"])

    def _convert(self) -> dict[str, Any]:
        horizon = self.recipe.series["horizon"]
        evaluation_rows(self.table, self.context, horizon, 1)  # raises before anything is trained
        result: dict[str, Any] = {"license": self.recipe.model["license"], "data": self.table.report()}
        if self.recipe.model["source"] == NEW:
            model, result["pretrain_log"] = self._pretrained()
        else:
            model = self._checked(PatchTSTForPrediction.from_pretrained(self.recipe.model["source"], dtype=self.dtype))
        with replaced_folder(self.state / "base") as temporary:
            model.save_pretrained(temporary)
        return {**result, "parameters": sum(p.numel() for p in model.parameters())}

    def _shape(self) -> dict[str, int]:
        series = self.recipe.series
        shape = {
            "num_input_channels": len(self.table.channels),
            "context_length": self.context,
            "prediction_length": series["horizon"],
        }
        return {**shape, "patch_length": series["patch"], "patch_stride": series["patch"]}

    def _checked(self, model: PreTrainedModel) -> PreTrainedModel:
        for name, value in self._shape().items():
            if getattr(model.config, name) != value:
                raise RecipeError(
                    f"{self.recipe.model['source']} has {name} {getattr(model.config, name)}, the recipe and its data "
                    f"{value}"
                )
        return model

    def _pretrained(self) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
        """A new model, trained densely: there are no pretrained weights for other people's sensors."""
        settings = self.recipe.series["pretrain"]
        if settings.get("max_steps", 0) < 1:
            raise RecipeError(
                f"model.source is {NEW}: series.pretrain.max_steps must say for how many steps it is trained"
            )
        torch.manual_seed(self.recipe.seed)
        # what the recipe says of the model comes last
        config = PatchTSTConfig(
            **{**self._shape(), "scaling": "std", "norm_type": "layernorm", **self.recipe.series["model"]}
        )
        model: Any = PatchTSTForPrediction(config).to(dtype=self.dtype)  # type: ignore[call-arg]
        trainer_arguments = {
            "output_dir": str(self.state / "pretrain"),
            "seed": self.recipe.seed,
            "dataloader_pin_memory": False,
        }
        arguments = TrainingArguments(**{**trainer_arguments, "report_to": [], "save_total_limit": 2, **settings})
        count = settings["max_steps"] * arguments.train_batch_size * arguments.gradient_accumulation_steps
        rows = SeriesRows(self.table, self.context, config.prediction_length, count, self.recipe.seed)
        trainer = Trainer(model, arguments, collate_rows, rows)
        checkpoint = last_checkpoint(self.state / "pretrain", below=settings["max_steps"])
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return model.cpu(), [
            {"step": row["step"], "loss": row["loss"]} for row in trainer.state.log_history if "loss" in row
        ]

    def _base(self) -> PreTrainedModel:
        config = sparse_config(PatchTSTConfig.from_pretrained(self.state / "base"), self.recipe.sparse_attention)
        return self._loaded(self.state / "base", config=config, dtype=self.dtype)

    def _model(self) -> PreTrainedModel:
        return self._loaded(self.folder / "model")

    @staticmethod
    def _loaded(folder: Path, **options: Any) -> PreTrainedModel:
        cls: Any = sparse_class(PatchTSTForPrediction)
        return cls.from_pretrained(folder, **options).eval()  # type: ignore[no-any-return]

    def _rows(self) -> SeriesRows:
        settings, adaptation = self.recipe.lora, self.recipe.adaptation
        count = settings["steps"] * adaptation.batch_size * adaptation.accumulation * self.processes.num_processes
        # the seeds of pretraining, this stage and distilling differ, and so do their rows
        return SeriesRows(self.table, self.context, self.recipe.series["horizon"], count, self.recipe.seed + 1)

    def _distillation_batches(self) -> tuple[list[dict[str, Tensor]], list[str]]:
        rows = SeriesRows(
            self.table,
            self.context,
            self.recipe.series["horizon"],
            self.recipe.distill["batches"],
            self.recipe.seed + 2,
        )
        names = [f"{rows.series[which].machine}[{start}]" for which, start in rows.places]
        return [{"past_values": rows[i]["past_values"][None].to(self.dtype)} for i in range(len(rows))], names

    def _evaluation_rows(self) -> list[tuple[str, Row]]:
        horizon, windows = self.recipe.series["horizon"], self.recipe.quality[0].windows
        return evaluation_rows(self.table, self.context, horizon, windows)  # type: ignore[return-value]

    def _baselines(self) -> list[dict[str, Any]]:
        """Forecasts that read nothing but the past of their own channel:
        the last value, and that of one period before.
        """
        series, scores = self.recipe.series, []
        for name, row in self._evaluation_rows():
            past, horizon = row["past_values"], series["horizon"]
            # [horizon, channels]
            forecasts = {"last value": past[-1:].expand(horizon, -1)}
            if series["period"] is not None:
                # the last period over and over, cut to the horizon
                period = past[-series["period"] :]
                forecasts["one period before"] = period.repeat(-(-horizon // len(period)), 1)[:horizon]
            scores += [
                {"row": name, "keys": None, "selection": kind, **forecast_errors(forecast, row["future_values"])}
                for kind, forecast in forecasts.items()
            ]
        return scores

    def tables(self, results: dict[str, Any]) -> list[dict[str, Any]]:
        reference = results.get("reference", {}).get("scores")
        before = (
            {(r["keys"], r["selection"]): r for r in forecast_table(results["before"]["scores"])}
            if "before" in results
            else {}
        )
        rows = []
        for row in forecast_table(self._baselines(), reference) + forecast_table(
            results["evaluation"]["scores"], reference
        ):
            over, old = row.get("over_reference"), before.get((row["keys"], row["selection"]))
            rows.append(
                [
                    *(row["selection"], "" if row["keys"] is None else str(row["keys"]), str(row["n"])),
                    *("" if old is None else f"{old['mse']:.4f}", f"{row['mse']:.4f}", f"{row['mae']:.4f}"),
                    "" if over is None else f"{over['ratio']:.3f} [{over['low']:.3f}, {over['high']:.3f}]",
                ]
            )
        patches, horizon = self._one_length(), self.recipe.series["horizon"]
        where = f"{horizon} steps after {self.context} ({patches} patches), of time after what trained"
        note = f"{where}; errors of normalised channels, means over n rows."
        columns = ["forecast", "keys", "n", "MSE before", "MSE", "MAE", "MSE over dense LoRA, 95 %"]
        return [{"title": "Forecasts", "note": note, "columns": columns, "rows": rows}]
