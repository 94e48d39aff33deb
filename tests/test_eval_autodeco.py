"""Evaluation as AutoDeco does it: its problems, boxed answers, its checkpoints as policies."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from autodeco_fast import attach
from autodeco_fast.policies import parse
from autodeco_fast.training.eval_requests import seed_of
from autodeco_fast.training.prompts import Prompt, encode_prompt, read_prompts
from autodeco_fast.training.scorers import load_scorer
from tests.autodeco_checkpoints import VOCAB, head_tensors, heads_only, merged
from tests.commands import assert_refuses, command, save_tiny
from tests.evaluations import lines_of, run, samples_of

pytestmark = pytest.mark.usefixtures("without_figures")

PROBLEMS = [
    ("A rectangle with whole sides has area 35 and perimeter 24. How long is its longer side?", 7),
    ("How many of the numbers $1, 2, \\ldots, 60$ are divisible by 4 or by 15?", 18),
    ("Find the sum of the digits of $10^{6} - 25$.", 48),
    ("What is the chance that two fair dice show the same number?", "\\frac{1}{6}"),
]
ANSWERS = ["7", "18", "48", "1/6"]
SUFFIX = "\nMake sure you output the final answer within \\boxed{}."


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A chat model nearly half of whose tokens are boxed answers."""
    folder = save_tiny(tmp_path_factory.mktemp("base") / "base")
    boxes = [f"\\boxed{{{ANSWERS[i % 4]}}}<{i}>" for i in range(40)]
    words = ["<unk>", "<s>", "user", "assistant", *boxes]
    words += [f"w{i}" for i in range(VOCAB - len(words))]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        eos_token="<s>",
        chat_template="{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}",
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(base, tmp_path_factory):
    """Warm and wide enough for this model to write different things."""
    heads = head_tensors()
    for name, more in (("temp_head", 2.0), ("top_p_head", 4.0)):
        heads[f"{name}.mlp.2.bias"] += more
    return heads_only(tmp_path_factory.mktemp("heads") / "heads", base, heads=heads)


@pytest.fixture
def aime(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"problem": problem, "gt": gt}) for problem, gt in PROBLEMS]
    path.write_text("\n".join(lines) + "\n")
    return path


def last_box(text: str) -> str | None:
    found = re.findall(r"\\boxed\{([^}]*)\}", text)
    return found[-1] if found else None


def test_a_file_of_problems_from_end_to_end(base, checkpoint, aime, tmp_path):
    autodeco = f"autodeco={checkpoint}"
    done = command(
        "eval", "--model", base, "--prompts", aime, "--scorer", "boxed", "--samples", 8,
        "--policy", autodeco, "--policy", "static T=1 top_p=0.9", "--max-new-tokens", 5,
        "--seed", 42, "--dtype", "float32", "--output", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "top-p" in done.stderr
    found = samples_of(tmp_path / "out")
    assert len(found) == 2 * 4 * 8
    for (policy, prompt, number), sample in found.items():
        assert sample["seed"] == seed_of(42, prompt, number)
        assert sample["score"] == float(last_box(sample["text"]) == ANSWERS[prompt])
        n = sample["length"]
        assert n == len(sample["tokens"]) == len(sample["temperature"]) == len(sample["kept"])
        if policy == autodeco:
            assert len(sample["top_p"]) == n
            assert all(0 < p < 1 for p in sample["top_p"])
        else:
            assert sample["top_p"] is None
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["settings"]["seed"] == 42
    ours = [s for key, s in found.items() if key[0] == autodeco]
    every = results["policies"][0]["tasks"]["all"]
    accuracy = sum(s["score"] for s in ours) / len(ours)
    assert 0.05 < accuracy < 0.95
    assert every["score"]["mean"] == every["pass@1"]["mean"] == pytest.approx(accuracy)
    solved = {key[1] for key, s in found.items() if key[0] == autodeco and s["score"]}
    assert every["pass@8"]["mean"] == pytest.approx(len(solved) / 4)
    for name in ("temperature", "top_p"):
        each = [x for s in ours for x in s[name]]
        assert every[name]["mean"] == pytest.approx(sum(each) / len(each))
        assert max(each) - min(each) > 0.15
    assert "top_p" not in results["policies"][1]["tasks"]["all"]


def test_samples_are_those_of_generate_in_any_batch(base, checkpoint, aime, tmp_path):
    policy = f"autodeco={checkpoint}"
    drawn = []
    for size in (1, 16):
        run(
            tmp_path, base, f"out{size}", scorer="boxed", policy=(policy,), batch_size=size, stop=()
        )
        drawn.append(samples_of(tmp_path / f"out{size}"))
    assert drawn[0].keys() == drawn[1].keys()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    with attach(model, parse(policy), record=True) as attached:
        for key, sample in drawn[0].items():
            assert drawn[1][key]["tokens"] == sample["tokens"]
            assert drawn[1][key]["kept"] == sample["kept"]
            assert drawn[1][key]["top_p"] == pytest.approx(sample["top_p"], abs=2e-4)
            chat = [{"role": "user", "content": PROBLEMS[key[1]][0] + SUFFIX}]
            ids = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=False
            )
            asked = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
            asked["max_new_tokens"] = sample["length"]
            out = model.generate(ids, seed=[sample["seed"]], **asked)
            assert out[0, ids.shape[1] :].tolist() == sample["tokens"]
            top_p = [float(record.top_p[0]) for record in attached.records]
            assert top_p == pytest.approx(sample["top_p"], abs=2e-4)


