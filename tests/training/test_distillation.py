"""Distillation of the routers: losses against literal computations, training, resuming, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.calls import Watching
from transformers import AutoModelForCausalLM

from hf_sparse_attn import fit_mass_threshold, lora_config, routers
from hf_sparse_attn.data.model_inputs import NonFiniteError
from hf_sparse_attn.models.model_class import SparseModelMixin
from hf_sparse_attn.router.budget import make_plan
from hf_sparse_attn.training import distillation, router_loss
from hf_sparse_attn.training.config import DistillationConfig
from hf_sparse_attn.training.distillation import distill
from hf_sparse_attn.training.index_init import start_index
from hf_sparse_attn.training.router_loss import kept_mass, masked_kl, tile_loss
from hf_sparse_attn.training.router_state import backbone_hash, load_router_state, router_state

SETTINGS = DistillationConfig(lr=5e-3, index_lr=5e-3, warmup_steps=2, save_every=1)


@pytest.fixture
def batches(token_ids):
    return [{"input_ids": token_ids(2, 240, seed=seed)} for seed in range(6)]


@pytest.fixture
def model(sparse_llama, real_budget):
    return sparse_llama(real_budget)


# -- the whole of it ------------------------------------------------------------------------------------------------


def test_distillation_lowers_the_divergence_and_leaves_the_backbone(model, batches):
    backbone, before = backbone_hash(model), router_state(model)
    rows = []
    report = distill(model, batches * 6, SETTINGS, progress=False, on_batch=rows.append)
    assert backbone_hash(model) == backbone == report.backbone_sha256
    assert all(not torch.equal(weight, before[name]) for name, weight in router_state(model).items())
    for name in ("kl_coarse", "kl_fine"):
        first, last = (sum(row[name] for row in part) / 6 for part in (report.log[:6], report.log[-6:]))
        assert last < 0.9 * first, f"{name}: {first:.3f} -> {last:.3f}"
    assert report.log == rows and report.batches == 36 and report.steps == 36 * SETTINGS.steps_per_batch


def test_routers_are_marked_as_trained_and_stay_so_when_saved(model, batches, tmp_path):
    assert not model.config.sparse_attention["bookkeeping"]["trained"]
    distill(model, batches[:1], SETTINGS, progress=False)
    assert model.config.sparse_attention["bookkeeping"]["trained"]
    assert all(router.config.bookkeeping.trained and not router.fresh for router in routers(model))
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert isinstance(again, SparseModelMixin) and again.config.sparse_attention["bookkeeping"]["trained"]
    for name, weight in router_state(model).items():
        assert torch.equal(weight, router_state(again)[name])


def test_the_same_seed_gives_the_same_routers(sparse_llama, real_budget, batches):
    models = [sparse_llama(real_budget) for _ in range(2)]
    for each in models:
        distill(each, batches[:2], SETTINGS, progress=False)
    one, two = map(router_state, models)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("stop_at", "save_every"), [(1, 1), (3, 1), (4, 2), (2, 3)])
def test_an_interrupted_run_resumes_to_bit_identical_weights(
    sparse_llama, real_budget, batches, tmp_path, stop_at, save_every
):
    settings = DistillationConfig(lr=5e-3, warmup_steps=2, save_every=save_every)
    whole, again = sparse_llama(real_budget), sparse_llama(real_budget)
    want = distill(whole, batches, settings, progress=False)

    class Interrupted(Exception):
        pass

    def interrupt(row):
        if row["batch"] == stop_at:
            raise Interrupted

    path = tmp_path / "checkpoint.pt"
    with pytest.raises(Interrupted):
        distill(sparse_llama(real_budget), batches, settings, checkpoint=path, progress=False, on_batch=interrupt)
    report = distill(again, batches, settings, checkpoint=path, progress=False)
    assert report.resumed_at == (stop_at - 1) // save_every * save_every
    assert report.log == want.log and report.steps == want.steps
    one, two = router_state(whole), router_state(again)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_finished_run_is_not_run_again(sparse_llama, real_budget, batches, tmp_path):
    done, again = sparse_llama(real_budget), sparse_llama(real_budget)
    distill(done, batches[:2], SETTINGS, checkpoint=tmp_path / "c.pt", progress=False)
    report = distill(
        again,
        batches[:2],
        SETTINGS,
        checkpoint=tmp_path / "c.pt",
        progress=False,
        on_batch=lambda row: pytest.fail("ran again"),
    )
    assert report.resumed_at == 2
    one, two = router_state(done), router_state(again)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_checkpoint_of_another_model_or_other_settings_is_refused(
    model, sparse_llama, real_budget, batches, tmp_path
):
    path = tmp_path / "c.pt"
    distill(model, batches[:1], SETTINGS, checkpoint=path, progress=False)
    with pytest.raises(
        ValueError, match=r"c\.pt is a checkpoint of another run, different in the backbone's weights: remove it"
    ):
        distill(sparse_llama(real_budget, seed=1), batches[:1], SETTINGS, checkpoint=path, progress=False)
    with pytest.raises(ValueError, match=r"distillation\.lr \(0\.005 then, 0\.001 now\)"):
        distill(sparse_llama(real_budget), batches[:1], DistillationConfig(), checkpoint=path, progress=False)
    with pytest.raises(ValueError, match=r"sparse_attention\.sink \(16 then, 32 now\)"):
        distill(
            sparse_llama({**real_budget, "sink": 32, "min_keys": 96}),
            batches[:1],
            SETTINGS,
            checkpoint=path,
            progress=False,
        )
    rotary = {"rope_type": "default", "rope_theta": 500.0}
    with pytest.raises(ValueError, match=r"the model's config\.rope_parameters"):
        distill(
            sparse_llama(real_budget, rope_parameters=rotary), batches[:1], SETTINGS, checkpoint=path, progress=False
        )


def test_a_checkpoint_that_names_the_target_is_read_if_that_was_the_mass(sparse_llama, real_budget, batches, tmp_path):
    path = tmp_path / "c.pt"
    distill(sparse_llama(real_budget), batches[:1], SETTINGS, checkpoint=path, progress=False)
    state = torch.load(path, weights_only=True)
    for target in ("mass", "output"):
        state["identity"]["distillation"]["target"] = target
        torch.save(state, path)
        if target == "mass":
            assert (
                distill(sparse_llama(real_budget), batches[:1], SETTINGS, checkpoint=path, progress=False).resumed_at
                == 1
            )
    with pytest.raises(
        ValueError, match=r"distillation\.target is 'output': routers learn the block mass .*leave target out"
    ):
        distill(sparse_llama(real_budget), batches[:1], SETTINGS, checkpoint=path, progress=False)
    assert DistillationConfig(target="mass") == DistillationConfig()
    with pytest.raises(ValueError, match=r"distillation\.target is 'max'"):
        DistillationConfig(target="max")


@pytest.mark.parametrize("change", ["other texts", "another order", "another mask"])
def test_a_checkpoint_of_other_batches_is_refused(sparse_llama, real_budget, batches, tmp_path, change):
    path = tmp_path / "c.pt"
    distill(sparse_llama(real_budget), batches[:2], SETTINGS, checkpoint=path, progress=False)
    mask = torch.ones(2, 240, dtype=torch.long)
    mask[:, :16] = 0
    others = {
        "other texts": batches[2:4],
        "another order": batches[1::-1],
        "another mask": [{**batch, "attention_mask": mask} for batch in batches[:2]],
    }
    with pytest.raises(ValueError, match=r"different in the texts \(batches\): remove it or give another path"):
        distill(sparse_llama(real_budget), others[change], SETTINGS, checkpoint=path, progress=False)


@pytest.mark.parametrize("content", [b"", b"half", None])
def test_what_is_no_checkpoint_is_refused_by_name(model, batches, tmp_path, content):
    path = tmp_path / "c.pt"
    path.write_bytes(content) if content is not None else torch.save({"x": 1}, path)
    with pytest.raises(ValueError, match=r"c\.pt is no checkpoint of a distillation.*remove it"):
        distill(model, batches[:1], SETTINGS, checkpoint=path, progress=False)


def test_a_checkpoint_is_written_after_a_minute_whatever_save_every_says(model, batches, tmp_path, monkeypatch):
    clock, written = [0.0], []

    def pass_time(row):
        clock[0] += 25.0
        written.append((tmp_path / "c.pt").exists())

    monkeypatch.setattr(distillation.time, "monotonic", lambda: clock[0])
    distill(
        model,
        batches,
        DistillationConfig(save_every=100),
        checkpoint=tmp_path / "c.pt",
        progress=False,
        on_batch=pass_time,
    )
    assert written == [False, False, False, True, True, True]  # due at 75 seconds, after the third batch


# -- what was learned before, and what cannot be learned from ---------------------------------------------------------

STILL = DistillationConfig(lr=1e-12, index_lr=1e-12)


def adapted(model, **options):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        model, lora_config(model, r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("way", ["state dict", "adapter", "in place", "one layer only"])
def test_a_trained_stage_two_is_not_started_anew(sparse_llama, real_budget, batches, way):
    model = sparse_llama(real_budget) if way != "adapter" else adapted(sparse_llama(real_budget))
    distill(model, batches[:1], DistillationConfig(index_lr=1e-2), progress=False)
    again = sparse_llama(real_budget) if way != "adapter" else adapted(sparse_llama(real_budget))
    if way == "one layer only":
        load = {name: weight for name, weight in model.state_dict().items() if "layers.1." in name}
        again.load_state_dict(load, strict=False)
    elif way == "in place":
        load_router_state(again, router_state(model))
    else:
        again.load_state_dict(model.state_dict())
    before = {name: weight for name, weight in router_state(again).items() if "index" in name}
    distill(again, batches[:1], STILL, progress=False)
    after = router_state(again)
    moved = {
        name
        for name, weight in before.items()
        if "original_module" not in name and float((after[name] - weight).abs().max()) > 1e-6
    }
    untaught = {name for name in before if "layers.0." in name} if way == "one layer only" else set()
    assert moved == untaught  # an untaught low-rank index is started by the data


@pytest.mark.parametrize("broken", ["embedding", "overflow in layer 1"])
def test_a_batch_that_is_not_finite_stops_distillation_and_is_named(model, batches, tmp_path, broken):
    todo = [{"input_ids": torch.where(batch["input_ids"] == 5, 6, batch["input_ids"])} for batch in batches[:3]]
    with torch.no_grad():
        if broken == "embedding":
            model.model.embed_tokens.weight[5] = torch.nan
            todo[1]["input_ids"][1, 70] = 5
        else:
            model.model.layers[1].self_attn.q_proj.weight *= 1e38
    match = (
        r"layer 0 has queries.*token 70 of the document, in batch 1 "
        if broken == "embedding"
        else r"layer 1 has queries.*in batch 0 "
    )
    with pytest.raises(NonFiniteError, match=match):
        distill(model, todo, SETTINGS, checkpoint=tmp_path / "c.pt", progress=False)
    assert all(bool(weight.isfinite().all()) for weight in router_state(model).values())
    assert not routers(model)[0].config.bookkeeping.trained
    with pytest.raises(NonFiniteError, match=r"layer \d has queries"):
        fit_mass_threshold(model, todo)


def test_a_gradient_that_is_not_finite_destroys_no_router(model, batches, monkeypatch):
    for router in routers(model):
        router.requires_grad_().wq.register_hook(lambda grad: grad * torch.nan)
    with pytest.raises(NonFiniteError, match=r"gradient of layer 0's router is NaN or infinite, in batch 0 "):
        distill(model, batches[:1], SETTINGS, progress=False)
    assert all(bool(weight.isfinite().all()) for weight in router_state(model).values())


def test_layers_with_the_same_index_learn_each_for_itself(model, batches):
    """Copies of a layer (depth up-scaling) share their index."""
    for router in routers(model):
        router.layer = 0
    before = router_state(model)
    distill(model, batches[:1], SETTINGS, progress=False)
    assert all(not torch.equal(weight, before[name]) for name, weight in router_state(model).items())


# -- batches as users have them ----------------------------------------------------------------------------------------


def test_rows_of_a_dataset_lists_and_arrays_train_as_tensors_do(sparse_llama, real_budget, batches):
    ids = batches[0]["input_ids"][:1]
    kinds = (
        {"input_ids": ids},
        {"input_ids": ids.tolist(), "attention_mask": None},
        {"input_ids": ids[0].numpy(), "labels": "are not read"},
        {"input_ids": ids[0].tolist(), "attention_mask": [1] * 240},
    )
    trained = [sparse_llama(real_budget) for _ in kinds]
    for model, batch in zip(trained, kinds, strict=True):
        distill(model, [batch], SETTINGS, progress=False)
    want, *others = map(router_state, trained)
    assert all(torch.equal(want[name], other[name]) for other in others for name in want)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"input_ids": torch.ones(1, 240, dtype=torch.long), "text": ["a"]},
            r"batch 1, field 'text', holds no numbers \('a'\).*remove_columns",
        ),
        ({"input_ids": [[3, 4], [5]]}, "batch 1, field 'input_ids', holds rows of several lengths"),
        (
            {"input_ids": torch.ones(1, 240)},
            r"batch 1, field 'input_ids', is torch.float32 \(1, 240\): must be integers \[B, N\]",
        ),
        ({"input_ids": torch.full((1, 240), 97)}, "batch 1.*holds token 97: the model's vocabulary is 0 to 96"),
        ({"input_ids": torch.full((1, 240), -100)}, "batch 1.*holds token -100"),
        ({"labels": torch.ones(1, 240)}, "batch 1 has no inputs"),
        (torch.ones(1, 240, dtype=torch.long), "batch 1 is Tensor: must be a mapping"),
        ("text", "batch 1 is str: must be a mapping"),
    ],
)
def test_batches_that_a_model_cannot_take_are_named(model, batches, batch, message):
    with pytest.raises(ValueError, match=message):
        distill(model, [batches[0], batch], SETTINGS, progress=False)


def test_one_batch_in_place_of_a_list_is_refused(model, batches):
    with pytest.raises(ValueError, match="the batches are one dict: give a list of batches"):
        distill(model, batches[0], SETTINGS, progress=False)


def test_training_mode_is_what_it_was_even_after_an_error(model, batches):
    model.train()
    distill(model, batches[:1], SETTINGS, progress=False)
    assert model.training

    def interrupt(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(model, batches[:1], SETTINGS, progress=False, on_batch=interrupt)
    assert model.training


# -- refusals -------------------------------------------------------------------------------------------------------


def test_documents_without_anything_to_select_are_refused(model, token_ids):
    with pytest.raises(ValueError, match=r"\(1, 64\).*nothing to select.*min_keys \(80\)"):
        distill(model, [{"input_ids": token_ids(1, 64)}], SETTINGS, progress=False)


def test_documents_below_dense_below_are_refused(sparse_llama, real_budget, token_ids):
    with pytest.raises(ValueError, match=r"dense_below \(300\)"):
        distill(
            sparse_llama({**real_budget, "dense_below": 300}),
            [{"input_ids": token_ids(1, 240)}],
            SETTINGS,
            progress=False,
        )


def test_no_batches_and_no_routers_are_refused(model, stock_llama, batches):
    with pytest.raises(ValueError, match="no batches"):
        distill(model, [], SETTINGS, progress=False)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no routers"):
        distill(stock_llama(), batches, SETTINGS, progress=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps_per_batch", 0), ("tiles_per_step", 0), ("queries_per_step", -1), ("save_every", 0), ("lr", 0.0)],
)
def test_impossible_settings_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        DistillationConfig(**{name: value})


def test_router_weights_of_another_shape_are_refused(model, sparse_llama, real_budget):
    state = router_state(sparse_llama({**real_budget, "index_dim": 4}))
    with pytest.raises(ValueError, match=r"index has shape \(2, 4, 16\), the model needs \(2, 8, 16\)"):
        load_router_state(model, state)
    state.popitem()
    with pytest.raises(ValueError, match="on one side only"):
        load_router_state(model, state)


# -- losses ---------------------------------------------------------------------------------------------------------


def test_masked_kl_is_that_of_torch_on_the_restricted_distributions():
    generator = torch.Generator().manual_seed(0)
    teacher, logits = torch.rand(5, 9, generator=generator), torch.randn(5, 9, generator=generator)
    mask = torch.rand(5, 9, generator=generator) < 0.6
    mask[:, 0] = True
    teacher[3] = teacher[3] * ~mask[3]  # no mass inside the mask: left out
    want = []
    for row in (0, 1, 2, 4):
        p = teacher[row][mask[row]] / teacher[row][mask[row]].sum()
        want.append(F.kl_div(torch.log_softmax(logits[row][mask[row]], -1), p, reduction="sum"))
    torch.testing.assert_close(masked_kl(teacher, logits, mask), torch.stack(want).mean())
    same = teacher.clamp(min=1e-6).log()
    torch.testing.assert_close(masked_kl(teacher, same, mask), torch.zeros(()), atol=1e-5, rtol=0)


def test_masked_kl_has_finite_gradients_where_everything_is_masked():
    logits = torch.zeros(2, 4, requires_grad=True)
    mask = torch.tensor([[False] * 4, [True, True, False, False]])
    masked_kl(torch.rand(2, 4), logits, mask).backward()
    assert bool(torch.isfinite(logits.grad).all()) and torch.equal(logits.grad[0], torch.zeros(4))


@pytest.mark.parametrize("query_tile", [16, 1])
def test_the_teacher_is_the_dense_softmax_over_all_visible_keys(make_router, routing_inputs, monkeypatch, query_tile):
    """Forced keys stay in the denominator, heads and tokens are averaged first, then forced blocks are dropped."""
    router, inputs = make_router(), routing_inputs(240, batch=2)
    seen, kl = [], router_loss.masked_kl

    def record(teacher, logits, mask):
        seen.append((teacher, logits, mask))
        return kl(teacher, logits, mask)

    monkeypatch.setattr(router_loss, "masked_kl", record)
    loss = tile_loss(router, inputs, query_tile, 1000, torch.Generator())
    plan = make_plan(router.config, inputs.grid(query_tile, 16))
    tiles = plan.open.nonzero()[:, 0]
    scores = inputs.q @ inputs.k.repeat_interleave(2, 1).transpose(-1, -2) * inputs.scale
    p = torch.softmax(scores.masked_fill(~torch.ones(240, 240).tril().bool(), -torch.inf), -1)
    mass = (
        p.unflatten(1, (2, 2))
        .mean(2)
        .unflatten(2, (-1, query_tile))
        .mean(3)
        .unflatten(3, (-1, 16))
        .sum(-1)[:, :, tiles]
    )
    (teacher, _, mask), (fine_teacher, _, fine_mask) = seen
    width = teacher.shape[-1]  # up to the last block that any tile may select
    torch.testing.assert_close(teacher, mass[..., :width], rtol=1e-4, atol=1e-6)
    eligible = plan.eligible_mask(tiles)
    assert torch.equal(mask.expand_as(teacher), eligible[:, :width].expand_as(teacher)) and not bool(
        eligible[:, width:].any()
    )
    assert bool((fine_teacher.masked_fill(~fine_mask, 0).sum(-1) <= mass.sum(-1)).all())
    assert 0 < loss.window <= loss.oracle <= 1 and 0 < loss.kept <= loss.oracle
    free = plan.free[tiles]
    for i in range(len(tiles)):
        forced = set(plan.forced_blocks(tiles)[i].tolist()) - {-1}
        eligible = plan.eligible_mask(tiles)[i]
        best = mass[0, 0, i].masked_fill(~eligible, -1).topk(int(free[i])).values.sum()
        want = mass[0, 0, i, sorted(forced)].sum() + best
        oracle = plan.assemble(plan.best(mass[:, :, i : i + 1], tiles[i : i + 1], free[i : i + 1]), tiles[i : i + 1])
        torch.testing.assert_close(kept_mass(mass[:, :, i : i + 1], oracle)[0, 0, 0], want)


def test_gradients_reach_all_router_weights_and_nothing_else(make_router, routing_inputs):
    router, inputs = make_router(rotary=True, noise=0.1), routing_inputs(240)
    router.requires_grad_()
    inputs.q.requires_grad_(), inputs.k.requires_grad_()
    with torch.no_grad():
        detached = type(inputs)(inputs.q.detach(), inputs.k.detach(), inputs.positions, inputs.scale)
    loss = tile_loss(router, detached, 16, 4, torch.Generator().manual_seed(0))
    loss.coarse.backward(retain_graph=True)
    assert router.wq.grad.abs().sum() > 0 and router.wk.grad.abs().sum() > 0 and router.wq_index.grad is None
    loss.fine.backward()
    assert router.wq_index.grad.abs().sum() > 0 and router.wk_index.grad.abs().sum() > 0
    assert inputs.q.grad is None and inputs.k.grad is None


def test_tiles_whose_past_fits_the_budget_are_left_out(make_router, routing_inputs):
    router = make_router()
    assert tile_loss(router, routing_inputs(80), 16, 4, torch.Generator()) is None
    assert tile_loss(router, routing_inputs(128), 16, 4, torch.Generator()) is not None


def test_padded_rows_train_like_unpadded_ones(sparse_llama, real_budget, token_ids, left_padded):
    """The observer sees documents without padding."""
    model, shapes = sparse_llama(real_budget), []
    ids, mask = left_padded([token_ids(1, n, seed=n)[0] for n in (200, 131)])
    call = Watching(dense=True, document=lambda router, inputs: shapes.append((router.layer, inputs.q.shape[2])))
    with torch.no_grad():
        model(ids, attention_mask=mask, use_cache=False, sparse_call=call)
    assert shapes == [(0, 200), (0, 131), (1, 200), (1, 131)]


# -- the start of stage 2 -------------------------------------------------------------------------------------------


def index_error(router, inputs):
    """Root-mean-square error of the index's q·k over all pairs."""
    total = 0.0
    with torch.no_grad():
        for group in range(router.groups):
            q = inputs.q[:, 2 * group : 2 * group + 2].flatten(0, 2)
            k = inputs.k[:, group].flatten(0, 1)
            approximation = (q @ router.wq_index[group].T) @ (k @ router.wk_index[group].T).T
            total += (approximation - q @ k.T).pow(2).mean().item()
    return (total / router.groups) ** 0.5


