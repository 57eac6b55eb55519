"""Which versions of Transformers are taken, and the self-test under those that came out later;
how a layer's cache is found.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from hf_sparse_attn_kernels import default_choice
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.models.llama.modeling_llama import LlamaAttention

from hf_sparse_attn import routers, sparse_class, sparse_config, sparsify
from hf_sparse_attn.architectures.cache_arguments import CACHE_ARGUMENTS, MODEL_ARGUMENT, is_cache
from hf_sparse_attn.architectures.class_factory import accepted_names
from hf_sparse_attn.architectures.versions import check_transformers, checked_transformers, is_tested
from hf_sparse_attn.attention import interface
from hf_sparse_attn.attention.cache import SparseCacheLayerMixin
from hf_sparse_attn.cli.commands import app
from hf_sparse_attn.models import self_test, self_test_results
from hf_sparse_attn.models.attach import sparse_attention_class
from hf_sparse_attn.models.config_dispatch import SparseConfigMixin
from hf_sparse_attn.models.self_test import SelfTestError, require_self_test, run_self_test

NEWER = "5.99.0"


@pytest.fixture
def newer(monkeypatch, tmp_path):
    """As if a later Transformers had been installed, and nothing been kept yet; gives the folder of what is kept."""
    default_choice("cpu")  # its library is not looked for in the empty cache
    monkeypatch.setenv("HF_SPARSE_ATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(transformers, "__version__", NEWER)
    monkeypatch.setattr(self_test, "_passed", set())
    return tmp_path / "cache/self_tests"


@pytest.fixture
def runs(monkeypatch):
    """A list that grows by one for every self-test."""
    result, original = [], self_test._differences
    monkeypatch.setattr(self_test, "_differences", lambda: result.append(1) or original())
    return result


# -- versions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["5.16.9", "4.57.1", "5.16.0.dev0"])
def test_versions_that_are_too_old_are_refused(version):
    with pytest.raises(
        ImportError, match=rf"transformers >= 5.17, found {version}: pip install 'transformers==5.24.\*'"
    ):
        check_transformers(version)


@pytest.mark.parametrize("version", ["5.17.0", "5.23.9", "5.24.0", "5.24.7", "5.24.0.post1", "5.23.0+local"])
def test_tested_versions_pass_without_a_word(version):
    check_transformers(version)
    assert is_tested(version)
    check_transformers()
    assert is_tested()


@pytest.mark.parametrize("version", ["5.25.0", "6.0", "5.25.0.dev0", "5.24.0.dev0", "5.17.0rc1", "a-branch"])
def test_other_versions_give_one_warning(version):
    with pytest.warns(UserWarning, match=f"tested with transformers 5.17 to 5.24, found {version}") as caught:
        check_transformers(version)
    assert len(caught) == 1 and not is_tested(version)


def test_what_a_newer_version_lacks_is_named_with_the_version_to_install(newer):
    with (
        pytest.warns(UserWarning, match=NEWER),
        pytest.raises(ImportError, match=r"5.99.0 lacks what it needs \(cannot import name 'gone'.*pip install"),
        checked_transformers(),
    ):
        from transformers import gone  # noqa: F401


def test_a_newer_version_imports_with_one_warning_and_makes_a_model(tmp_path, llama_folder, real_budget):
    """In a process of its own, as it is imported there; a second process does not repeat the self-test."""
    default_choice("cpu")
    script = (
        f"import transformers, logging; transformers.__version__ = {NEWER!r}\n"
        "import hf_sparse_attn\n"
        "from hf_sparse_attn.models import self_test\n"
        "original, seen = self_test._differences, []\n"
        "self_test._differences = lambda: seen.append(1) or original()\n"
        "import os, pathlib, tempfile\n"
        "from hf_sparse_attn_kernels import default_choice; default_choice('cpu')\n"
        f"os.environ['HF_SPARSE_ATTN_CACHE'] = {str(tmp_path)!r}\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(llama_folder)!r}, "
        f"sparse_attention={real_budget!r})\n"
        "print(type(model).__name__, len(seen))\n"
    )
    for count in (1, 0):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["SparseLlamaForCausalLM", str(count)]
        assert done.stderr.count("UserWarning") == 1 and "a self-test of about a second" in done.stderr


# -- the self-test --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["from_pretrained", "sparsify", "from_config", "sparse_class", "loaded"])
def test_every_way_to_a_sparse_model_runs_it_first_and_once(
    way, newer, runs, llama_folder, stock_llama, real_budget, tmp_path, monkeypatch
):
    stock = stock_llama()
    if way == "loaded":
        monkeypatch.undo()
        sparsify(stock_llama(), real_budget).save_pretrained(tmp_path / "sparse")
        monkeypatch.setenv("HF_SPARSE_ATTN_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(transformers, "__version__", NEWER)
        monkeypatch.setattr(self_test, "_passed", set())
        original = self_test._differences
        monkeypatch.setattr(self_test, "_differences", lambda: runs.append(1) or original())
    ways = {
        "from_pretrained": lambda: AutoModelForCausalLM.from_pretrained(llama_folder, sparse_attention=real_budget),
        "sparsify": lambda: sparsify(stock, real_budget),
        "from_config": lambda: AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(llama_folder, sparse_attention=real_budget)
        ),
        "sparse_class": lambda: sparse_class(type(stock))(sparse_config(stock.config, real_budget)),
        "loaded": lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "sparse"),
    }
    assert len(routers(ways[way]())) == 2 and len(runs) == 1
    (kept,) = newer.iterdir()
    assert json.loads(kept.read_text())["differences"] == [] and json.loads(kept.read_text())["transformers"] == NEWER
    self_test._passed.clear()  # as in another process
    require_self_test()
    assert len(runs) == 1


def test_stock_models_and_tested_versions_need_none(runs, llama_folder, stock_llama, real_budget, newer, monkeypatch):
    AutoModelForCausalLM.from_pretrained(llama_folder)
    monkeypatch.setattr(transformers, "__version__", "5.24.0")
    sparsify(stock_llama(), real_budget)
    assert not runs and not newer.exists()


def test_where_it_fails_the_model_is_refused_with_what_differed(newer, runs, stock_llama, real_budget, monkeypatch):
    stock = stock_llama()
    with monkeypatch.context() as changed:
        changed.setattr(interface, "CACHE_ARGUMENTS", ())
        with pytest.raises(SelfTestError) as refused:
            sparsify(stock, real_budget)
        for part in (
            NEWER,
            "5.17 to 5.24",
            "Decoding with a cache",
            "under the name",
            "pip install 'transformers==5.24.*'",
            "doctor",
        ):
            assert part in str(refused.value)
        assert type(stock).__name__ == "LlamaForCausalLM" and not routers(stock)
        with pytest.raises(SelfTestError):
            AutoConfig.for_model("llama", sparse_attention=real_budget)
    assert len(runs) == 2
    sparsify(stock, real_budget)  # a failure is kept, but tried again
    assert len(runs) == 3


@pytest.mark.parametrize(
    ("where", "name", "broken", "differs"),
    [
        (
            interface,
            "attend",
            lambda module, query, *rest: torch.zeros_like(query.transpose(1, 2)),
            "ran 0 times in 2 layers",
        ),
        (DynamicCache, "update", lambda self, k, v, *rest, **options: (k, v), "DynamicCache: "),
        (SparseConfigMixin, "to_dict", lambda self: self.values_without_settings(), "a LlamaForCausalLM was loaded"),
    ],
)
def test_it_finds_what_a_changed_version_breaks(where, name, broken, differs, newer, monkeypatch):
    def values(self):
        return {
            key: value for key, value in transformers.LlamaConfig.to_dict(self).items() if key != "sparse_attention"
        }

    monkeypatch.setattr(SparseConfigMixin, "values_without_settings", values, raising=False)
    monkeypatch.setattr(where, name, broken)
    failed = run_self_test()
    assert any(differs in one for one in failed), failed


def test_the_newest_version_that_passed_here_is_named(newer, stock_llama, real_budget, monkeypatch):
    for version in ("5.27.0", "5.26.0"):
        monkeypatch.setattr(transformers, "__version__", version)
        self_test_results.keep([])
    monkeypatch.setattr(transformers, "__version__", NEWER)
    monkeypatch.setattr(self_test, "_differences", lambda: ["Saving: other weights"])
    with pytest.raises(SelfTestError, match=r"Saving: other weights\n.*pip install 'transformers==5.27.0'"):
        sparsify(stock_llama(), real_budget)


def test_a_result_that_others_could_have_written_or_that_is_cut_off_counts_for_nothing(newer):
    self_test_results.keep([])
    (kept,) = newer.iterdir()
    assert self_test_results.kept_pass()
    for mode, expected in ((0o666, False), (0o620, False), (0o600, True)):
        kept.chmod(mode)
        assert self_test_results.kept_pass() == expected
    whole = kept.read_text()
    for text in ("", whole[:-9], "[]", whole.replace('"differences": []', '"differences": ["x"]')):
        kept.write_text(text)
        assert not self_test_results.kept_pass()
    kept.unlink()
    (newer / "elsewhere").write_text(whole)
    kept.symlink_to(newer / "elsewhere")
    assert not self_test_results.kept_pass()


def test_it_works_where_nothing_can_be_kept(newer, runs, caplog):
    newer.parent.write_text("a file in the place of the folder")
    for _ in range(2):
        self_test._passed.clear()
        require_self_test()
    assert len(runs) == 2
    assert sum("HF_SPARSE_ATTN_CACHE" in record.message for record in caplog.records) == 1


def test_what_the_caller_has_set_neither_matters_nor_changes(newer):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with (
            torch.device("meta"),
            torch.inference_mode(),
            torch.autocast("cpu"),
            warnings.catch_warnings(record=True) as said,
        ):
            assert run_self_test() == []
            assert (
                torch.get_default_dtype() is torch.bfloat16
                and torch.empty(1).is_meta
                and torch.is_inference_mode_enabled()
            )
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.rand(3), want) and not said


def test_doctor_runs_it_and_keeps_the_result(newer, runs, capsys, monkeypatch):
    app(["doctor", "--json", "-"], standalone_mode=False)
    assert (
        json.loads(capsys.readouterr().out)["self_test"] == "passed"
        and len(runs) == 1
        and self_test_results.kept_pass()
    )
    monkeypatch.setattr(self_test, "_differences", lambda: ["Saving: other weights"])
    app(["doctor", "--json", "-"], standalone_mode=False)
    result = json.loads(capsys.readouterr().out)
    assert result["self_test"] == ["Saving: other weights"] and result["supported_transformers"] == ["5.17", "5.24"]
    assert not self_test_results.kept_pass()


# -- the names of caches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["past_key_value", "kv_cache", "cache_params", "state", "past_key_valuess"])
@pytest.mark.parametrize("kind", ["DynamicCache", "StaticCache", "layer", "list"])
def test_a_cache_under_an_unknown_name_raises(name, kind, sparse_llama, real_budget, token_ids):
    model = sparse_llama(real_budget)
    filled = DynamicCache()
    model(token_ids(1, 40), **{MODEL_ARGUMENT: filled})
    cache = {
        "DynamicCache": filled,
        "StaticCache": StaticCache(model.config, 64),
        "layer": filled.layers[0],
        "list": [(layer.keys, layer.values) for layer in filled.layers],
    }[kind]
    before = filled.get_seq_length()
    with pytest.raises(
        ValueError, match=rf"SparseLlamaAttention was called with a cache \(.*under the name '{name}'.*{MODEL_ARGUMENT}"
    ):
        model(token_ids(1, 3), use_cache=False, **{name: cache})
    assert filled.get_seq_length() == before


def called_attention(model, ids):
    """The arguments of the first attention layer in a call of ``model``."""
    seen = []
    hook = model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    model(ids, use_cache=False)
    hook.remove()
    return seen[0]


def test_a_cache_that_is_passed_by_place_is_adopted(sparse_llama, real_budget, token_ids):
    model = sparse_llama(real_budget)
    site, cache = model.model.layers[0].self_attn, DynamicCache()
    _, kwargs = called_attention(model, token_ids(1, 40))
    kwargs = {name: value for name, value in kwargs.items() if value is not None and name not in CACHE_ARGUMENTS}
    hidden, embeddings = kwargs.pop("hidden_states"), kwargs.pop("position_embeddings")
    with torch.no_grad():
        got = site(hidden, embeddings, None, cache, **{k: v for k, v in kwargs.items() if k != "attention_mask"})[0]
    assert isinstance(cache.layers[0], SparseCacheLayerMixin) and cache.layers[0].summarised == [2]
    with torch.no_grad():
        torch.testing.assert_close(got, site(hidden, embeddings, None, **{MODEL_ARGUMENT: DynamicCache()}, **kwargs)[0])
        with pytest.raises(ValueError, match="under the name 'attention_mask'"):
            site(hidden, embeddings, cache, **kwargs)


def test_two_caches_and_legacy_ones_are_refused(sparse_llama, real_budget, token_ids):
    model = sparse_llama(real_budget)
    site = model.model.layers[0].self_attn
    _, kwargs = called_attention(model, token_ids(1, 40))
    kwargs.pop(MODEL_ARGUMENT, None)
    pair = (torch.zeros(1, 2, 40, 16), torch.zeros(1, 2, 40, 16))
    for value, message in ((pair, "got tuple"), ((pair, pair), "got tuple"), (object(), "got object")):
        with pytest.raises(ValueError, match=f"caches with layers .*{message}"):
            site(**kwargs, **{MODEL_ARGUMENT: value})
    for old in set(site.accepted) & set(CACHE_ARGUMENTS) - {MODEL_ARGUMENT}:  # from 5.24 on
        with pytest.raises(ValueError, match="with two caches"):
            site(**kwargs, **{MODEL_ARGUMENT: DynamicCache(), old: DynamicCache()})


def test_a_layer_whose_cache_has_a_new_name_raises():
    class Renamed(LlamaAttention):
        def forward(self, hidden_states, position_embeddings=None, attention_mask=None, key_store=None, **kwargs):
            raise AssertionError("ran without its cache")

    created = sparse_attention_class(Renamed)
    site = created.__new__(created)
    torch.nn.Module.__init__(site)
    site.config = type("Config", (), {"_attn_implementation": "hf_sparse"})()
    for arguments in ({"key_store": DynamicCache()}, {MODEL_ARGUMENT: DynamicCache()}):
        with pytest.raises(ValueError, match="its cache is called nothing, it has none"):
            site.forward(torch.zeros(1, 3, 64), **arguments)


def test_keys_that_were_kept_in_a_way_of_ones_own_raise(sparse_llama, real_budget, monkeypatch):
    site = sparse_llama(real_budget).model.layers[0].self_attn
    q, k = torch.zeros(1, 4, 1, 16), torch.zeros(1, 2, 40, 16)
    with pytest.raises(ValueError, match="attends to 40 keys with 1 queries, but handed no cache on"):
        interface.sparse_attention_forward(site, q, k, k, None)


def test_names_come_from_signatures_and_from_what_replaces_old_ones():
    def forward(self, hidden_states, cache=None, **kwargs): ...

    assert accepted_names(forward)[2:] == ("cache", "kwargs")
    from transformers.utils.deprecation import deprecate_kwarg

    assert "past_key_values" in accepted_names(deprecate_kwarg("past_key_values", "99.0", new_name="cache")(forward))
    assert "other" not in accepted_names(deprecate_kwarg("other", "99.0", new_name="elsewhere")(forward))
    assert MODEL_ARGUMENT in accepted_names(LlamaAttention.forward)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("position_embeddings", (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)), False),
        ("position_embeddings", ((torch.zeros(1),) * 2,) * 2, False),
        ("cache_position", torch.arange(3), False),
        ("use_cache", True, False),
        ("past_key_values_length", 7, False),
        ("cu_seq_lens_q", torch.arange(3), False),
        ("whatever", DynamicCache(), True),
        ("whatever", {"inner": DynamicCache()}, True),
        ("whatever", ((torch.zeros(1), torch.zeros(1)),), True),
        ("past_key_value", (torch.zeros(1), torch.zeros(1)), True),
        ("layer_past", torch.zeros(1), True),
        ("kv_cache", object(), True),
        ("options", {"a": 1}, False),
        ("names", {"a"}, False),
    ],
)
def test_what_is_a_cache(name, value, expected):
    assert is_cache(name, value) is expected


@pytest.mark.skipif(not hasattr(transformers.cache_utils.StaticLayer, "crop"), reason="before 5.24")
def test_a_cropped_static_cache_decodes_other_tokens_like_a_fresh_one(sparse_llama, real_budget, token_ids):
    """Cut between two tiles, whose queries are routed together."""
    model = sparse_llama(real_budget, noise=0.1)
    first, second = token_ids(1, 180, seed=1), token_ids(1, 180, seed=2)
    other = torch.cat([first[:, :96], second[:, 96:]], 1)
    cache, fresh = StaticCache(model.config, 200), StaticCache(model.config, 200)
    with torch.no_grad():
        model(first, **{MODEL_ARGUMENT: cache})
        cache.crop(-84)
        model(other[:, :96], **{MODEL_ARGUMENT: fresh})
        for start, stop in ((96, 160), (160, 161), (161, 180)):
            got, want = (model(other[:, start:stop], **{MODEL_ARGUMENT: one}).logits for one in (cache, fresh))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
