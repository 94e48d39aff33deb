"""An option is written once: its dataclass checks and documents it, and the command line has it."""

import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import typer

from autodeco_fast.cli import app
from autodeco_fast.options import type_of
from autodeco_fast.training.config import ScanConfig, TrainConfig
from autodeco_fast.training.eval_config import EvalConfig
from autodeco_fast.training.reward_config import RewardConfig
from tests.commands import ROOT

COMMANDS = [
    ("scan", ScanConfig),
    ("train", TrainConfig),
    ("train", RewardConfig),
    ("eval", EvalConfig),
]
OUTSIDE = {
    "≥ 0": (-1,),
    "at least 1": (0, -1),
    "at least 2": (1,),
    "1 or 2": (0, 3),
    "positive": (0, -1),
    "in (0, 1)": (0, 1, 1.5),
    "in [0, 1)": (-0.1, 1),
    "in (0, 1]": (0, 1.1),
    "in [0, 1]": (-0.1, 1.1),
}


def parameters(name: str) -> dict:
    return {p.name: p for p in typer.main.get_command(app).commands[name].params}


def given(config: type) -> dict:
    """What the options without a default need."""
    wanted = {"output": Path("out"), "model": "m"}
    if config is RewardConfig:
        return {**wanted, "objective": "rewards", "prompts": Path("p"), "reward": "m:f"}
    if config is EvalConfig:
        return {**wanted, "prompts": Path("p"), "scorer": "exact"}
    return {**wanted, "data": "d" if config is ScanConfig else Path("d")}


@pytest.mark.parametrize("name, config", COMMANDS)
def test_an_option_is_in_the_documentation_and_on_the_command_line(name, config):
    found = parameters(name)
    others = {f.name for n, c in COMMANDS if n == name and c is not config for f in fields(c)}
    documentation = " ".join(config.__doc__.split())
    for field in fields(config):
        option = found.pop(field.name)
        assert field.metadata["help"]
        assert f"{field.name}: {field.metadata['help']}" in documentation
        if config is RewardConfig and field.name in others:
            continue  # shown as `TrainConfig` has it
        assert field.metadata["help"] in option.help
        assert field.metadata["must_be"] in option.help
        written = field.name.replace("_", "-")
        assert option.opts == [f"--{written}"]
        assert option.secondary_opts == ([f"--no-{written}"] if field.type is bool else [])
        if field.default is MISSING:
            assert option.required == (name != "train")  # which may find it in a file
        elif field.metadata["is_size"]:
            assert option.default == "0"
        else:
            assert option.default == field.default
            if field.default is not None:
                assert f"by default {field.default!r}" in documentation
    mine = {"config", "sweep"} if name == "train" else set()
    assert set(found) - {"help"} - others == mine


@pytest.mark.parametrize("config", [config for _, config in COMMANDS])
def test_values_out_of_range_are_refused_in_one_line(config):
    config(**given(config))
    checked = set()
    for field in fields(config):
        for value in OUTSIDE.get(field.metadata["must_be"], ()):
            checked.add(field.name)
            with pytest.raises(ValueError, match=f"^{field.name} must be ") as caught:
                config(**{**given(config), field.name: value})
            shown = float(value) if type_of(field)[0] is float else value
            expected = f"{field.name} must be {field.metadata['must_be']}, got {shown}"
            assert str(caught.value) == expected
    numbers = {f.name for f in fields(config) if type_of(f)[0] in (int, float)} - {"seed"}
    assert checked == numbers


def test_every_type_is_checked_before_every_range():
    with pytest.raises(ValueError, match="resume must be true or false, got 1"):
        TrainConfig(**given(TrainConfig), min_p=7.0, resume=1)
    with pytest.raises(ValueError, match="max_rank must be an integer in"):
        ScanConfig(**given(ScanConfig), max_length=0, max_rank=True)


def test_an_option_that_may_be_given_several_times():
    wanted = given(EvalConfig)
    assert EvalConfig(**wanted, stop=["a", "b"]).stop == ("a", "b")
    for stop in ("a", [1], None):
        with pytest.raises(ValueError, match=r"^stop must be a list, each text, got "):
            EvalConfig(**wanted, stop=stop)
    option = parameters("eval")["stop"]
    assert option.multiple
    assert option.opts == ["--stop"]


def test_help_needs_no_torch():
    code = """if True:
        import sys
        from autodeco_fast.cli import run
        assert run(["--help"]) == run(["train", "--help"]) == run(["eval", "--help"]) == 0
        heavy = {"torch", "numpy", "transformers", "yaml"} & set(sys.modules)
        assert not heavy, heavy
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