@pytest.fixture
def uneven_inputs(routing_inputs):
    """Queries and keys whose dimensions differ in size and are correlated."""
    inputs = routing_inputs(300)
    generator = torch.Generator().manual_seed(5)
    scale = torch.linspace(0.1, 2, 16)
    mix = [torch.randn(16, 16, generator=generator) * scale / 4 for _ in range(2)]
    return type(inputs)(inputs.q @ mix[0], inputs.k @ mix[1], inputs.positions, inputs.scale)


@pytest.mark.parametrize("rank", [2, 4, 8, 12])
def test_the_joint_svd_start_is_no_worse_than_any_other_and_than_the_slowest_dims(make_router, uneven_inputs, rank):
    router = make_router(rotary=True, index_dim=rank)
    truncated = index_error(router, uneven_inputs)
    start_index(router, uneven_inputs)
    best = index_error(router, uneven_inputs)
    assert best <= truncated
    # least squares of rank r over all pairs: the singular values that are cut off
    cut = 0.0
    for group in range(2):
        q, k = uneven_inputs.q[:, 2 * group : 2 * group + 2].flatten(0, 2), uneven_inputs.k[:, group].flatten(0, 1)
        singular = torch.linalg.svdvals((torch.linalg.qr(q).R @ torch.linalg.qr(k).R.T).double())
        cut += (singular[rank:].pow(2).sum() / (len(q) * len(k))).item()
    assert best == pytest.approx((cut / 2) ** 0.5, rel=1e-3)


def test_the_joint_svd_is_exact_at_full_rank(make_router, uneven_inputs):
    router = make_router(index_dim=16)
    start_index(router, uneven_inputs)
    scale = (uneven_inputs.q[:, :2].flatten(0, 2) @ uneven_inputs.k[:, 0].flatten(0, 1).T).pow(2).mean().sqrt()
    assert index_error(router, uneven_inputs) < 1e-4 * scale
