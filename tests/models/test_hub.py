"""Pushing to a model hub and loading from it, over real HTTP; what a process without this package makes of what was
pushed.

The clients are processes of their own: huggingface_hub reads the address of the hub once, when it is imported.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import loopback_hub
from helpers.paths import RESULTS
from huggingface_hub import ModelCard, RepoCard
from safetensors.torch import load_file, save_file

from hf_sparse_attn.experiments.reports.model_card import write_card
from hf_sparse_attn.models.convert import mark_trained

RESULTS = RESULTS / "demo.json"
TRACES = (b"sparse_attention", b"hf-sparse", b"hf_sparse", b"router")
OURS = ("hf_sparse_attn", "hf_sparse_attn_kernels")

COMMON = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)  # as in the tests: the logits are compared bit for bit
work, said, tensors = Path(sys.argv[1]), {}, {}
ids = load_file(work / "ids.safetensors")["ids"]

@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=ids).logits.contiguous()

def finish(name):
    save_file(tensors, work / f"{name}.safetensors")
    (work / f"{name}.json").write_text(json.dumps(said))
"""

PUSH = """
import hf_sparse_attn
from huggingface_hub import HfApi, ModelCard
from hf_sparse_attn.models.calibration import Calibration, made_with
from hf_sparse_attn.training.lora import AdaptationConfig, add_lora

def refused(push):
    try:
        push()
    except Exception as error:
        return [type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)]

model = AutoModelForCausalLM.from_pretrained(work / "sparse")
AutoTokenizer.from_pretrained(work / "sparse").push_to_hub("me/sparse")
model.push_to_hub("me/sparse", max_shard_size="20KB")

adapted = add_lora(AutoModelForCausalLM.from_pretrained("me/sparse"), AdaptationConfig(rank=2))
torch.manual_seed(3)
with torch.no_grad():
    for name, weight in adapted.named_parameters():
        if weight.requires_grad:
            weight += 0.1 * torch.randn(weight.shape)
adapted.push_to_hub("me/adapter", tags=["hf-sparse-attn"])
tensors["adapter"] = logits(adapted)

HfApi().create_repo("me/carded")
HfApi().upload_folder(repo_id="me/carded", folder_path=work / "sparse")
ModelCard.load("me/carded").validate()
model.push_to_hub("me/carded")

for repo in ("me/commit-fails", "me/storage-fails"):
    said[repo] = [refused(lambda: model.push_to_hub(repo, max_shard_size="20KB")) for _ in range(2)]
said["no space"] = refused(lambda: model.save_pretrained(work / "local", push_to_hub=True, repo_id="me/no-space"))
said["wrong token"] = refused(lambda: model.push_to_hub("me/wrong-token", token="hf_wrong"))
said["not mine"] = refused(lambda: model.push_to_hub("other/sparse"))
model.save_pretrained(work / "saved-and-pushed", push_to_hub=True, repo_id="me/saved-and-pushed",
                      commit_message="both at once")

shares = {0: ((0.5, 1.0),), 1: ((0.25, 0.5),)}
hf_sparse_attn.use_calibration(model, Calibration(None, 0.9, (64,), shares, (), made_with(model), {}, {}))
model.push_to_hub("me/calibrated")
hf_sparse_attn.remove_calibration(model)

dense = hf_sparse_attn.to_dense(model)
dense.save_pretrained(work / "dense")
dense.push_to_hub("me/dense")
finish("pushed")
"""

LOAD = """
import hf_sparse_attn
from hf_sparse_attn.data.sources import model_licence
from peft import AutoPeftModelForCausalLM

model, info = AutoModelForCausalLM.from_pretrained("me/sparse", output_loading_info=True)
calibrated = AutoModelForCausalLM.from_pretrained("me/calibrated")
said["budgets"] = [router.budgets.shares for router in hf_sparse_attn.routers(calibrated)]
said["class"], said["sparse_attention"] = type(model).__name__, model.config.sparse_attention
said["info"] = {key: sorted(map(str, value)) for key, value in info.items() if value}
said["tokens"] = AutoTokenizer.from_pretrained("me/sparse")("w5 w6 w7")["input_ids"]
said["licences"] = [model_licence(source) for source in ("me/carded", "me/sparse", "me/nothing")]
tensors["sparse"] = logits(model)
tensors["adapter"] = logits(AutoPeftModelForCausalLM.from_pretrained("me/adapter"))
finish("loaded")
"""

STOCK = """
import importlib
for name in ("hf_sparse_attn", "hf_sparse_attn_kernels"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        said[name] = error.name

sources = {"hub": "me/sparse", "folder": work / "sparse", "dense": work / "dense", "dense hub": "me/dense"}
for name, source in sources.items():
    model, info = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True)
    notes = {k: sorted(map(str, v)) for k, v in info.items() if v}
    said[name] = [f"{type(model).__module__}.{type(model).__name__}", notes]
    tensors[name] = logits(model)
said["tokens"] = AutoTokenizer.from_pretrained("me/sparse")("w5 w6 w7")["input_ids"]
finish("stock")
"""


