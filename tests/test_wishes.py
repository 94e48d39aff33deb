"""Wishes in prompts: where they stand, what a scan makes of them, and the λ that a head learns
behind each."""

import json
import math

import pytest
import torch

from autodeco_fast import TemperatureHead, logit_stats
from autodeco_fast.training import report_data, wishes
from autodeco_fast.training.batches import ScanSource
from autodeco_fast.training.calibrate import calibrate_from_files
from autodeco_fast.training.objectives import Batch, LabelFree, MinPHinge
from autodeco_fast.training.scan_store import Scan
from autodeco_fast.training.wishes import FOR_LESS, FOR_MORE, NONE, augmented, with_wish
from tests.commands import assert_refuses, command
from tests.training_runs import CPU, scan_config

USER, ASSISTANT = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes?"}


@pytest.mark.parametrize(
    ("example", "wished"),
    [
        ({"prompt": "a b", "completion": "c"}, {"prompt": "a b X", "completion": "c"}),
        ({"prompt": "a:\n\n", "completion": "c"}, {"prompt": "a: X\n\n", "completion": "c"}),
        (
            {"messages": [USER, ASSISTANT, USER, ASSISTANT]},
            {"messages": [USER, ASSISTANT, {**USER, "content": "Hi. X"}, ASSISTANT]},
        ),
        (
            {"prompt": [USER], "completion": [ASSISTANT]},
            {"prompt": [{**USER, "content": "Hi. X"}], "completion": [ASSISTANT]},
        ),
    ],
)
def test_a_wish_ends_the_last_prompt(example, wished):
    before = json.dumps(example)
    assert with_wish(example, "X") == wished
    assert json.dumps(example) == before


@pytest.mark.parametrize(
    "example",
    [{"text": "a"}, {"input_ids": [1], "labels": [1]}, {"messages": [ASSISTANT]}],
)
def test_examples_without_a_prompt_are_refused(example):
    with pytest.raises(ValueError, match="wishes need examples with a prompt"):
        list(augmented([example]))


def test_wordings_are_pairs_and_differ():
    assert len(wishes.LESS) == len(wishes.MORE)
    assert len({*wishes.LESS, *wishes.MORE}) == 2 * len(wishes.LESS)


