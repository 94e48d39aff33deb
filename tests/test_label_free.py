"""Training without labels: online and from a scan, the head learns how wide the model's own nucleus
is, and what the text has there does not matter."""

import json
import math

import pytest
import torch

from autodeco_fast import TemperatureHead
from autodeco_fast.training import base_model
from autodeco_fast.training.batches import OnlineSource, ScanSource
from autodeco_fast.training.data import Example
from autodeco_fast.training.head_folder import METRICS_NAME
from autodeco_fast.training.loop import train
from autodeco_fast.training.scan_store import Scan
from tests.commands import assert_refuses, command
from tests.laws import Law, settings
from tests.scans import make_scan
from tests.tiny_models import tiny_model
from tests.training_runs import CPU, equal, make_examples, read_lines, scan_config

CONTEXTS = 4


class Model(Law):
    """Four contexts with logits of their own."""

    vocabulary = 50

    def __init__(self):
        spread = torch.tensor([1.0, 2.0, 4.0, 8.0])
        g = torch.Generator().manual_seed(0)
        super().__init__(torch.randn(50, CONTEXTS, generator=g) * spread)

    def nucleus_width(self, mass: float, min_p: float) -> torch.Tensor:
        """Of the mass within reach, from sorted logits."""
        z = self.weight.T.double().sort(-1, descending=True).values
        required = (z[:, :1] - z) / -math.log(min_p)
        p = torch.where(required <= 2, z.softmax(-1), 0.0)
        last = ((p / p.sum(-1, keepdim=True)).cumsum(-1) < mass).sum(-1)
        return required.gather(1, last[:, None])[:, 0]


def random_examples(seed: int) -> list[Example]:
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 50, (40,), generator=g).tolist()
    return [Example([i % CONTEXTS, y], [-100, y]) for i, y in enumerate(targets)]


def learned(tmp_path, name: str, seed: int, **options) -> TemperatureHead:
    options = {"min_p": 0.02, "objective": "label_free", "output": tmp_path / name, **options}
    config = settings(tmp_path, num_train_epochs=300, **options)
    return train(OnlineSource(Model(), random_examples(seed), config), config)


def test_the_width_of_the_nucleus_is_learned(tmp_path):
    head = learned(tmp_path, "a", seed=0)
    width = Model().nucleus_width(0.9, 0.02)
    assert (width < 2).all()
    with torch.no_grad():
        assert (head(torch.eye(CONTEXTS)) - width).abs().max() < 0.1
    other = learned(tmp_path, "b", seed=1)  # other targets
    assert equal(head, other)
    biased = learned(tmp_path, "c", seed=0, gravity=0.4)  # the control: another mass
    with torch.no_grad():
        assert (biased(torch.eye(CONTEXTS)) - width).abs().max() > 0.3


def test_a_scan_teaches_what_text_teaches(tmp_path):
    """One step on all tokens."""
    options = {"objective": "label_free", "batch_tokens": 10**6, "min_p": 0.5}
    base = base_model.wrap(tiny_model("llama"))
    data = [r._replace(labels=[-100, *r.input_ids[1:]]) for r in make_examples(16)]
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(json.dumps(r._asdict()) + "\n" for r in data))
    make_scan(tmp_path, data=path, base=base)
    config = scan_config(tmp_path, **options)
    source, measure_on = ScanSource(Scan(config.scan), config, CPU, lm_head=base).split()
    assert measure_on is None
    head = train(source, config)
    config = settings(
        tmp_path,
        output=tmp_path / "online",
        num_train_epochs=1,
        learning_rate=1e-3,
        **options,
    )
    online = train(OnlineSource(base, data, config), config)
    for a, b in zip(head.parameters(), online.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)  # hidden states in bf16
    metrics = [read_lines(tmp_path / name / METRICS_NAME)[0] for name in ("out", "online")]
    assert metrics[0]["selected_tokens"] == metrics[1]["selected_tokens"]
    assert metrics[0]["loss"] == pytest.approx(metrics[1]["loss"], rel=1e-2)
    assert metrics[0]["required_temperature"] > 0


def test_every_token_counts(tmp_path):
    """Also those that the hinge leaves out: impossible, trivial or out of reach."""
    config = settings(
        tmp_path, objective="label_free", max_rank=0, easy_fraction=0.0, num_train_epochs=1
    )
    train(OnlineSource(Model(), random_examples(0), config), config)
    (seen,) = read_lines(config.output / METRICS_NAME)
    assert seen["selected_tokens"] == seen["target_tokens"] == 40


def test_the_command_takes_a_scan_or_text(model, scan, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"w5 w{k} w7"}) + "\n" for k in range(3, 12)))
    ways = {"scan": ("--scan", scan), "online": ("--model", model, "--data", rows)}
    for name, options in ways.items():
        options = (*options, "--objective", "label_free", "--output", tmp_path / name)
        done = command("train", *options, "--eval-fraction", 0.3)
        assert done.returncode == 0, done.stderr
        assert TemperatureHead.from_pretrained(tmp_path / name).hidden_size == 32
        assert read_lines(tmp_path / name / METRICS_NAME)[-1]["eval_loss"] > 0


def test_a_scan_whose_model_is_gone_is_refused(tmp_path):
    make_scan(tmp_path)
    options = ("--scan", tmp_path / "scan", "--output", tmp_path / "out")
    done = command("train", *options, "--objective", "label_free")
    assert_refuses(done, "model must be a folder or a hub id of a causal language model")
