"""What of serving needs no vLLM: options of servers and requests, rows of logits, the log."""

import json
import math
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from autodeco_fast import TemperatureHead, TopPHead
from autodeco_fast.policies import HeadPolicy
from autodeco_fast.policies.autodeco import AutoDecoPolicy
from autodeco_fast.policies.base import Picked
from autodeco_fast.serving import vllm_settings
from autodeco_fast.serving.vllm_log import TemperatureLog
from autodeco_fast.serving.vllm_model import Adaptive
from autodeco_fast.serving.vllm_rows import RequestOptions, Row, Rows, read_options
from tests.checkpoint_folders import on_the_hub
from tests.commands import ROOT
from tests.tiny_models import min_p_distribution, tiny_head, tiny_model

MIN_P = 0.1


def config(model="nowhere", **additional):
    hf_config = SimpleNamespace()
    model_config = {"model": model, "hf_config": hf_config, "revision": "v2", "hf_token": None}
    return SimpleNamespace(
        additional_config=additional,
        model_config=SimpleNamespace(**model_config),
        load_config=SimpleNamespace(download_dir=None),
    )


def params(**given):
    defaults = {"temperature": 1.0, "min_p": 0.0, "n": 1, "extra_args": None}
    return SimpleNamespace(**{**defaults, **given})