@pytest.fixture(scope="module")
def wished(model, tmp_path_factory):
    """The folder of a scan of twelve prompts with wishes in the model's words; two shards cut an
    example apart."""
    folder = tmp_path_factory.mktemp("wishes")
    lines = ({"prompt": f"w{k} w4", "completion": f" w{k} w9 w{k + 5}"} for k in range(3, 15))
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("--model", model, "--data", folder / "rows.jsonl", "--output", folder / "scan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wishes, "LESS", ("w20 w21", "w22"))
        patch.setattr(wishes, "MORE", ("w30 w31", "w32"))
        done = command("scan", *options, "--wishes", "--all-tokens", "--examples-per-shard", 20)
    assert done.returncode == 0, done.stderr
    return folder / "scan"


def test_a_scan_takes_every_example_with_both_wishes(wished):
    scan = Scan(wished)
    assert scan.manifest["counts"]["examples"] == 36
    tokens, wish = scan.load(), scan.wish(scan.load())
    assert wish.unique().tolist() == [NONE, FOR_LESS, FOR_MORE]
    targets, hidden = (
        [values[wish == w] for w in (NONE, FOR_LESS, FOR_MORE)]
        for values in (tokens.target, tokens.hidden)
    )
    # The answers are the same; what the model makes of them is not.
    assert torch.equal(targets[0], targets[1])
    assert torch.equal(targets[0], targets[2])
    assert not torch.equal(hidden[0], hidden[1])
    assert not torch.equal(hidden[0], hidden[2])


def test_an_example_is_held_out_with_its_wishes(wished, tmp_path):
    config = scan_config(tmp_path, scan=wished, eval_fraction=0.4)
    learn, measure = ScanSource(Scan(wished), config, CPU).split()
    examples = []
    for source in (learn, measure):
        tokens = [source._read(one).document for one in source.slices]
        documents = set(torch.cat(tokens).tolist())
        examples.append({d // 3 for d in documents})
        assert documents == {3 * k + w for k in examples[-1] for w in range(3)}
    assert not examples[0] & examples[1]


def test_what_is_said_of_examples_counts_one_with_its_wishes_once(wished, tmp_path):
    """Or intervals would be of three times as many, and halves would share examples."""
    head = TemperatureHead(32, min_p=0.1)
    head.save_pretrained(tmp_path / "head")
    calibrate_from_files(tmp_path / "head", wished, alpha=0.9)
    assert json.loads((tmp_path / "head/calibration.json").read_text())["documents"] == 12
    domain = report_data.domain("wished", Scan(wished), head, min_p=0.1)
    assert len(set(domain.document.tolist())) == 36
    assert len(set(domain.example.tolist())) == 12


def test_batches_say_what_each_token_may_miss(wished, tmp_path):
    config = scan_config(tmp_path, scan=wished, gravity=0.1, wish_shift=0.75, batch_tokens=10**6)
    source = ScanSource(Scan(wished), config, CPU)
    (batch,) = source.batches(0, 0, 0, 1)
    found, counts = batch.gravity.unique(return_counts=True)
    torch.testing.assert_close(found, torch.tensor([0.025, 0.1, 0.175]))
    assert len(set(counts.tolist())) == 1


def test_an_objective_that_follows_none_is_refused(wished, tmp_path):
    config = scan_config(tmp_path, scan=wished, objective="autodeco_temperature")
    with pytest.raises(ValueError, match="autodeco_temperature follows no wishes, and scan"):
        ScanSource(Scan(wished), config, CPU)


@pytest.mark.parametrize("objective", [MinPHinge, LabelFree])
def test_each_token_is_held_to_its_own_gravity(objective):
    """Loss and gradient of a mixed batch are those of one objective a λ."""
    g = torch.Generator().manual_seed(0)
    lm_head, head = torch.nn.Linear(16, 40, bias=False), TemperatureHead(16)
    torch.nn.init.normal_(lm_head.weight)
    torch.nn.init.normal_(head.mlp[2].weight)
    hidden = torch.randn(30, 16, generator=g)
    target = torch.randint(0, 40, (30,), generator=g)
    stats = logit_stats(hidden @ lm_head.weight.detach().T, target)
    gravity = torch.tensor([0.1, 0.4, 0.025]).repeat(10)
    weight = torch.rand(30, generator=g) + 0.5

    def sums(some: torch.Tensor, value: float, gravity=None):
        options = {"min_p": 0.01, "gravity": value}
        if objective is MinPHinge:
            options |= {"max_rank": 100, "easy_fraction": 1.0}
        few = type(stats)(*(None if f is None else f[some] for f in stats))
        batch = Batch(hidden[some], target[some], stats=few, weight=weight[some], gravity=gravity)
        batch = batch._replace(uniform=torch.zeros(len(few.rank)))
        (term,) = objective(**options)(batch, lm_head, head).terms.values()
        return term

    mixed, _ = sums(torch.arange(30), 0.1, gravity)
    apart = sum(sums((gravity == v).nonzero()[:, 0], v)[0] for v in gravity.unique().tolist())
    assert mixed.item() == pytest.approx(apart.item(), rel=1e-5)
    parameters = list(head.parameters())
    ours, theirs = (torch.autograd.grad(loss, parameters) for loss in (mixed, apart))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    same, _ = sums(torch.arange(30), 0.1)  # the control: one λ for all
    assert not math.isclose(mixed.item(), same.item(), rel_tol=1e-2)


def test_a_head_learns_to_follow_wishes(wished, tmp_path):
    """On the very tokens it has seen: twelve prompts teach nothing of others."""
    options = ("--scan", wished, "--output", tmp_path / "head", "--objective", "label_free")
    options = (*options, "--gravity", 0.4)
    more = ("--num-train-epochs", 60, "--learning-rate", 0.02, "--wish-shift", 0.95)
    done = command("train", *options, *more)
    assert done.returncode == 0, done.stderr
    scan, head = Scan(wished), TemperatureHead.from_pretrained(tmp_path / "head")
    tokens = scan.load()
    with torch.no_grad():
        T = head(tokens.hidden.float())
    none, less, more = (T[scan.wish(tokens) == w].mean() for w in (NONE, FOR_LESS, FOR_MORE))
    assert less < none - 0.1
    assert none < more - 0.1


def test_text_without_a_prompt_is_refused_before_the_model(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    options = ("--data", rows, "--output", tmp_path / "scan", "--wishes")
    done = command("scan", "--model", tmp_path / "none", *options)
    assert_refuses(done, "wishes need examples with a prompt", "text")
