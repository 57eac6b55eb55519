"""Modules of version 0.1.0 that have other names since: importing one says the new name.

Adapters that 0.1.0 saved without a task name the class of their model by module: that module still gives the class.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = __name__.partition(".")[0]
PICKLES = (
    f"Whole models that {PACKAGE} 0.1.0 pickled (torch.save(model)) cannot be read by this version: load them with "
    "0.1.0 "
    f"(pip install '{PACKAGE}==0.1.0') and save them with model.save_pretrained(folder), which every version reads"
)
# old name, new name; those that kept theirs are not listed
_TABLE = """
precision system.precision
locks system.locks
exchange system.exchange
scratch system.scratch
outputs system.outputs
files system.files
progress system.progress
environment system.environment
plain_yaml experiments.plain_yaml
versions architectures.versions
made architectures.class_factory
cache_arguments architectures.cache_arguments
rotary router.rotary
plan router.budget
head_budgets router.head_budgets
selecting router.selection
single router.single_query
asking attention.call
attending attention.layer
masks attention.mask_interface
mask_4d attention.mask_4d
segments attention.documents
dense attention.dense
cache attention.cache
cache_adoption attention.cache_adoption
static_decode attention.static_decode
opaque attention.custom_op
numbered attention.object_registry
ambient attention.call_context
gradients attention.gradients
untrained attention.gradients
checks attention.checks
composite models.config_dispatch
dispatch models.config_dispatch
registration models.registration
sites models.attach
conversion models.convert
saving models.checkpoint
calibration models.calibration
adapters models.adapters
adapter_marks models.adapter_settings
adapter_states models.adapter_states
adapter_swaps models.adapter_swaps
numbering models.layer_numbers
checkpointing models.gradient_checkpointing
prefill models.generate_hooks
self_test models.self_test
kept_tests models.self_test_results
model_inputs data.model_inputs
budgets training.mass_threshold
training.adaptation training.lora
training.bar training.progress_callback
training.carrying attention.gradients
training.collecting training.objective
training.losses training.router_loss
training.processes training.distributed
training.svd training.index_init
data.encodings data.decoding
data.labelled experiments.rows.class_labels
data.pieces data.document_chunks
data.series experiments.rows.time_series
data.split experiments.rows.time_split
data.streaming data.row_dataset
data.survey data.file_check
data.tokens data.tokenization
evaluation.allocations experiments.scores.budget_allocation
evaluation.sharing evaluation.shared_threshold
evaluation.calibrating evaluation.calibrate
evaluation.comparison experiments.scores.perplexity
evaluation.harness evaluation.lm_eval_harness
evaluation.needs evaluation.calibration_observers
evaluation.predictions evaluation.divergence
evaluation.selectors evaluation.baselines
evaluation.shares evaluation.statistics
evaluation.tasks experiments.scores.task_scores
profiling.attention benchmarks.attention_call
profiling.budgets benchmarks.varying_budgets
profiling.calibration benchmarks.planner.cpu_rates
profiling.checking benchmarks.planner.check
profiling.contenders benchmarks.contenders
profiling.devices benchmarks.planner.devices
profiling.gpu.causes benchmarks.gpu.causes
profiling.gpu.launch_grid benchmarks.gpu.launch_grid
profiling.gpu.limits benchmarks.gpu.limits
profiling.gpu.models benchmarks.gpu.whole_models
profiling.gpu.rows benchmarks.gpu.rows
profiling.layer benchmarks.layer_shape
profiling.layouts benchmarks.padding_vs_packing
profiling.memory benchmarks.memory
profiling.meters benchmarks.timing
profiling.model benchmarks.generation
profiling.peers benchmarks.dense_baselines
profiling.planning benchmarks.planner.plan
profiling.plot benchmarks.plot
profiling.simulation benchmarks.planner.meta_step
profiling.training benchmarks.training_step
profiling.work benchmarks.planner.attention_cost
pipeline.recipe experiments.recipe
pipeline.recipe_values experiments.recipe_values
pipeline.kinds experiments.value_kinds
pipeline.run experiments.run
pipeline.engine experiments.steps
pipeline.sizing experiments.sizing
pipeline.ablation experiments.tasks.ablation_run
pipeline.classification experiments.tasks.classification
pipeline.forecasting experiments.tasks.forecasting
pipeline.language experiments.tasks.language_model
pipeline.planted_links experiments.tasks.planted_links
pipeline.questions experiments.tasks.question_answering
pipeline.robustness experiments.tasks.robustness_run
pipeline.task experiments.tasks.selection_scores
pipeline.training experiments.tasks.distil_and_adapt
pipeline.card experiments.reports.model_card
pipeline.figures experiments.reports.figures
pipeline.rendering experiments.reports.rendering
pipeline.report experiments.reports.html_report
ablation.costs experiments.ablation.costs
ablation.factors experiments.ablation.factors
ablation.readings experiments.ablation.readings
ablation.table experiments.ablation.level_table
longlink.answers experiments.longlink.link_answers
longlink.ceilings experiments.longlink.ceilings
longlink.export experiments.longlink.export
longlink.families experiments.longlink.families
longlink.learning experiments.longlink.learning
longlink.metrics experiments.longlink.link_metrics
longlink.planting experiments.longlink.planting
longlink.routing experiments.longlink.cause_recall
longlink.study experiments.longlink.study
cli_options cli.options
cli_bench cli.bench
cli_training cli.bench_training
cli_evaluation cli.measure
data.ruler experiments.rows.ruler
data.series_files experiments.rows.series_files
data.stamps experiments.rows.stamps
evaluation.answers experiments.scores.answers
evaluation.robustness experiments.scores.robustness
training.arguments training.config
training.schedule training.config
"""
_WORDS = _TABLE.split()
MOVED = dict(zip(_WORDS[::2], _WORDS[1::2], strict=True))
GONE = ("training.targets", "ablation.residual", "ablation.variants")  # experiments that lost
# modules that are packages since, or gave names to another one: where the names of the module are
NAMES = {
    "attention": ("attention.interface", ("SparseAttentionMixin", "sparse_attention_forward")),
    "router": ("router.module", ("SparseRouter", "RoutingInputs", "active_router", "QUERY_RUNS", "KEY_CHUNK")),
    "cli": ("cli.commands", ("app",)),
    "data.sources": ("data.text_documents", ("Document", "read_documents", "read_text", "text_of_html")),
}
RECORDED = "registration"  # the module that adapters of 0.1.0 name


def new_name(old: str) -> str | None:
    """What to say of the module ``old`` of 0.1.0 (without the package's name);
    None for a module that it did not have.
    """
    if old in MOVED:
        return f"{PACKAGE}.{old} of version 0.1.0 is {PACKAGE}.{MOVED[old]}. {PICKLES}"
    if old in GONE:
        return (
            f"{PACKAGE}.{old} of version 0.1.0 is no more: what it tried was not better, LOG.md of the source "
            f"says by how much. {PICKLES}"
        )
    within = {name: new for name, new in MOVED.items() if name.startswith(f"{old}.")}
    if not within:
        return None
    places = ", ".join(f"{name} is {new}" for name, new in within.items())
    return f"{PACKAGE}.{old} of version 0.1.0 has moved: {places}. {PICKLES}"


class OldNames(MetaPathFinder):
    """Asked last, where a module is not there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, old = fullname.partition(".")
        if package != PACKAGE:
            return None
        if old == RECORDED:
            return ModuleSpec(fullname, _Recorded())
        message = new_name(old)
        if message is not None:
            raise ModuleNotFoundError(message, name=fullname)
        # 0.1.0 had no such module: Python's own error says enough
        return None


class _Recorded(Loader):
    """Makes the module that adapters name: it has the sparse model classes, as the package itself has, and nothing
    else.
    """

    def exec_module(self, module: ModuleType) -> None:
        def look_up(name: str) -> Any:
            cls = getattr(import_module(PACKAGE), name, None) if name.startswith("Sparse") else None
            if hasattr(cls, "from_pretrained"):
                return cls
            # what Python itself asks of any module, such as __path__
            if name.startswith("__"):
                raise AttributeError(name)
            raise ImportError(f"{name}: {new_name(RECORDED)}")

        vars(module)["__getattr__"] = look_up


def names_of_module(package: str) -> Callable[[str], Any]:
    """``__getattr__`` of a package that was a module: raises ImportError with the new place of the module's names."""
    place, names = NAMES[package]

    def look_up(name: str) -> Any:
        if name in names:
            raise ImportError(f"{PACKAGE}.{package}.{name} of version 0.1.0 is {PACKAGE}.{place}.{name}. {PICKLES}")
        raise AttributeError(f"module '{PACKAGE}.{package}' has no attribute {name!r}")

    return look_up


def install() -> None:
    """Let imports of old names say the new ones."""
    if not any(isinstance(finder, OldNames) for finder in sys.meta_path):
        sys.meta_path.append(OldNames())
