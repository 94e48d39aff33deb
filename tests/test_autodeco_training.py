"""AutoDeco's objectives as runs: against its released formulas, its faults, its switches."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from autodeco_fast import TemperatureHead, TopPHead, goldilocks_weight, token_stats
from autodeco_fast.training import base_model
from autodeco_fast.training.batches import OnlineSource, ScanSource
from autodeco_fast.training.config import AUTODECO, TrainConfig
from autodeco_fast.training.data import encode
from autodeco_fast.training.head_folder import METRICS_NAME
from autodeco_fast.training.loop import new_head, objective_of, train
from autodeco_fast.training.objectives import AutoDecoJoint, AutoDecoTemperature, Batch
from autodeco_fast.training.scan_store import Scan
from autodeco_fast.training.step import trained, training_step
from autodeco_fast.training.token_uniform import token_uniform
from tests.reference import autodeco
from tests.scans import make_scan
from tests.tiny_models import VOCAB, tiny_head, tiny_model
from tests.training_runs import (
    CPU,
    equal,
    make_examples,
    online_config,
    read_lines,
    scan_config,
    train_online,
)

H = 32
# As transformers' Trainer has it by default; the norm is one that binds.
RELEASED = {
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 0.02,
    "learning_rate": 1e-2,
}


@pytest.fixture(scope="module")
def base():
    return base_model.wrap(tiny_model("llama"))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Folder of a temperature head of various T."""
    folder = tmp_path_factory.mktemp("first")
    tiny_head(tiny_model("llama")).save_pretrained(folder)
    return folder


def of(objective: str, first) -> dict:
    """Options of an objective, with the head it needs."""
    return {"objective": objective, **({"head": first} if objective == "autodeco_top_p" else {})}


def run(base, settings: TrainConfig, examples) -> nn.Module:
    return train(OnlineSource(base, examples, settings), settings)


def released_run(base, settings: TrainConfig, examples) -> nn.Module:
    """Full-batch steps with autograd over `[N, V]` logits of the model's own forward."""
    head = new_head(settings, H)
    both = isinstance(head, nn.ModuleDict)
    first = head["temp_head"] if both else head
    first.requires_grad_(settings.objective != "autodeco_top_p")
    optimizer = torch.optim.AdamW(trained(head), lr=settings.learning_rate, weight_decay=0.0)
    steps = settings.num_train_epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for epoch in range(steps):
        hidden, z, y, uniform = [], [], [], []
        for i, example in enumerate(examples):
            ids = torch.tensor([example.input_ids])
            with torch.no_grad():
                out = base.model(input_ids=ids, output_hidden_states=True)
            hidden.append(out.hidden_states[-1][0, :-1])
            z.append(out.logits[0, :-1].float())
            y.append(torch.tensor(example.labels[1:]))
            position = torch.arange(1, ids.shape[1])
            document = torch.full_like(position, i)
            uniform.append(token_uniform(settings.seed, document, position, epoch=epoch))
        hidden, z, y, uniform = (torch.cat(x) for x in (hidden, z, y, uniform))
        T = 2 * torch.sigmoid(first.mlp(hidden))[:, 0]
        kept = (y >= 0) & ~((z.argmax(-1) == y) & (uniform < 0.6))
        loss = 0.0
        if settings.objective != "autodeco_top_p":
            loss = autodeco.temperature_loss(z, T, y, kept, "unscaled")
        if both:
            P = autodeco.joint_top_p(head["top_p_head"].mlp, hidden, z, T)
            loss = loss + autodeco.soft_top_p(z, T, P, y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained(head), settings.max_grad_norm)
        optimizer.step()
        schedule.step()
    return head


def likely_examples(base, n: int = 6) -> list:
    """Examples whose targets are often the model's argmax."""
    made = []
    for example in make_examples(n):
        ids = list(example.input_ids)
        for at in range(3, len(ids), 2):
            with torch.no_grad():
                ids[at] = base.model(torch.tensor([ids[:at]])).logits[0, -1].argmax().item()
        made.append(example._replace(input_ids=ids, labels=[-100, -100, *ids[2:]]))
    return made


