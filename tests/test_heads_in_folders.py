"""The heads in a folder or on the hub: which of them decode, at which cut, for which model."""

import json
import re

import pytest
import torch

from autodeco_fast import HeadPolicy, TemperatureHead, TopPHead
from autodeco_fast.autodeco import convert
from autodeco_fast.policies import AutoDecoPolicy
from autodeco_fast.policies.folder import load_policy
from autodeco_fast.training import base_model
from autodeco_fast.training.head_folder import min_p_of
from autodeco_fast.training.scan import lm_head_fingerprint
from tests.autodeco_checkpoints import base_folder, head_tensors
from tests.checkpoint_folders import on_the_hub, plain_base, same_tensors
from tests.commands import assert_refuses, command


def save_two(folder, top_p: float = 0.0):
    """Both heads; the second one predicts `sigmoid(top_p)` everywhere."""
    TemperatureHead(32, min_p=0.5).save_pretrained(folder)
    save_second(folder, top_p)
    return folder


def save_second(folder, top_p: float = 0.0):
    second = TopPHead(32)
    torch.nn.init.zeros_(second.mlp[2].weight)
    torch.nn.init.constant_(second.mlp[2].bias, top_p)
    second.save_pretrained(folder / "top_p_head")
    return folder


def texts(model, head, *options) -> set[str]:
    """What `generate` writes under three seeds."""
    given = ("--model", model, "--head", head, "--prompt", "w5", "--max-new-tokens", 8, *options)
    done = [command("generate", *given, "--seed", seed) for seed in range(3)]
    assert {each.returncode for each in done} == {0}, done[0].stderr
    return {each.stdout for each in done}


@pytest.mark.parametrize("layout", ["ours", "second alone", "checkpoint"])
def test_generate_draws_with_both_heads(model, tmp_path, layout):
    """A top-p near 0 leaves the argmax, one near 1 everything: no Min-P beside it."""
    found = {}
    for top_p in (-30.0, 30.0):
        folder = tmp_path / f"{top_p:g}"
        (save_second if layout == "second alone" else save_two)(folder, top_p)
        if layout == "checkpoint":
            heads = {"head": str(folder), "top_p_head": str(folder / "top_p_head")}
            with pytest.warns(UserWarning, match="know no Min-P"):
                convert.construct(str(model), tmp_path / f"made{top_p:g}", **heads)
            folder = tmp_path / f"made{top_p:g}"
        found[top_p] = texts(model, folder)
        assert texts(model, folder, "--min-p", 1) == found[-30.0]
    assert [len(each) for each in found.values()] == [1, 3]


def test_what_split_leaves_of_a_second_head_is_loaded(tmp_path):
    base, second = plain_base(tmp_path / "base"), save_second(tmp_path / "own") / "top_p_head"
    convert.construct(str(base), tmp_path / "made", top_p_head=str(second))
    convert.split(str(tmp_path / "made"), tmp_path / "parts")
    whole = AutoDecoPolicy.load(tmp_path / "made")
    for policy in (AutoDecoPolicy.load(tmp_path / "parts/head"), load_policy(str(second.parent))):
        assert policy.head is None
        assert same_tensors(policy.top_p_head.state_dict(), whole.top_p_head.state_dict())


def test_heads_of_ours_on_the_hub(monkeypatch, tmp_path):
    save_two(tmp_path / "two")
    TemperatureHead(32, min_p=0.3).save_pretrained(tmp_path / "one")
    repos = {"user/two": tmp_path / "two", "user/one": tmp_path / "one"}
    on_the_hub(monkeypatch, tmp_path / "hub", repos)
    for policy in (AutoDecoPolicy.load("user/two"), load_policy("user/two")):
        assert isinstance(policy.top_p_head, TopPHead)
        assert (policy.min_p, policy.folder) == (0.0, "user/two")
    assert isinstance(load_policy("user/one", scale=0.5), HeadPolicy)
    assert load_policy("user/one").min_p == 0.3
    with pytest.raises(ValueError, match="'user/one' has no top_p_head/: head=FOLDER is one head"):
        AutoDecoPolicy.load("user/one")


def test_of_a_merged_checkpoint_on_the_hub_its_heads_are_fetched(monkeypatch, tmp_path):
    base = base_folder(tmp_path / "base", "qwen2", sharded=True)
    convert.construct(str(base), tmp_path / "heads")
    convert.merge(str(base), str(tmp_path / "heads"), tmp_path / "merged")
    files = sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    on_the_hub(monkeypatch, tmp_path / "hub", {"user/merged": tmp_path / "merged"})
    policy = AutoDecoPolicy.load("user/merged")
    fetched = (tmp_path / "hub").rglob("snapshots/**/*.safetensors")
    assert [path.name for path in fetched] == files[-1:] != files
    shapes = {f"top_p_head.{name}": t.shape for name, t in policy.top_p_head.state_dict().items()}
    expected = {name: t.shape for name, t in head_tensors().items()}
    assert shapes.items() <= expected.items()
    (tmp_path / "merged" / files[0]).unlink()  # of the base alone
    assert same_tensors(
        AutoDecoPolicy.load(tmp_path / "merged").head.state_dict(), policy.head.state_dict()
    )


def test_a_head_of_another_model_is_refused_on_the_hub_too(model, head, monkeypatch, tmp_path):
    settings = head / "training.json"
    settings.write_text('{"lm_head": "another"}')
    on_the_hub(monkeypatch, tmp_path / "hub", {"user/head": head})
    given = ("generate", "--model", model, "--head", "user/head", "--prompt", "w5")
    assert_refuses(command(*given), "head 'user/head' was trained for another model: its lm_head")
    (tmp_path / "hub/models--user--head/blobs/training.json-blob").write_text(
        json.dumps({"lm_head": lm_head_fingerprint(base_model.load(str(model), torch.bfloat16))})
    )
    assert command(*given, "--max-new-tokens", 1).returncode == 0


def test_an_old_head_has_the_cut_that_stands_beside_it(head):
    """Everywhere alike: in the policy, where it is calibrated and where it is saved again."""
    config = head / "autodeco_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "min_p": None}))
    assert HeadPolicy.load(head).min_p == 0.1  # nothing is known
    (head / "training.json").write_text('{"min_p": 0.02}')
    loaded = TemperatureHead.from_pretrained(head)
    assert HeadPolicy.load(head).min_p == min_p_of(loaded) == loaded.min_p == 0.02
    config.write_text(json.dumps({**json.loads(config.read_text()), "min_p": 0.3}))
    assert HeadPolicy.load(head).min_p == 0.3
    (head / "training.json").write_text('{"min_p": 2}')
    assert TemperatureHead.from_pretrained(head).min_p == 0.3
    config.write_text(json.dumps({**json.loads(config.read_text()), "min_p": None}))
    with pytest.raises(ValueError, match=r"min_p must be .*, got 2"):
        TemperatureHead.from_pretrained(head)


@pytest.mark.parametrize("layout", ["merged", "heads"])
def test_a_checkpoint_is_no_model_of_the_commands(checkpoint, head, layout):
    folder = checkpoint("llama", layout)
    words = f"model '{folder}' is an AutoDeco checkpoint, its base model is needed: `autodeco-fast"
    given = ("--model", folder)
    assert_refuses(command("generate", *given, "--head", head, "--prompt", "w5"), words)
    with pytest.raises(ValueError, match=re.escape(words)):
        base_model.load(str(folder), torch.float32)
