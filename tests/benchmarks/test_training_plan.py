"""Plans: counts equal a real model's, memory terms equal what tensors take, and what does not fit is
refused by name.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM, Qwen3Config
from typer.testing import CliRunner

from hf_sparse_attn import SparseAttentionConfig, routers, sparsify
from hf_sparse_attn.benchmarks import NotEnoughMemoryError, check_memory, plan_training
from hf_sparse_attn.benchmarks.contenders import DENSE, SPARSE, STOCK, make_contenders
from hf_sparse_attn.benchmarks.layer_shape import LayerShape
from hf_sparse_attn.benchmarks.planner.attention_cost import AttentionShape, layer_work
from hf_sparse_attn.benchmarks.planner.devices import GPUS, available_memory, gpu
from hf_sparse_attn.benchmarks.planner.fit import fits, longest_length
from hf_sparse_attn.benchmarks.planner.meta_step import LOSS, simulate_step, stock_config, with_layers
from hf_sparse_attn.cli.commands import app
from hf_sparse_attn.system.precision import linear_rate
from hf_sparse_attn.training.config import AdaptationConfig

# peft asks transformers for a property that the newest versions call by another name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

H100 = gpu("H100-80GB")
LENGTH = 512
ATTENTIONS = {SPARSE: "sparse", DENSE: "dense", STOCK: "stock"}


@pytest.fixture
def plan(tiny_config, real_budget):
    """A plan of a tiny model of three layers in float32."""

    def make(length=LENGTH, device=H100, config=None, training=None, **options):
        options = {"dtype": torch.float32, "sparse_attention": real_budget, **options}
        return plan_training(config or tiny_config(num_hidden_layers=3), device, length, training=training, **options)

    return make


# -- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "training", [{}, {"rank": 4, "target_modules": ["q_proj", "down_proj"]}, {"kl_weight": 0.0}], ids=str
)
@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize("tied", [False, True])
def test_counts_and_static_bytes_are_those_of_the_real_model(
    plan, sparse_llama, tiny_config, real_budget, training, kind, tied
):
    changes, training = {"num_hidden_layers": 5, "tie_word_embeddings": tied}, AdaptationConfig(**training)
    created = plan(config=tiny_config(**changes), training=training, attention=ATTENTIONS[kind])
    model = sparse_llama(real_budget, **changes)
    contender = make_contenders(model, training, (kind,))[kind]
    assert created.parameters["backbone"] == sum(
        p.numel() for name, p in model.named_parameters() if ".router." not in name
    )
    assert created.parameters["lora"] == sum(p.numel() for p in contender.lora.values())
    assert created.parameters["routers"] == (
        0 if kind == STOCK else sum(p.numel() for r in routers(model) for p in r.parameters())
    )
    assert created.static_bytes == contender.static_bytes


def test_a_plan_reads_stock_and_sparse_configs_alike(plan, sparse_llama, real_budget, tiny_config):
    model = sparse_llama(real_budget, num_hidden_layers=3)
    mine = plan(config=model.config, sparse_attention=None)
    assert mine == plan() and mine.to_dict()["total_bytes"] == mine.total_bytes
    assert model.config.sparse_attention["min_keys"] == 80 and type(model.config).__name__ == "SparseLlamaConfig"
    json.dumps(mine.to_dict())


def test_layers_are_extrapolated_to_what_all_of_them_need(tiny_config):
    config, training = tiny_config(num_hidden_layers=9), AdaptationConfig()
    few, more, whole = (simulate_step(with_layers(config, n), torch.float32, training, 1, 300) for n in (2, 4, 9))
    guessed = more.beyond(few, 2.5)
    assert guessed.peaks == whole.peaks and (guessed.parameters, guessed.trained_bytes) == (
        whole.parameters,
        whole.trained_bytes,
    )
    assert sum(o.flops * n for o, n in guessed.operations.items()) == sum(
        o.flops * n for o, n in whole.operations.items()
    )
    assert sum(o.bytes * n for o, n in guessed.operations.items()) == pytest.approx(
        sum(o.bytes * n for o, n in whole.operations.items()), rel=1e-6
    )


def test_layers_of_several_kinds_keep_their_lists_in_step():
    config = Qwen3Config(
        num_hidden_layers=4, layer_types=["sliding_attention"] * 2 + ["full_attention"] * 2, sliding_window=40
    )
    few = with_layers(config, 2)
    assert few.layer_types == ["sliding_attention"] * 2 and few.num_hidden_layers == 2 and config.num_hidden_layers == 4


# -- memory ----------------------------------------------------------------------------------------------------------


def saved_bytes(model, ids):
    """Bytes of what autograd keeps for the backward pass, besides the weights."""
    known, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    return sum(size for at, size in kept.items() if at not in known), loss


def test_kept_activations_are_what_autograd_keeps(stock_llama, tiny_config, token_ids):
    """Without checkpointing, at the peak of the loss, the loss's own tensors and the last layer's inputs aside."""
    training = AdaptationConfig(gradient_checkpointing=False)
    model = make_lora(stock_llama(num_hidden_layers=3), training)
    measured, _ = saved_bytes(model, token_ids(1, LENGTH))
    simulated = simulate_step(tiny_config(num_hidden_layers=3), torch.float32, training, 1, LENGTH)
    assert simulated.peaks[LOSS]["forward"] == pytest.approx(measured, rel=0.1)


def make_lora(model, training):
    from hf_sparse_attn.benchmarks.contenders import Contender, plain_lora

    return Contender(STOCK, plain_lora(model, training), training, None).model


def test_checkpointing_keeps_the_input_of_every_layer(plan):
    kept = {}
    for layers in (4, 12):
        created = plan(length=2048, config=llama(layers), training=AdaptationConfig(chunked_loss=False))
        kept[layers] = created.step["kept activations"]
    assert kept[12] - kept[4] == 8 * 2048 * 64 * 4  # hidden states of 64 float32 numbers


def llama(layers):
    from transformers import LlamaConfig

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(vocab_size=97, num_hidden_layers=layers, **sizes)


def test_the_chunked_loss_bounds_the_logits(plan):
    wide = llama(3)
    wide.vocab_size = 1 << 16
    whole, chunked = (plan(8192, config=wide, training=AdaptationConfig(chunked_loss=on)) for on in (False, True))
    assert whole.peak_bytes >= 3 * 8192 * (1 << 16) * 4  # log-softmax, its gradient, and that of the loss
    assert chunked.step["logits and loss"] <= 4 * (1 << 28)


def test_selections_take_what_the_tensors_of_one_take(make_router, routing_inputs):
    from hf_sparse_attn.router.selection import select_blocks

    for length in (300, 512):
        router = make_router()
        created = select_blocks(router, routing_inputs(length, batch=2), 16)
        work = layer_work(router.config, AttentionShape(2, 4, 2, 16), length, 4, 4)
        assert work.selection_bytes == created.indices.nbytes + created.scores.nbytes


def test_pairs_are_those_of_the_layer_benchmarks():
    shape = LayerShape(1000, 256, dtype="float32", heads=4, groups=2, head_dim=16)
    work = layer_work(shape.config, AttentionShape(1, 4, 2, 16), 1000, 16, 4)
    assert (work.kept_pairs, work.dense_pairs) == (shape.kept_pairs, shape.dense_pairs)
    assert work.routing > 0 and work.teaching > 0
    assert layer_work(shape.config, AttentionShape(1, 4, 2, 16), 1000, 0, 4).teaching == 0


def test_the_kl_needs_memory_that_does_not_grow_with_the_square_of_the_length():
    config, shape = SparseAttentionConfig(density=0.125), AttentionShape(1, 32, 8, 128)
    short, long = (layer_work(config, shape, n, 16, 2).teaching_bytes for n in (16384, 131072))
    assert long < 10 * short


def test_padding_costs_stock_a_mask(plan):
    for attention, more in (("sparse", 0), ("stock", 2 * 4096**2)):
        assert (
            plan(4096, attention=attention, batch=2, padded=True).peak_bytes
            - plan(4096, attention=attention, batch=2).peak_bytes
            == more
        )


# -- time ------------------------------------------------------------------------------------------------------------


def test_products_take_as_long_as_the_device_says(plan):
    slow = replace(H100, products=dict.fromkeys(H100.products, 1.0), bytes_per_s=1e30, operation_seconds=0.0)
    created = plan(
        attention="stock", device=slow, training=AdaptationConfig(gradient_checkpointing=False, chunked_loss=False)
    )
    linear = 3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96) + 64 * 97
    lora = 3 * 8 * (64 + 64 + 64 + 32 + 64 + 32 + 64 + 64)
    inputs = 64 * 64 + 2 * 64 * 32  # of the first layer's projections: nothing before them learns
    at_least, at_most = 2 * LENGTH * (2 * linear - inputs), 2 * LENGTH * (2 * linear + 3 * lora)
    assert at_least <= created.time["products"] <= at_most


def test_attention_takes_its_pairs_over_the_rates(plan):
    device = replace(H100, attention=(2.0, 4.0), sparse_attention=(8.0, 16.0), routing=1e30, teaching=1e30)
    pairs = 3 * 4 * 4 * 16 * LENGTH * (LENGTH + 1) / 2
    assert plan(attention="stock", device=device).time["dense attention"] == pytest.approx(pairs * (2 / 2 + 2.5 / 4))
    once = AdaptationConfig(gradient_checkpointing=False)
    assert plan(attention="dense", device=device, training=once).time["dense attention"] == pytest.approx(
        pairs * (1 / 2 + 2.5 / 4)
    )
    sparse = plan(device=device)
    assert "dense attention" not in sparse.time and 0 < sparse.time["sparse attention"] < pairs * (2 / 8 + 2.5 / 16)
    assert {"routing", "KL"} <= sparse.time.keys() and "KL" not in plan(training=AdaptationConfig(kl_weight=0.0)).time


def test_dense_layers_attend_densely(plan, real_budget):
    created = plan(sparse_attention={**real_budget, "dense_layers": [0]})
    assert created.time["dense attention"] == pytest.approx(plan(attention="stock").time["dense attention"] / 3)


# -- fitting ---------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_with_the_way_out(plan):
    created = plan(batch=4, training=AdaptationConfig(gradient_checkpointing=False, chunked_loss=False))
    check_memory(created, H100)
    small = replace(H100, name="small", memory_bytes=created.total_bytes - 10**8)
    with pytest.raises(
        NotEnoughMemoryError, match=r"a sparse step on 4 × 512 tokens needs .* GB, small has .* GB: 0\.1 GB are missing"
    ) as caught:
        check_memory(created, small)
    for fix in (
        "shorter rows",
        "a smaller batch",
        "gradient_checkpointing: true",
        "chunked_loss: true",
        "a larger device",
    ):
        assert fix in str(caught.value)
    with pytest.raises(NotEnoughMemoryError) as caught:
        check_memory(plan(), replace(H100, memory_bytes=10**6))
    assert "batch" not in str(caught.value) and "checkpointing" not in str(caught.value)


def test_the_longest_length_fits_and_a_longer_one_does_not(plan, tiny_config, real_budget):
    options = {"config": tiny_config(), "dtype": torch.float32, "sparse_attention": real_budget}
    small = replace(H100, memory_bytes=plan(4096, config=tiny_config()).total_bytes)
    result = longest_length(small, **options)
    assert 4096 <= result < 8192 and fits(plan(result, config=tiny_config()), small)
    assert longest_length(replace(H100, memory_bytes=1000), **options) == 0
    assert longest_length(H100, most=1024, **options) == 1024


# -- mistakes, devices, the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length is 0: must be >= 1"),
        ({"batch": -1}, "batch is -1: must be >= 1"),
        ({"attention": "flash"}, "attention is 'flash': must be sparse, dense or stock"),
        ({"training": AdaptationConfig(target_modules=["nothing"])}, "Target modules"),
        ({"sparse_attention": {"min_keys": 1}}, "min_keys is 1"),
    ],
)
def test_impossible_plans_are_refused(plan, options, message):
    with pytest.raises(ValueError, match=message):
        plan(**options)


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text", "olmo3", "smollm3", "mistral"])
def test_layers_with_a_window_are_counted_as_such(plan, model_type):
    from helpers.tiny_models import tiny_config as tiny

    created = {attention: plan(config=tiny(model_type), attention=attention) for attention in ("stock", "sparse")}
    windowed = "attention in a window" in created["stock"].time
    assert (
        windowed == (model_type in ("qwen3", "gemma3_text", "olmo3")) and created["sparse"].time["sparse attention"] > 0
    )
    if windowed:  # 40 of up to 512 keys in one of three layers
        share = created["stock"].time["attention in a window"] / created["stock"].time["dense attention"]
        assert share == pytest.approx(40 / (513 / 2) / 2)


def test_models_whose_layers_depend_on_values_are_refused_by_name(plan):
    from helpers.tiny_models import tiny_config as tiny

    with pytest.raises(ValueError, match=r"MixtralForCausalLM cannot be planned|not supported"):
        plan(config=tiny("mixtral"))


def test_the_memory_of_a_container_is_what_its_limit_leaves(tmp_path):
    assert available_memory(tmp_path) == 2**63 - 1
    for folder in ("proc", "sys/fs/cgroup"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 4 kB\n")
    assert available_memory(tmp_path) == 4096
    for limit, left in (("max", 4096), ("3000", 2200), ("500", 0), ("9000", 4096)):
        for name, text in {"current": "1000", "stat": "file 900\ninactive_file 200\n", "max": limit}.items():
            (tmp_path / f"sys/fs/cgroup/memory.{name}").write_text(text)
        assert available_memory(tmp_path) == left


def test_devices_are_known_by_name():
    assert all(
        gpu(name).memory_bytes == memory * 10**9 for name, (memory, *_) in GPUS.items()
    ) and H100.note.startswith("assumed")
    with pytest.raises(ValueError, match=r"--gpu is 'H1000'; known: B200-180GB, .*, cpu"):
        gpu("H1000")


def test_the_cpu_is_measured(tiny_config):
    from hf_sparse_attn.benchmarks.planner.cpu_rates import measure_cpu

    device = measure_cpu(tiny_config(), torch.float32)
    # against rates measured here: the sizes of a tiny model reach a small part of them, and nothing exceeds them
    linear = linear_rate(torch.float32)
    data = torch.ones(1 << 24)
    start = time.perf_counter()
    data.clone()
    copied = 2 * data.nbytes / (time.perf_counter() - start)
    products = (device.products[torch.float32], *device.attention, *device.sparse_attention)
    assert all(linear / 1000 < rate < linear * 20 for rate in products)
    assert copied / 1000 < device.bytes_per_s < copied * 50
    assert device.routing > 0 and device.teaching > 0 and device.memory_bytes > 0 and device.name == "cpu"


def test_the_cpu_is_measured_with_the_modules_that_are_trained():
    from transformers import GPTNeoXConfig

    from hf_sparse_attn.benchmarks.planner.cpu_rates import measure_cpu

    config = GPTNeoXConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=97
    )
    lora = AdaptationConfig(target_modules=["query_key_value"], chunked_loss=False)
    assert measure_cpu(config, torch.float32, lora).bytes_per_s > 0
    with pytest.raises(ValueError, match="not found"):
        measure_cpu(config, torch.float32)


def test_the_better_rates_of_two_measurements_count():
    from hf_sparse_attn.benchmarks.planner.cpu_rates import faster

    rates = {"products": {torch.float32: 5.0}, "attention": (1.0, 9.0), "bytes_per_s": 3.0, "routing": 7.0}
    slow = replace(H100, **rates)
    mixed = faster(
        slow, replace(H100, products={torch.float32: 4.0}, attention=(2.0, 8.0), bytes_per_s=4.0, routing=6.0)
    )
    assert mixed == replace(slow, attention=(2.0, 9.0), bytes_per_s=4.0)


def test_a_plan_from_the_command_line_needs_a_config_only(tiny_config, tmp_path):
    sparsify(LlamaForCausalLM(tiny_config(num_hidden_layers=3)), {}).config.save_pretrained(tmp_path)
    arguments = [
        "bench",
        "training",
        tmp_path,
        "--plan",
        "--gpu",
        "RTX4090-24GB",
        "--length",
        "1024,8192",
        "--density",
        "0.25",
    ]
    done = CliRunner().invoke(
        app, [*map(str, arguments), "--json", str(tmp_path / "plan.json")], catch_exceptions=False
    )
    assert done.exit_code == 0 and "longest rows that fit" in done.stderr and "assumed" in done.stderr
    written = json.loads((tmp_path / "plan.json").read_text())
    assert [(row["length"], row["attention"], row["fits"]) for row in written["rows"]] == [
        (n, attention, True) for n in (1024, 8192) for attention in ("sparse", "dense", "stock")
    ]
    config = AutoConfig.from_pretrained(tmp_path)
    sparse = SparseAttentionConfig(density=0.25)
    want = plan_training(stock_config(config), gpu("RTX4090-24GB"), 8192, sparse_attention=sparse)
    assert written["rows"][3]["step"] == want.step and written["longest"]["sparse"] > 8192


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan", "--eager"], "--eager: --plan measures nothing; leave these out"),
        (["--plan", "--text", "a.txt", "--plot", "a.svg"], "--text, --plot: --plan measures nothing"),
        (["--gpu", "H100-80GB"], "--gpu H100-80GB is the device of --plan"),
    ],
)
def test_options_that_would_be_ignored_are_refused(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(app, ["bench", "training", str(tmp_path), *arguments], catch_exceptions=False)