@pytest.mark.parametrize("objective", AUTODECO)
def test_a_run_is_the_released_one(tmp_path, base, first, objective):
    examples = likely_examples(base)
    options = {**RELEASED, **of(objective, first), "num_train_epochs": 4}
    settings = online_config(tmp_path, per_device_train_batch_size=8, **options)
    theirs = released_run(base, settings, examples)
    ours = run(base, settings, examples)
    fresh = new_head(settings, H)
    for a, b, c in zip(ours.parameters(), theirs.parameters(), fresh.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)
        if c.shape[-1] > 1 and objective != "autodeco_top_p":
            assert (a - c).abs().max() > 3e-3  # it has learned
    lines = read_lines(tmp_path / "out" / METRICS_NAME)
    if objective != "autodeco_top_p":
        selected = [line["selected_tokens"] for line in lines]
        assert len(set(selected)) > 1  # drawn anew every epoch
        assert max(selected) < lines[0]["target_tokens"]


def test_accumulation_changes_nothing_for_both_heads(tmp_path):
    """Examples are of unequal length: a mean of batch means would differ, an undivided sum too."""
    options = {"objective": "autodeco_joint", "max_grad_norm": 0.02, "num_train_epochs": 2}
    whole, one = train_online(tmp_path, "a", per_device_train_batch_size=8, **options)
    parts, four = train_online(
        tmp_path, "b", per_device_train_batch_size=2, gradient_accumulation_steps=4, **options
    )
    for a, b in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-5)
    assert [m["loss"] for m in one] == pytest.approx([m["loss"] for m in four], rel=1e-5)


def test_the_top_p_head_alone(tmp_path, base, first):
    whole = {"per_device_train_batch_size": 8}  # every step is of all examples
    settings = online_config(tmp_path, **of("autodeco_top_p", first), num_train_epochs=4, **whole)
    before = new_head(settings, H)
    run(base, settings, make_examples(8))
    assert equal(TemperatureHead.from_pretrained(tmp_path / "out"), before["temp_head"])
    second = TopPHead.from_pretrained(tmp_path / "out/top_p_head")
    assert not equal(second, before["top_p_head"])
    lines = read_lines(tmp_path / "out" / METRICS_NAME)
    assert lines[-1]["loss"] < lines[0]["loss"]
    again = replace(settings, head=tmp_path / "out", output=tmp_path / "again")
    assert equal(new_head(again, H)["top_p_head"], second)  # both heads go on


@pytest.mark.parametrize("objective", AUTODECO)
def test_a_scan_teaches_what_text_teaches(tmp_path, first, objective):
    base = base_model.wrap(tiny_model("llama").bfloat16())  # what a scan keeps of hidden states
    data = [e._replace(labels=[-100, *e.input_ids[1:]]) for e in likely_examples(base, 12)]
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(json.dumps(e._asdict()) + "\n" for e in data))
    make_scan(tmp_path, data=path, base=base)
    options = {**of(objective, first), "learning_rate": 1e-2}
    online = online_config(tmp_path, "online", per_device_train_batch_size=64, **options)
    text = run(base, online, data)
    settings = scan_config(tmp_path, batch_tokens=10**6, **options)
    scanned = train(ScanSource(Scan(settings.scan), settings, CPU, lm_head=base), settings)
    before = new_head(settings, H)
    learned = [
        torch.cat([(a - b).flatten() for a, b in zip(head.parameters(), before.parameters())])
        for head in (scanned, text)
    ]
    # A first step of AdamW is little but the gradient's sign.
    assert torch.cosine_similarity(*learned, dim=0) > 0.99
    lines = [read_lines(tmp_path / name / METRICS_NAME) for name in ("out", "online")]
    assert lines[0][0]["selected_tokens"] == lines[1][0]["selected_tokens"]
    assert lines[0][0]["loss"] == pytest.approx(lines[1][0]["loss"], rel=1e-4)


def test_a_scan_that_left_tokens_out_is_for_goldilocks(tmp_path, base):
    make_scan(tmp_path, base=base, all_tokens=False)
    for objective in ("autodeco_temperature", "autodeco_joint"):
        settings = scan_config(tmp_path, objective=objective)
        with pytest.raises(ValueError, match=f"objective {objective} looks at every token, and s"):
            ScanSource(Scan(settings.scan), settings, CPU, lm_head=base)
    settings = scan_config(tmp_path, objective="autodeco_temperature", goldilocks_filter=True)
    train(ScanSource(Scan(settings.scan), settings, CPU, lm_head=base), settings)


