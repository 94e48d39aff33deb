"""Hostile files: strategies for JSON, JSONL and safetensors with something wrong in them."""

import json
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 200),
    st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30]),
    st.floats(),
    st.sampled_from(
        ["", " ", "1e-3", "2G", "a", "\ud800", "[red]", "32", "none", "../x", "\x00", "é\u2028"]
    ),
)
values = st.recursive(
    scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3)
)


def junk(depth: int) -> st.SearchStrategy:
    """Bytes that are no file of ours, some nested so deep that parsers give up."""
    odd = [b"", b"[" * depth, b'{"a":' * depth, b"\xff\xfe{}", b"9" * 5000]
    return st.binary(max_size=40) | st.sampled_from(odd)


JSON_JUNK = junk(depth=3000)
YAML_JUNK = junk(depth=600)  # past Python's limit too; the parser takes a second for 3000


def odd_json(text: str, change: tuple) -> bytes:
    """A JSON object with some of it replaced, or other bytes, as one of `json_changes` says."""
    what, content = change
    if what == "bytes":
        return content
    data = json.loads(text)
    for names, value in content:
        place = data
        for name in names[:-1]:
            place = place.get(name) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            continue
        if value is ...:
            place.pop(names[-1], None)
        else:
            place[names[-1]] = value
    return json.dumps(data).encode()


def json_changes(paths: list[tuple[str, ...]]) -> st.SearchStrategy:
    """Changes for `odd_json`, of what lies at these paths."""
    one = st.tuples(st.sampled_from(paths), values | st.just(...))
    replaced = st.tuples(st.just("keys"), st.lists(one, min_size=1, max_size=2))
    return replaced | st.tuples(st.just("bytes"), JSON_JUNK)


def odd_tensors(path: Path, change: tuple) -> None:
    """Does to a safetensors file what one of `tensor_changes` says."""
    what, where, how = change
    data = path.read_bytes()
    if what == "cut":
        path.write_bytes(data[: int(where * len(data))])
    elif what == "byte":
        at = int(where * min(len(data), 900))
        path.write_bytes(data[:at] + bytes([how]) + data[at + 1 :])
    else:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        if what == "metadata":
            metadata = {"scan": how} if isinstance(how, str) else None
        else:
            name = sorted(tensors)[int(where * len(tensors)) % len(tensors)]
            _change_tensor(tensors, name, what, how, where)
        save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata=metadata)


def _change_tensor(tensors: dict, name: str, what: str, how: object, where: float) -> None:
    """Changes a value, the shape, the dtype or the name of one tensor."""
    t = tensors[name]
    if what == "value" and t.numel():
        if t.is_floating_point():
            value = float(how)
        else:
            value = 0 if how != how else int(max(min(how, 2**31 - 1), -(2**31)))
        t.view(-1)[int(where * t.numel()) % t.numel()] = value
    elif what == "shape":
        tensors[name] = t[:-1] if how else t.unsqueeze(0)
    elif what == "dtype":
        tensors[name] = t.to(torch.int64 if how else torch.float64)
    elif what == "name":
        tensors[f"{name}x"] = tensors.pop(name)


share = st.floats(0, 1, exclude_max=True)
numbers_in_files = st.sampled_from(
    [float("nan"), float("inf"), float("-inf"), -1.0, 0.0, 1e30, 96.0, 2.0**31]
)
odd_metadata = st.none() | st.sampled_from(["", "{}", "[]", "{", '{"share": "a"}'])
tensor_changes = st.one_of(
    st.tuples(st.just("cut"), share, st.none()),
    st.tuples(st.just("byte"), share, st.integers(0, 255)),
    st.tuples(st.just("value"), share, numbers_in_files),
    st.tuples(st.sampled_from(["shape", "dtype", "name"]), share, st.booleans()),
    st.tuples(st.just("metadata"), share, odd_metadata),
)

texts = st.text(max_size=12) | st.sampled_from(["w5 w6 w7", "", "w3 " * 400, "\ud800", "\x00"])
ids = st.lists(st.integers(0, 95) | st.sampled_from([-1, 96, 2**31, 10**30, 1.5, True]), max_size=5)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", ""]), "content": values}),
    max_size=2,
)
good_examples = st.sampled_from(
    [
        {"text": "w5 w6 w7"},
        {"prompt": "w5", "completion": "w6"},
        {"input_ids": [3, 4], "labels": [3, 4]},
    ]
)
odd_examples = st.one_of(
    st.fixed_dictionaries({"text": texts | values}),
    st.fixed_dictionaries({"prompt": texts, "completion": texts | values}),
    st.fixed_dictionaries({"messages": messages}),
    ids.map(lambda x: {"input_ids": x, "labels": x}),
    st.fixed_dictionaries({"input_ids": ids, "labels": ids}),
    values,
)


def _line(example: object) -> bytes:
    return json.dumps(example).encode()


jsonl = st.lists(
    good_examples.map(_line) | (good_examples | odd_examples).map(_line) | JSON_JUNK, max_size=5
).map(b"\n".join)
