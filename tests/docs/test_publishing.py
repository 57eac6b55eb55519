"""What publishes the package: workflows that call targets of the Makefile, forms, the citation, the list of changes."""

from __future__ import annotations

import re

import pytest
import yaml
from helpers.markdown_pages import ROOT, label

import hf_sparse_attn

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
PINNED = re.compile(r"\./[\w./-]+|[\w.-]+/[\w./-]+@(v\d+(\.\d+)*|[0-9a-f]{40})")


def loaded(path):
    return yaml.safe_load(path.read_text())


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job.get("steps", [])]


def called(workflow):
    """Targets of all ``make`` calls of a workflow, its matrix filled in."""
    words = [
        match
        for step in steps(workflow)
        for match in re.findall(r"\bmake ([\w-]+|\$\{\{ matrix\.target \}\})", step.get("run", ""))
    ]
    matrix = [
        target
        for job in workflow["jobs"].values()
        for target in job.get("strategy", {}).get("matrix", {}).get("target", [])
    ]
    return [target for word in words for target in (matrix if word.startswith("$") else [word])]


@pytest.mark.parametrize("path", WORKFLOWS, ids=label)
def test_workflows_call_targets_that_exist(path):
    targets = called(loaded(path))
    assert targets and set(targets) <= TARGETS


def test_the_public_host_runs_what_ci_runs():
    here = re.findall(r"^make ([\w-]+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert set(called(loaded(ROOT / ".github/workflows/ci.yml"))) == set(here) and set(here) <= TARGETS


@pytest.mark.parametrize("path", WORKFLOWS, ids=label)
def test_actions_are_pinned_and_permissions_are_named(path):
    workflow = loaded(path)
    uses = [step["uses"] for step in steps(workflow) if "uses" in step] + [
        job["uses"] for job in workflow["jobs"].values() if "uses" in job
    ]
    assert uses and not [use for use in uses if not PINNED.fullmatch(use)]
    assert workflow["permissions"] == {"contents": "read"}  # what a job needs beyond that, it names
    assert all("timeout-minutes" in job for job in workflow["jobs"].values() if "steps" in job)


def test_a_release_is_tested_built_twice_checked_and_published_without_a_token():
    workflow = loaded(ROOT / ".github/workflows/release.yml")
    jobs = workflow["jobs"]
    assert (
        jobs["ci"]["uses"] == "./.github/workflows/ci.yml"
        and jobs["build"]["needs"] == "ci"
        and jobs["publish"]["needs"] == "build"
    )
    runs = [step.get("run", "") for step in jobs["build"]["steps"]]
    assert "make dist" in runs and any("twine" in run and "check --strict dist/*" in run for run in runs)
    assert (
        jobs["publish"]["permissions"] == {"id-token": "write"}
        and "secrets." not in (ROOT / ".github/workflows/release.yml").read_text()
    )


@pytest.mark.parametrize("path", FORMS, ids=label)
def test_forms_have_what_the_host_wants(path):
    form = loaded(path)
    assert {"name", "description", "body"} <= set(form) and form["body"]
    for field in form["body"]:
        assert field["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes") and field["attributes"].get(
            "label"
        )
    assert len({field["id"] for field in form["body"]}) == len(form["body"])


def test_forms_name_commands_that_exist(builder):
    verbs = dict(builder("cli_page").commands(builder("cli_page").application()))
    named = {verb for path in FORMS for verb in re.findall(r"hf-sparse-attn ([a-z]+)", path.read_text())}
    assert named and all(verb in verbs or f"{verb} attention" in verbs for verb in named)


def test_the_citation_is_of_this_version():
    citation = loaded(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors", "license"} <= set(citation)
    assert str(citation["version"]) == hf_sparse_attn.__version__ and citation["authors"] == [
        {"name": "hf_sparse_attn maintainers"}
    ]
    readme = (ROOT / "README.md").read_text()
    assert all(
        reference["url"] in readme and reference["authors"] and reference["year"]
        for reference in citation["references"]
    )


def test_the_newest_changes_are_of_this_version():
    versions = re.findall(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == hf_sparse_attn.__version__ and versions == sorted(
        versions, key=lambda v: [*map(int, v.split("."))], reverse=True
    )