def step_case(base, n: int = 60):
    """Hidden states, targets that are often the argmax, uniforms."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, H, generator=g)
    y = torch.randint(0, VOCAB, (n,), generator=g)
    y[::2] = base.logits(hidden).argmax(-1)[::2]
    y[::7] = -100
    return hidden, y, torch.rand(n, generator=g)


def test_goldilocks_takes_the_place_of_easy_drop(base, first):
    hidden, y, uniform = step_case(base)
    head = TemperatureHead.from_pretrained(first)
    options = {"max_rank": 40, "trivial_prob": 0.1, "easy_fraction": 0.5}
    objective = AutoDecoTemperature(goldilocks_filter=True, weighting=None, **options)
    step, seen = training_step(hidden, y, base, head, objective, uniform)
    weight = goldilocks_weight(token_stats(hidden, base.weight, y), uniform=uniform, **options)
    assert torch.equal(seen.weight, weight)
    assert set(weight.tolist()) == {0.0, 1.0, 2.0}
    z, T = base.logits(hidden), head(hidden).detach()
    rows = nn.functional.cross_entropy(z / T[:, None], y, reduction="none")
    mean = ((rows * weight).sum() / weight.sum()).item()
    assert step.means()["temperature"] == pytest.approx(mean, rel=1e-5)


def test_each_trick_can_be_switched_off(tmp_path, base, first):
    hidden, y, uniform = step_case(base)
    settings = online_config(tmp_path, objective="autodeco_joint", head=first)
    head = new_head(settings, H)

    def gradients(**options) -> tuple[dict, torch.Tensor, torch.Tensor]:
        """Means, what the soft top-p loss says to T's head, which tokens were selected."""
        objective = objective_of(replace(settings, **options))
        sums = objective(Batch(hidden, y, uniform), base, head)
        soft = sums.terms["soft_top_p"][0]
        (found,) = torch.autograd.grad(soft, head["temp_head"].mlp[0].weight, allow_unused=True)
        means = {name: (loss / n).item() for name, (loss, n) in sums.terms.items()}
        return means, found, sums.weight > 0

    means, to_T, selected = gradients()
    assert to_T.any()
    assert gradients(detach_temperature=True)[1] is None
    assert gradients(detach_temperature=True)[0] == pytest.approx(means)
    every = gradients(easy_drop=0.0)[2]
    assert torch.equal(every, y >= 0)
    assert 0 < selected.sum() < every.sum()
    z, T = base.logits(hidden), head["temp_head"](hidden).detach()
    for name, weighting in (("unscaled", "unscaled"), ("scaled", "scaled"), ("none", None)):
        want = autodeco.temperature_loss(z, T, y, every, weighting).item()
        got = gradients(easy_drop=0.0, weighting=name)[0]["temperature"]
        assert got == pytest.approx(want, rel=1e-5)
    flat = gradients(steepness=0.0)[0]["soft_top_p"]
    want = autodeco.soft_top_p(z, T, torch.ones_like(T), y, 0.0).item()
    assert flat == pytest.approx(want, rel=1e-5)
    assert AutoDecoJoint().steepness == settings.steepness == 30.0


def test_both_heads_resume_to_the_same_bits(tmp_path, base):
    options = {"objective": "autodeco_joint", "save_steps": 2, "num_train_epochs": 3}
    whole, metrics = train_online(tmp_path, "whole", **options)

    class Killed(Exception):
        pass

    def stop(line):
        if line["step"] == 5:
            raise Killed

    settings = online_config(tmp_path, "killed", **options)
    source = OnlineSource(base, make_examples(16), settings)
    with pytest.raises(Killed):
        train(source, settings, on_step=stop)
    resumed = train(source, replace(settings, resume=True))
    assert equal(resumed, whole)
    assert read_lines(tmp_path / "killed" / METRICS_NAME) == metrics
    assert equal(TopPHead.from_pretrained(tmp_path / "killed/top_p_head"), whole["top_p_head"])


