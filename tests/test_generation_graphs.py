"""Adaptive `generate` with a static cache and a compiled decode step: one graph, same tokens."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

from autodeco_fast import attach
from autodeco_fast.policies import parse
from tests.tiny_models import prompts, tiny_head, tiny_model, tiny_top_p_head

STEPS = 8


@pytest.fixture
def counted():
    """dynamo's counters, from 0."""
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


def compiled(backend: str) -> CompileConfig:
    """transformers compiles on GPUs unless told; a break of the graph raises."""
    how = CompileConfig(backend=backend, mode=None, fullgraph=True)
    how._compile_all_devices = True
    return how


def with_head(model, **options):
    return attach(model, tiny_head(model), **options)


def with_two_heads(model, **options):
    return attach(model, tiny_head(model), top_p_head=tiny_top_p_head(model), **options)


def with_rule(model, **options):
    return attach(model, parse("entropy a=0.4"), **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attached", "fused", "record"),
    [
        (with_head, True, False),
        (with_head, False, True),
        (with_two_heads, True, True),
        (with_rule, True, False),
    ],
)
def test_a_compiled_decode_step_is_one_graph_and_draws_the_same(counted, attached, fused, record):
    model, ids = tiny_model("llama"), prompts()
    asked = {"max_new_tokens": STEPS, "cache_implementation": "static"}
    with attached(model, fused=fused, record=record) as attachment:
        plain = [model.generate(ids, **asked, seed=seed) for seed in (3, 4)]
        records = list(attachment.records)
        assert not counted["stats"]  # nothing was compiled so far
        asked["compile_config"] = compiled("eager")
        for seed, want in zip((3, 4), plain):
            assert torch.equal(model.generate(ids, **asked, seed=seed), want)
            assert counted["stats"]["unique_graphs"] == 1  # hooks and all, for every step and call
        assert len(attachment.records) == len(records) == STEPS * record
        for got, want in zip(attachment.records, records):
            torch.testing.assert_close(got.temperature, want.temperature)
            assert torch.equal(got.kept, want.kept)
    assert not counted["graph_break"]