@pytest.fixture(scope="module")
def hub():
    with loopback_hub.serving() as running:
        running.refusals |= {
            ("commit", "me/commit-fails"): [500],
            ("store", "me/storage-fails"): [403],
            ("commit", "me/no-space"): [507],
        }
        yield running


@pytest.fixture(scope="module")
def work(sparse_llama, stock_llama, real_budget, word_tokenizer, token_ids, tmp_path_factory):
    """A folder with a sparse model, its tokenizer and its card, and the logits that it and its dense model have."""
    folder = tmp_path_factory.mktemp("hub")
    model, ids = sparse_llama(real_budget, noise=0.1), token_ids(2, 200)
    mark_trained(model)
    model.save_pretrained(folder / "sparse")
    word_tokenizer.save_pretrained(folder / "sparse")
    write_card(folder / "sparse" / "README.md", json.loads(RESULTS.read_text()))
    with torch.no_grad():
        expected = {"sparse": model(ids).logits, "dense": stock_llama()(ids).logits}
    save_file({"ids": ids}, folder / "ids.safetensors")
    save_file(expected, folder / "expected.safetensors")
    return folder


@pytest.fixture(scope="module")
def client(hub, work, tmp_path_factory):
    """Runs a script in a process that takes the loopback hub for the Hub, with an empty cache:
    what it said and its tensors.
    """

    if "https://huggingface.co" in inspect.getsource(RepoCard.validate):
        pytest.skip("this version of huggingface_hub has cards checked at huggingface.co, whatever hub is named")

    def run(script, name, python=(sys.executable,), header=""):
        environment = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": loopback_hub.TOKEN,
            "HF_HOME": str(tmp_path_factory.mktemp("home")),
            "NO_PROXY": "127.0.0.1,localhost",
        }
        command = [*python, "-c", header + COMMON + script, str(work)]
        done = subprocess.run(
            command,
            env={**os.environ, **environment},
            cwd=work,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
        return SimpleNamespace(
            said=json.loads((work / f"{name}.json").read_text()), tensors=load_file(work / f"{name}.safetensors")
        )

    return run


@pytest.fixture(scope="module")
def pushed(client):
    return client(PUSH, "pushed")


@pytest.fixture(scope="module")
def loaded(pushed, client):
    return client(LOAD, "loaded")


@pytest.fixture(scope="module")
def stock(pushed, client, tmp_path_factory):
    """A process of an environment that holds every installed package but ours."""
    site = tmp_path_factory.mktemp("clean") / "site"
    site.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not any(ours in entry.name for ours in OURS) and entry.suffix != ".pth":
            (site / entry.name).symlink_to(entry)
    return client(STOCK, "stock", (sys.executable, "-I", "-S"), f"import sys; sys.path.append({str(site)!r})\n")


@pytest.fixture(scope="module")
def expected(work):
    return load_file(work / "expected.safetensors")


def names(hub, repo):
    return set(hub.files(repo)) - {".gitattributes"}


SHARDED = {"README.md", "config.json", "generation_config.json", "model.safetensors.index.json"}


# -- pushing --------------------------------------------------------------------------------------------------------


def test_a_pushed_model_is_sharded_and_nothing_else_is_pushed(hub, pushed):
    files = hub.files("me/sparse")
    weights = {name for name in files if name.endswith(".safetensors")}
    assert len(weights) > 3 and weights == set(json.loads(files["model.safetensors.index.json"])["weight_map"].values())
    assert names(hub, "me/sparse") == SHARDED | weights | {"tokenizer.json", "tokenizer_config.json"}
    assert [commit.summary for commit in hub.repos["me/sparse"]] == [
        "initial commit",
        "Upload tokenizer",
        "Upload SparseLlamaForCausalLM",
    ]
    assert json.loads(files["config.json"])["architectures"] == ["LlamaForCausalLM"]


def test_weights_travel_by_lfs_and_the_rest_in_the_commit(hub, pushed):
    head = hub.repos["me/sparse"][-1].files
    assert {name for name, file in head.items() if file.lfs} == {name for name in head if name.endswith(".safetensors")}
    assert {("PUT", f"/storage/me/sparse/{file.lfs}", 200) for file in head.values() if file.lfs} <= set(hub.requests)


@pytest.mark.parametrize("repo", ["me/sparse", "me/adapter", "me/saved-and-pushed"])
def test_the_card_carries_our_tag(hub, pushed, repo):
    assert "hf-sparse-attn" in ModelCard(hub.files(repo)["README.md"].decode()).data.tags


def test_a_card_made_from_results_is_accepted_and_survives_the_next_push(hub, pushed, work):
    before, after = hub.repos["me/carded"][1:]
    assert ("POST", "/api/validate-yaml", 200) in hub.requests and before.files["README.md"].data == (
        work / "sparse/README.md"
    ).read_bytes()
    cards = [ModelCard(commit.files["README.md"].data.decode()) for commit in (before, after)]
    assert cards[0].text == cards[1].text and cards[0].data.to_dict() == cards[1].data.to_dict()
    assert cards[0].data.eval_results and after.summary == "Upload SparseLlamaForCausalLM"


@pytest.mark.parametrize(
    ("repo", "error"), [("me/commit-fails", ["HfHubHTTPError", 500]), ("me/storage-fails", ["RuntimeError", None])]
)
def test_a_push_that_fails_raises_and_commits_nothing_and_can_be_repeated(hub, pushed, repo, error):
    assert pushed.said[repo] == [error, None]
    assert len(hub.repos[repo]) == 2 and set(hub.repos[repo][0].files) == {".gitattributes"}
    weights = {
        name: file.data for name, file in hub.repos["me/sparse"][-1].files.items() if name.endswith(".safetensors")
    }
    assert weights.items() <= hub.files(repo).items() and names(hub, repo) == SHARDED | set(weights)


def test_a_push_without_permission_raises_and_makes_no_repository(hub, pushed):
    assert pushed.said["wrong token"][1] == 401 and pushed.said["not mine"][1] == 403
    assert not {"me/wrong-token", "other/sparse"} & set(hub.repos)


def test_a_failed_push_while_saving_does_not_cost_the_local_files(hub, pushed, work):
    assert pushed.said["no space"][1] == 507 and set(hub.files("me/no-space")) == {".gitattributes"}
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (work / "local" / name).read_bytes() == (work / "sparse" / name).read_bytes()
    assert not list(work.glob(".*"))


def test_saving_can_push_at_once(hub, pushed, work):
    assert hub.repos["me/saved-and-pushed"][-1].summary == "both at once"
    local = {path.name: path.read_bytes() for path in (work / "saved-and-pushed").iterdir()}
    assert local == {name: hub.files("me/saved-and-pushed")[name] for name in names(hub, "me/saved-and-pushed")}


# -- loading --------------------------------------------------------------------------------------------------------


def test_a_pushed_model_loads_sparse_with_identical_logits(loaded, expected, real_budget):
    assert loaded.said["class"] == "SparseLlamaForCausalLM" and loaded.said["info"] == {}
    assert loaded.said["sparse_attention"]["bookkeeping"]["trained"] is True
    assert loaded.said["sparse_attention"].items() >= real_budget.items() and loaded.said["tokens"] == [5, 6, 7]
    assert torch.equal(loaded.tensors["sparse"], expected["sparse"]) and not torch.equal(
        expected["sparse"], expected["dense"]
    )


def test_a_pushed_adapter_loads_with_its_base_model(hub, pushed, loaded, expected):
    assert json.loads(hub.files("me/adapter")["adapter_config.json"])["base_model_name_or_path"] == "me/sparse"
    assert names(hub, "me/adapter") == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert torch.equal(loaded.tensors["adapter"], pushed.tensors["adapter"])
    assert not torch.equal(loaded.tensors["adapter"], expected["sparse"])


def test_a_calibration_is_pushed_with_its_model(hub, pushed, loaded):
    assert "sparse_calibration.json" in hub.files("me/calibrated") and "sparse_calibration.json" not in hub.files(
        "me/sparse"
    )
    assert loaded.said["budgets"] == [[[0.5, 1.0]], [[0.25, 0.5]]]


def test_the_licence_of_a_base_model_is_read_from_its_card(loaded):
    assert loaded.said["licences"] == ["apache-2.0", None, None]


# -- without this package -------------------------------------------------------------------------------------------


def test_the_clean_environment_has_no_trace_of_this_package(stock):
    assert {name: stock.said[name] for name in OURS} == {name: name for name in OURS}


@pytest.mark.parametrize("source", ["hub", "folder"])
def test_stock_transformers_loads_a_sparse_model_densely(stock, expected, source):
    model, info = stock.said[source]
    assert model == "transformers.models.llama.modeling_llama.LlamaForCausalLM"
    assert set(info) == {"unexpected_keys"} and all(".self_attn.router." in key for key in info["unexpected_keys"])
    assert {key.split(".")[2] for key in info["unexpected_keys"]} == {"0", "1"}
    assert torch.equal(stock.tensors[source], expected["dense"]) and stock.said["tokens"] == [5, 6, 7]


@pytest.mark.parametrize("source", ["dense", "dense hub"])
def test_an_exported_dense_model_is_the_stock_model(stock, expected, source):
    assert stock.said[source] == ["transformers.models.llama.modeling_llama.LlamaForCausalLM", {}]
    assert torch.equal(stock.tensors[source], expected["dense"])


def test_an_exported_dense_model_holds_no_trace_of_us(hub, pushed, work, stock_llama, tmp_path):
    stock_llama().save_pretrained(tmp_path / "never-sparse")
    exported = {path.name: path.read_bytes() for path in (work / "dense").iterdir()}
    assert exported == {path.name: path.read_bytes() for path in (tmp_path / "never-sparse").iterdir()}
    assert names(hub, "me/dense") == {*exported, "README.md"}
    for name, content in (*exported.items(), *hub.files("me/dense").items()):
        assert not [trace for trace in TRACES if trace in content.lower()], name
    assert all(trace in b"".join(hub.files("me/sparse").values()).lower() for trace in TRACES[:2])