def test_a_model_in_bf16_trains_both_heads(tmp_path, first):
    base = base_model.wrap(tiny_model("llama").bfloat16())
    for objective in AUTODECO:
        settings = online_config(tmp_path, objective, **of(objective, first), max_steps=2)
        head = run(base, settings, make_examples(4))
        assert {p.dtype for p in head.parameters()} == {torch.float32}
        lines = read_lines(settings.output / METRICS_NAME)
        assert all(math.isfinite(line["loss"]) for line in lines)


def test_a_frozen_model_drops_nothing():
    model = tiny_model("gpt2")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    base = base_model.wrap(model.train())
    ids = torch.arange(3, 10)[None]
    assert torch.equal(base.hidden(ids), base.hidden(ids))
    assert not any(p.requires_grad for p in model.parameters())


def test_a_run_without_tokens_says_so(tmp_path, base):
    """Every target is the argmax, and all such are left out."""
    ids = [5]
    for _ in range(4):
        with torch.no_grad():
            ids.append(base.model(torch.tensor([ids])).logits[0, -1].argmax().item())
    example = make_examples(1)[0]._replace(input_ids=ids, labels=[-100, *ids[1:]])
    settings = online_config(tmp_path, objective="autodeco_temperature", easy_drop=1.0)
    words = "no token was left to learn from: easy_drop 1 left out all 4 targets"
    with pytest.raises(ValueError, match=words):
        run(base, settings, [example])
    assert not (tmp_path / "out/autodeco_config.json").exists()


def test_a_text_keeps_its_first_token():
    class Letters:
        eos_token_id = 0

        def __call__(self, text):
            return type("Encoded", (), {"input_ids": [ord(c) for c in text]})

    ids, labels = encode(Letters(), {"prompt": "ab", "completion": "cd"}, 10)
    assert ids == [*map(ord, "abcd"), 0]
    assert labels == [-100, -100, ord("c"), ord("d"), 0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": "autodeco_top_p"}, "objective autodeco_top_p needs head, a folder"),
        ({"easy_drop": 0.5}, "easy_drop is for objective autodeco_temperature and autodeco_joint"),
        ({"weighting": "none"}, "weighting is for objective .*, not min_p_hinge"),
        (
            {"objective": "label_free", "goldilocks_filter": True},
            "goldilocks_filter is for objective .*, not label_free",
        ),
        (
            {"objective": "autodeco_temperature", "steepness": 3.0},
            "steepness is for objective autodeco_top_p and autodeco_joint, not autodeco_temp",
        ),
        (
            {"objective": "autodeco_temperature", "detach_temperature": True},
            "detach_temperature is for objective autodeco_joint, not autodeco_temperature",
        ),
        ({"objective": "autodeco_joint", "easy_drop": 1.5}, r"easy_drop must be in \[0, 1\]"),
        ({"objective": "autodeco_joint", "steepness": -1.0}, "steepness must be ≥ 0, got -1"),
        ({"weighting": None}, "weighting must be text, got None"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be ≥ 0, got -1"),
        ({"weight_decay": -1.0}, "weight_decay must be ≥ 0, got -1"),
    ],
)
def test_settings_are_checked(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        online_config(tmp_path, **options)


def test_a_head_to_start_from_must_fit(tmp_path, base):
    TemperatureHead(H + 1).save_pretrained(tmp_path / "wide")
    TemperatureHead(H).save_pretrained(tmp_path / "half")
    TopPHead(H + 1).save_pretrained(tmp_path / "half/top_p_head")
    (tmp_path / "none").mkdir()
    for name, words in (
        ("wide", f"head has width {H + 1}, the model's output embedding takes {H}"),
        ("half", f"head has width {H + 1}, the model's output embedding takes {H}"),
        ("none", "has no autodeco_config.json"),
    ):
        settings = online_config(tmp_path, objective="autodeco_joint", head=tmp_path / name)
        with pytest.raises(ValueError, match=words):
            run(base, settings, make_examples(2))
    train_online(tmp_path, "trained", max_steps=1)
    other = base_model.wrap(tiny_model("qwen3"))
    settings = online_config(tmp_path, head=tmp_path / "trained")
    with pytest.raises(ValueError, match="was trained for another model: its lm_head is"):
        run(other, settings, make_examples(2))