def test_nothing_here_imports_a_server():
    code = """
import sys
import autodeco_fast.serving.vllm, autodeco_fast.serving.vllm_rows
import autodeco_fast.serving.vllm_settings, autodeco_fast.serving.vllm_log
assert not any(name.split(".")[0] == "vllm" for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_settings_are_checked(head, model):
    read = vllm_settings.read_settings
    assert read(config(autodeco_head="x", other=1)).head == "x"
    for given, complaint in (
        ({"autodeco_haed": "x"}, "autodeco_sampler, got 'autodeco_haed'"),
        ({"autodeco_head": 1}, "autodeco_head must be text, got 1"),
        ({"autodeco_sampler": "ours"}, "autodeco_sampler must be one of vllm, fused"),
    ):
        with pytest.raises(ValueError, match=complaint) as raised:
            read(config(**given))
        assert "\n" not in str(raised.value)
    assert vllm_settings.head_of(config()) is None
    assert vllm_settings.head_of(config(model=str(head))) == str(head)
    with pytest.raises(ValueError, match="need autodeco_head: the model 'nowhere' brings no"):
        vllm_settings.head_of(config(autodeco_log="x"))
    assert isinstance(vllm_settings.load_policy(str(head)), HeadPolicy)
    with pytest.raises(ValueError, match="model_type must be 'autodeco', got 'llama'"):
        vllm_settings.load_policy(str(model))


def test_a_folder_without_a_head_and_the_switch(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"has neither autodeco_config\.json nor config\.json"):
        vllm_settings.load_policy(str(tmp_path))
    assert not vllm_settings.switched_off()
    monkeypatch.setenv("AUTODECO_FAST_VLLM", "0")
    assert vllm_settings.switched_off()
    monkeypatch.setenv("AUTODECO_FAST_VLLM", "off")
    with pytest.raises(ValueError, match="AUTODECO_FAST_VLLM must be 0 or 1, got 'off'"):
        vllm_settings.switched_off()


def test_heads_of_a_model_on_the_hub_are_of_the_revision_that_is_served(
    head, checkpoint, monkeypatch, tmp_path
):
    repos = {"user/own": head, "user/merged": checkpoint("llama", "merged"), "user/plain": tmp_path}
    on_the_hub(monkeypatch, tmp_path / "no", repos)
    plain = ("user/plain", "s3://bucket/of/models", "user/model:Q4_K_M")
    served = {name: config(model=name) for name in {*repos, *plain}}
    served["user/merged"].model_config.hf_config.autodeco_merged = True
    for one in served.values():
        one.load_config.download_dir = tmp_path / "hub"
    found = {name: vllm_settings.head_of(one) for name, one in served.items()}
    assert [found[name] for name in plain] == [None] * 3
    down = config(model="user/down")
    with pytest.raises(ValueError, match=r"model must be a folder or a hub id .* not found there"):
        vllm_settings.head_of(down)
    for name, kind in (("own", HeadPolicy), ("merged", AutoDecoPolicy)):
        folder = found[f"user/{name}"]
        assert folder == str(tmp_path / f"hub/models--user--{name}/snapshots/v2")
        assert isinstance(vllm_settings.load_policy(folder), kind)


def test_both_heads_of_a_folder_or_a_checkpoint(checkpoint):
    policy = vllm_settings.load_policy(str(checkpoint("llama", "merged")))
    assert policy.top_p_head is not None
    assert policy.min_p == 0


@pytest.mark.parametrize(
    "extra, complaint",
    [
        ({"autodeco": 2}, "autodeco must be 0 or 1, got 2"),
        ({"autodeco": "0"}, "autodeco must be an integer"),
        ({"t_scale": "1"}, "t_scale must be a finite number"),
        ({"t_scale": 0}, "t_scale must be positive"),
        ({"t_min": -1}, "t_min must be ≥ 0"),
        ({"t_min": 1, "t_max": 0.5}, "t_max must be ≥ t_min 1.0, got 0.5"),
        ({"autodeco_min_p": 2}, "autodeco_min_p must be in [0, 1]"),
        ({"autodeco_log": "../x y"}, "autodeco_log must be 1 to 64 letters, digits"),
        ({"autodeco_log": 3}, "autodeco_log must be text"),
        ({"autodeco_other": 3}, "autodeco_log, got 'autodeco_other'"),
    ],
)
def test_requests_are_checked(extra, complaint):
    with pytest.raises(ValueError) as raised:
        read_options(params(extra_args=extra))
    assert complaint in str(raised.value)
    assert str(raised.value).startswith("vllm_xargs")
    assert "\n" not in str(raised.value)


def test_what_a_request_may_say():
    assert read_options(params()) == RequestOptions()
    assert read_options(params(extra_args={"autodeco": False, "others": 1})).autodeco == 0
    with pytest.raises(ValueError, match=r"min_p 0.2 and min_p 0.1 are the same cut: give one"):
        read_options(params(extra_args={"autodeco_min_p": 0.2}, min_p=0.1))
    with pytest.raises(ValueError, match=r"defaults bring min_p, give \"min_p\": 0 too"):
        read_options(params(extra_args={"autodeco_min_p": 0.0}, min_p=0.1))
    with pytest.raises(ValueError, match="autodeco_log names one completion, got n 2"):
        read_options(params(extra_args={"autodeco_log": "x"}, n=2))
    assert read_options(params(extra_args={"t_scale": 2}, n=2)).t_scale == 2


def served(policy, asked: list[dict]) -> Rows:
    rows = Rows(8, torch.device("cpu"), top_p=policy.cuts_by_row)
    for slot, each in enumerate(asked):
        rows.put(slot, Row.of(params(**each), policy, cuts_here=True))
    rows.upload()
    return rows


def test_rows_are_what_the_requests_asked():
    """In any order of slots, and again after they were left and filled by others."""
    torch.manual_seed(0)
    policy = HeadPolicy(head=TemperatureHead(32, min_p=MIN_P))
    z, T = 3 * torch.randn(5, 96), torch.tensor([0.2, 0.5, 1.9, 1e-4, 0.9])
    asked = [
        {"temperature": 0.7},
        {"extra_args": {"autodeco": 0}},
        {"extra_args": {"t_scale": 2.0, "t_max": 1.5}},
        {"extra_args": {"t_min": 0.3}, "min_p": 0.02},
        {"temperature": 0.0},
    ]
    used = torch.tensor([0.2, 1.0, 1.5, 0.3, 0.9])
    rows, order = served(policy, asked), [3, 0, 4, 2, 1]
    scaled = z / torch.where(T < 1e-3, 1e-20, T)[:, None]
    logits, at = rows.apply(
        scaled[order], Picked(T[order]), np.array([0, 1, 2, 3, 4]), torch.tensor(order)
    )
    torch.testing.assert_close(at, used[order])
    cut = dict(zip(range(5), [MIN_P, 0, MIN_P, 0, 0]))
    for row, slot in zip(logits, order):
        t = asked[slot].get("temperature", 1.0) or 1.0
        expected = min_p_distribution(z[slot : slot + 1].double(), float(used[slot]) * t, cut[slot])
        torch.testing.assert_close(
            (row / t).softmax(0).double()[None], expected, rtol=1e-4, atol=1e-6
        )
    assert [rows.needs(slot) for slot in range(5)] == [True, True, True, True, False]
    assert [rows.needs(slot, min_p=False) for slot in range(3)] == [False, True, True]
    for slot in range(5):
        rows.put(slot, None)
    rows.upload()
    again, _ = rows.apply(scaled.clone(), Picked(T), np.arange(5), torch.arange(5))
    assert torch.equal(again, scaled)


def test_logits_come_over_t_in_place_and_are_handed_out_in_slices():
    model = tiny_model("llama")
    policy = HeadPolicy(head=tiny_head(model), min_p=MIN_P)
    hidden, z = torch.randn(6, 32), 3 * torch.randn(6, 96)
    T = policy.head(hidden)
    adaptive, given = Adaptive(policy, cuts_here=False), z.clone()
    assert adaptive.over_temperature(hidden, given) is given
    torch.testing.assert_close(given, z / T[:, None])
    assert adaptive.over_temperature(hidden, None) is None
    parts = [adaptive.take(n).temperature for n in (1, 3, 2)]
    torch.testing.assert_close(torch.cat(parts), T)
    with pytest.raises(RuntimeError, match="1 rows of logits that did not go through the head"):
        adaptive.take(1)
    cut = Adaptive(policy, cuts_here=True).over_temperature(hidden, z.bfloat16())
    assert cut.dtype == torch.float32
    expected = min_p_distribution(z.bfloat16().double(), T.double()[:, None], MIN_P)
    assert torch.equal(cut.softmax(1) == 0, expected == 0)


@pytest.mark.parametrize("top_p", [None, 0.5])
def test_a_mask_after_the_cut_leaves_the_most_probable_token_that_it_allows(top_p):
    policy = HeadPolicy(head=TemperatureHead(32, min_p=MIN_P))
    if top_p is not None:
        policy = AutoDecoPolicy(head=policy.head, top_p_head=TopPHead(32))
    torch.manual_seed(0)
    hidden, z = torch.randn(6, 32), 3 * torch.randn(6, 96)
    adaptive = Adaptive(policy, cuts_here=True)
    cut = adaptive.over_temperature(hidden, z.clone())
    T = adaptive.take(6).temperature[:, None]
    kept = cut.softmax(1) > 0
    assert torch.equal(cut[kept], (z / T)[kept])
    assert 6 <= kept.sum() < kept.numel() / 2
    allowed = ~kept & (torch.rand(kept.shape) < 0.5)
    expected = z.masked_fill(~allowed, -math.inf).argmax(1)
    drawn = (cut.masked_fill(~allowed, -math.inf) / 2).softmax(1)  # a request's T of 2
    assert torch.equal(drawn.argmax(1), expected)
    assert drawn.amax(1).min() > 0.999


def test_a_cut_after_the_requests_temperatures_is_the_same():
    """In vLLM's V1 runner, where penalties and those divisions come before it."""
    policy = HeadPolicy(head=TemperatureHead(32, min_p=MIN_P))
    asked = [{"temperature": 0.7}, {"temperature": 1.6}, {"temperature": 0.0}, {"min_p": 0.2}]
    rows, slots = served(policy, asked), np.arange(4)
    z, t = 3 * torch.randn(4, 96), torch.tensor([0.7, 1.6, 1.0, 1.0])[:, None]
    at = Picked(torch.ones(4)), slots, torch.arange(4)
    before = rows.cut(z.clone(), *at)
    after = rows.cut(z / t, *at, over_temperature=True)
    torch.testing.assert_close(before / t, after)
    assert before.isinf().any(1).tolist() == [True, True, False, False]