def test_a_problem_is_a_chat_that_asks_for_a_box(base):
    problem, gt = PROBLEMS[0]
    chat = [{"role": "user", "content": problem + SUFFIX}]
    line = Prompt(1, {"problem": problem, "gt": gt})
    assert line.content == chat
    # A prompt of one's own wins: data sets have both.
    assert Prompt(1, {"problem": problem, "prompt": "w1", "gt": gt}).content == "w1"
    tokenizer = AutoTokenizer.from_pretrained(base)
    limits = {"vocabulary": VOCAB, "positions": 256, "new_tokens": 5}
    want = encode_prompt(tokenizer, Prompt(1, {"messages": chat}), **limits)
    assert encode_prompt(tokenizer, line, **limits) == want


@pytest.mark.parametrize("name", ["messages", "prompt"])
def test_a_chats_last_answer_is_no_prompt(base, tmp_path, name):
    """Of training data the model is asked what its answer answers."""
    ask, answer = {"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}
    path, tokenizer = tmp_path / "prompts.jsonl", AutoTokenizer.from_pretrained(base)
    limits = {"vocabulary": VOCAB, "positions": 256, "new_tokens": 5}
    for chat in ([ask, answer], [ask, answer, answer], [ask], [ask, answer, ask, answer]):
        path.write_text(json.dumps({name: chat}))
        (line,) = read_prompts(path)
        assert line.content == (chat[:3] if len(chat) == 4 else [ask])
        want = tokenizer.apply_chat_template(
            line.content, add_generation_prompt=True, return_dict=False
        )
        assert encode_prompt(tokenizer, line, **limits) == list(want)
        assert "w6" not in line.shown or len(chat) == 4
    path.write_text(json.dumps({name: [answer]}))
    with pytest.raises(ValueError, match=f"line 1: {name} must hold a message that is not the"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("completion", "gt", "expected"),
    [
        ("so \\boxed{7}", 7, 1),
        ("\\boxed{3}, no, \\boxed{7}.", 7, 1),
        ("\\boxed{7}, no, \\boxed{3}.", 7, 0),
        ("\\boxed{\\frac{1}{6}}", "1/6", 1),
        ("\\boxed{0.5}", "\\frac{1}{2}", 1),
        ("the answer is 7", 7, 0),  # which `math` would take
        ("#### 7", 7, 0),
        ("\\boxed{", 7, 0),
        ("", 7, 0),
    ],
    ids=range(9),
)
def test_boxed(completion, gt, expected):
    scorer, line = load_scorer("boxed"), Prompt(1, {"problem": "p", "gt": gt})
    scorer.check([line])
    assert scorer.scores([line], [completion]) == [expected]
    answer = Prompt(1, {"prompt": "p", "answer": gt})
    assert scorer.scores([answer], [completion]) == [expected]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"problem": 3, "gt": 4}', "line 1: problem must be text"),
        ('{"problem": "", "gt": 4}', "line 1: problem must be text"),
        ('{"gt": 4}', "line 1: must have either prompt or messages, or else a problem"),
        ('{"problem": "w1"}', "line 1: gt is missing (scorer boxed)"),
        ('{"problem": "w1", "gt": [4]}', "line 1: gt must be text or a number"),
        ('{"problem": "w1", "gt": true}', "line 1: gt must be text or a number"),
        ('{"problem": "w1", "gt": "none"}', "line 1: gt must be one that math-verify reads"),
        ('{"problem": "\\ud800", "gt": 4}', "line 1: prompt must be Unicode"),
    ],
    ids=range(8),
)
def test_a_problem_that_is_none_is_named_by_its_line(base, tmp_path, line, words):
    (tmp_path / "prompts.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        run(tmp_path, base, scorer="boxed")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_problems_need_a_chat_template(model, aime, tmp_path):
    with pytest.raises(ValueError, match="line 1: messages and problems need a chat template"):
        run(tmp_path, model, scorer="boxed")


def test_a_checkpoint_is_its_base_model_too(base, checkpoint, aime, tmp_path):
    """The same samples from the base, the heads that name it, and both in one folder."""
    whole = merged(tmp_path / "merged", base)
    copied = shutil.copytree(checkpoint, tmp_path / "copied")
    for folder in (whole, copied):
        for file in (*base.glob("tokenizer*"), base / "chat_template.jinja"):
            shutil.copy(file, folder)
    options = {"scorer": "boxed", "policy": (f"autodeco={checkpoint}",), "samples": 1}
    run(tmp_path, base, "out0", **options)
    for number, folder in enumerate((whole, copied), 1):
        run(tmp_path, folder, f"out{number}", **options)
        assert lines_of(tmp_path / f"out{number}") == lines_of(tmp_path / "out0")


# Checkpoints as policies


def test_a_checkpoint_in_any_form_is_the_same_policy(base, tmp_path):
    forms = [
        heads_only(tmp_path / "heads", base),
        merged(tmp_path / "merged", base),
        merged(tmp_path / "sharded", base, sharded=True),
    ]
    tensors = head_tensors()
    for folder in forms:
        policy = parse(f"autodeco={folder} t_max=1.5")
        assert str(policy) == f"autodeco={folder} t_max=1.5"
        for prefix, head in (("temp_head.", policy.head), ("top_p_head.", policy.top_p_head)):
            for name, weight in head.state_dict().items():
                assert torch.equal(weight, tensors[prefix + name])


def test_heads_that_a_checkpoint_switches_off_are_off(base, tmp_path):
    def changed(**flags):
        folder = tmp_path / "-".join(flags)
        heads_only(folder, base)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **flags}))
        return parse(f"autodeco={folder}")

    first = changed(enable_top_p_head=False)
    assert (first.head is None, first.top_p_head is None) == (False, True)
    second = changed(enable_temperature_head=False)
    assert (second.head is None, second.top_p_head is None) == (True, False)
    with pytest.raises(ValueError, match="enable_temperature_head, enable_top_p_head must be"):
        changed(enable_temperature_head=False, enable_top_p_head=False)


