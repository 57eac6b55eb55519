"""Every kind of report, written from results that were measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.paths import RESULTS

from hf_sparse_attn.experiments.reports import html_report

REPORTS: dict[str, Callable[[str | Path, dict[str, Any]], None]] = {  # file of results -> what writes its report
    "demo_avx2": html_report.write_report,  # with speed, and with what was left out
    "long_documents": html_report.write_report,  # before and after joint training
    "ruler": html_report.write_report,  # answers of questions
    "encoder_classification": html_report.write_task_report,
    "sensors_patchtst": html_report.write_task_report,
    "gaps": html_report.write_evaluation_report,
    "lm_eval_ruler": html_report.write_harness_report,
    "calibration": html_report.write_calibration_report,
    "calibration_keys": html_report.write_calibration_report,  # one that was not stored
    "longlink": html_report.write_longlink_report,
    "ablation": html_report.write_ablation_report,
    "robustness": html_report.write_robustness_report,
}


def written_report(name: str, folder: Path) -> Path:
    """The report of ``recipes/results/NAME.json``, written into ``folder``."""
    page = folder / f"{name}.html"
    REPORTS[name](page, json.loads((RESULTS / f"{name}.json").read_text()))
    return page