def test_a_broken_cut_would_be_seen():
    """The twin: a Min-P of 0.15 keeps other tokens on these rows."""
    z = 3 * torch.randn(6, 96).double()
    one, other = (min_p_distribution(z, 0.8, p) > 0 for p in (MIN_P, 0.15))
    assert not torch.equal(one, other)


def test_the_log_has_a_line_a_token(tmp_path):
    log = TemperatureLog(str(tmp_path / "log.jsonl"))
    log.write([("a", 0, 0.123456789), ("b", 3, 1.5)])
    log.write([("a", 1, 0.2)])
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0] == {"id": "a", "index": 0, "temperature": 0.123457}
    assert [line["id"] for line in lines] == ["a", "b", "a"]
    with pytest.raises(ValueError, match=r"cannot be written: .*directory"):
        TemperatureLog(str(tmp_path))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_ends_the_log_and_nothing_else(caplog):
    log = TemperatureLog("/dev/full")
    for _ in range(3):
        log.write([("a", 0, 0.5)])
    (said,) = caplog.messages
    assert re.match(r"autodeco_log /dev/full cannot be written: .*No space left", said), said
    assert "\n" not in said


def test_the_page_names_every_key():
    page = (ROOT / "docs/serving.md").read_text()
    for each in fields(vllm_settings.Settings):
        assert f"--additional-config.autodeco_{each.name} " in page
    rows = re.findall(r"^\| (`[a-z_`, ]+`) \| [^|]+\|$", page, re.M)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert named == [each.name for each in fields(RequestOptions)]