def test_a_run_goes_on_and_not_with_another_head(base, checkpoint, aime, tmp_path):
    own = tmp_path / "own"
    parse(f"autodeco={checkpoint}").head.save_pretrained(own)
    parse(f"autodeco={checkpoint}").top_p_head.save_pretrained(own / "top_p_head")
    options = {"scorer": "boxed", "policy": (f"autodeco={own}",), "samples": 2}
    run(tmp_path, base, **options)
    before = lines_of(tmp_path / "out")
    results = run(tmp_path, base, **{**options, "samples": 3})
    assert len(lines_of(tmp_path / "out")) == 12
    assert set(before) < set(lines_of(tmp_path / "out"))
    top_p = [sample["top_p"] for sample in samples_of(tmp_path / "out").values()]
    mean = sum(map(sum, top_p)) / sum(map(len, top_p))
    assert results["policies"][0]["tasks"]["all"]["top_p"]["mean"] == pytest.approx(mean)
    file = own / "top_p_head/head.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "mlp.2.bias": tensors["mlp.2.bias"] + 1}, file)
    with pytest.raises(ValueError, match="was another head"):
        run(tmp_path, base, **options)


def test_what_is_no_checkpoint_is_refused_on_one_line(base, checkpoint, aime, tmp_path):
    def refuses(folder, *words):
        done = command(
            "eval", "--model", base, "--prompts", aime, "--scorer", "boxed",
            "--policy", f"autodeco={folder}", "--output", tmp_path / "out",
        )  # fmt: skip
        assert_refuses(done, *words)
        assert not (tmp_path / "out").exists()

    refuses("/nowhere", "must be a folder or a hub id")
    refuses(base, "model_type must be 'autodeco', got 'llama'")
    short = heads_only(tmp_path / "short", base)
    data = (short / "model.safetensors").read_bytes()
    (short / "model.safetensors").write_bytes(data[:-4])
    refuses(short, "not a safetensors file")
    missing = head_tensors()
    del missing["top_p_head.mlp.2.bias"]
    refuses(heads_only(tmp_path / "missing", base, heads=missing), "top_p_head.mlp.2.bias")
    nan = head_tensors()
    nan["temp_head.mlp.0.bias"][3] = torch.nan
    refuses(heads_only(tmp_path / "nan", base, heads=nan), "temp_head.mlp.0.bias holds NaN")
    wide = json.loads((checkpoint / "config.json").read_text())
    wide |= {"temperature_hidden_size": 48, "top_p_hidden_size": 48}
    heads_only(tmp_path / "wide", base, heads=head_tensors(48), config=wide)
    refuses(tmp_path / "wide", "reads hidden states of width 48, the model's have 32")
    parse(f"autodeco={checkpoint}").head.save_pretrained(tmp_path / "one")
    refuses(tmp_path / "one", "has no top_p_head/", "head=FOLDER")
