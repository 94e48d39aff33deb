"""Words that ask for less or more randomness: does a head of SmolLM2 follow them?

    python -m bench.quality.wishes FOLDER [--model FOLDER]

takes the model's own answers to simple prompts, scans them with wishes, trains heads for five
seeds and writes the record and the figure `wishes`. What the folder has already is not made again.

Measured are other prompts with other wordings, on the same answers with and without a wish, so that
nothing but the words differs:

    probe      whether hidden states carry the wish: a linear one, by token and by answer
    moved      share of answers whose mean T moves the wished way, against the prompt alone
    other      what words in its place do that wish for nothing
    kept set   how many tokens the cut leaves, and whether the answer's own is one of them

Control heads are trained on the same scan with one λ for all.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from autodeco_fast import TemperatureHead
from autodeco_fast.checkpoint import CONFIG_NAME
from autodeco_fast.files import write_text
from autodeco_fast.training.base_model import facts, load_tokenizer
from autodeco_fast.training.config import ScanConfig, TrainConfig
from autodeco_fast.training.measures import means, scanned_model, sums_by_document
from autodeco_fast.training.predictions import predict
from autodeco_fast.training.run import scan_from_files, train_from_files
from autodeco_fast.training.sample_text import SampleTextConfig, sample_text
from autodeco_fast.training.scan_store import Scan, ScanTokens
from autodeco_fast.training.wishes import with_wish
from bench.machine import RESULTS
from bench.quality import wishes_text as texts
from bench.quality.arguments import parsed
from bench.quality.figures import figure
from bench.records import write

FOLDER = RESULTS / "quality"
SEEDS, GRAVITY, SHIFT, MIN_P = (0, 1, 2, 3, 4), 0.2, 0.95, 0.1
ANSWER_TOKENS, ANSWER_MIN_P = 24, 0.02  # drawn at T = 1
HELD_OUT = {"none": ("",), "less": texts.LESS, "more": texts.MORE, "other": texts.OTHER}
KINDS = [kind for kind, wordings in HELD_OUT.items() for _ in wordings]
SHIFTS = {"head": SHIFT, "control": 0.0}
PROBE_STEPS, PROBE_DECAY = 300, 1e-2


def answers(work: Path, name: str, model: str, prompts: list[str]) -> list[dict]:
    """The model's own, one a prompt, as chats; some are cut off after ANSWER_TOKENS."""
    chats = [[{"role": "user", "content": text}] for text in prompts]
    lines, drawn = work / f"{name}-prompts.jsonl", work / f"{name}-drawn.jsonl"
    write_text(lines, "".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    if not drawn.exists():
        options = {"number": len(prompts), "max_new_tokens": ANSWER_TOKENS, "batch_size": 64}
        sample_text(
            SampleTextConfig(
                model=model, prompts=lines, output=drawn, min_p=ANSWER_MIN_P, **options
            )
        )
    tokenizer, found = load_tokenizer(model), []
    ends = {*facts(model).ends, tokenizer.eos_token_id}
    for k, line in enumerate(drawn.read_text(encoding="utf-8").splitlines()):
        ids = [y for y in json.loads(line)["labels"] if y >= 0]
        answer = {"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}
        cut = ids[-1] not in ends
        found.append({"prompt": chats[k], "completion": [answer], "truncated": cut})
    return found


def scanned(work: Path, name: str, model: str, examples: list[dict], *, wishes: bool) -> Scan:
    """Every token of their answers."""
    data = work / f"{name}.jsonl"
    write_text(data, "".join(json.dumps(example) + "\n" for example in examples))
    output = work / f"{name}-scan"
    options = {"all_tokens": True, "wishes": wishes, "examples_per_shard": 64}
    scan_from_files(ScanConfig(model=model, data=str(data), output=output, **options))
    return Scan(output)


def scans(work: Path, model: str) -> tuple[Scan, Scan]:
    """To learn from, with the package's wishes; to measure on, every answer behind every held-out
    wording in turn."""
    learn = answers(work, "train", model, texts.TRAIN.all())
    test = answers(work, "test", model, texts.TEST.all())
    wished = [
        with_wish(example, wording) if wording else example
        for wordings in HELD_OUT.values()
        for wording in wordings
        for example in test
    ]
    return (
        scanned(work, "train", model, learn, wishes=True),
        scanned(work, "test", model, wished, wishes=False),
    )


def heads(work: Path, scan: Scan) -> dict[str, list[Path]]:
    """Folders of heads that follow wishes and of their controls, one a seed."""
    found: dict[str, list[Path]] = {}
    for name, shift in SHIFTS.items():
        for seed in SEEDS:
            config = TrainConfig(
                scan=scan.folder,
                output=work / f"{name}-seed{seed}",
                gravity=GRAVITY,
                min_p=MIN_P,
                wish_shift=shift,
                num_train_epochs=6,
                batch_tokens=512,
                seed=seed,
            )
            if not (config.output / CONFIG_NAME).exists():
                train_from_files(config)
            found.setdefault(name, []).append(config.output)
    return found


@dataclass
class Answers:
    """Tokens of a scan of answers behind wordings, in the order of `KINDS`."""

    tokens: ScanTokens
    count: int  # of answers

    @property
    def wording(self) -> np.ndarray:
        """Of each token, an index into KINDS."""
        return self.tokens.document.numpy() // self.count

    def means(self, values: np.ndarray) -> np.ndarray:
        """Over each answer's tokens. `[wordings, answers]`"""
        document = self.tokens.document.numpy()
        size = len(KINDS) * self.count
        sums, counts = (np.bincount(document, w, minlength=size) for w in (values, None))
        return (sums / np.maximum(counts, 1)).reshape(len(KINDS), self.count)


def probe(learn: Scan, test: Answers) -> dict:
    """A linear reading of the hidden state: nothing wished for, less or more?"""
    torch.manual_seed(0)
    tokens = learn.load()
    x, y = tokens.hidden.float(), learn.wish(tokens).long()
    mean, scale = x.mean(0), x.std(0)
    layer = torch.nn.Linear(x.shape[1], 3)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=PROBE_DECAY)
    for _ in range(PROBE_STEPS):
        loss = torch.nn.functional.cross_entropy(layer((x - mean) / scale), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        fitted = (layer((x - mean) / scale).argmax(-1) == y).float().mean().item()
        log_p = layer((test.tokens.hidden.float() - mean) / scale).log_softmax(-1).numpy()
    by_answer = np.stack([test.means(column) for column in log_p.T], -1).argmax(-1)
    by_token, found = log_p.argmax(-1), {"seen_tokens_right": fitted}
    for wish, kind in enumerate(("none", "less", "more")):
        rows = rows_of(kind)
        found[f"{kind}_tokens_right"] = float(
            (by_token[np.isin(test.wording, rows)] == wish).mean()
        )
        found[f"{kind}_answers_right"] = float((by_answer[rows] == wish).mean())
    found["other_answers_taken_for_none"] = float((by_answer[rows_of("other")] == 0).mean())
    return found


def rows_of(kind: str) -> list[int]:
    """Which of KINDS are this."""
    return [k for k, name in enumerate(KINDS) if name == kind]


def shifts(temperature: np.ndarray, test: Answers) -> tuple[dict, dict[str, np.ndarray]]:
    """What words do to the mean T of an answer, against the prompt alone; T of every token."""
    T = test.means(temperature)
    by_kind = {kind: T[rows_of(kind)] - T[0] for kind in ("less", "more", "other")}
    found = {"temperature_without_wish": float(T[0].mean())}
    for kind, shift in by_kind.items():
        found[f"{kind}_shift"] = float(shift.mean())
    for kind, sign in (("less", -1), ("more", 1)):
        found[f"{kind}_moved"] = float((sign * by_kind[kind] > 0).mean())
    found["ordered"] = float((by_kind["less"] < by_kind["more"]).mean())
    found["by_wording"] = {
        wording: {"shift": float(shift.mean()), "fell": float((shift < 0).mean())}
        for kind, shifts in by_kind.items()
        for wording, shift in zip(HELD_OUT[kind], shifts)
    }
    return found, by_kind


def kept_sets(scan: Scan, test: Answers, temperatures: dict[tuple, np.ndarray]) -> dict:
    """Mean size of the kept set behind every kind of wording, and its coverage of the answer."""
    policies = {key: torch.from_numpy(T) for key, T in temperatures.items()}
    sums = sums_by_document(test.tokens, scanned_model(scan), policies, min_p=MIN_P)
    kinds = np.array(KINDS)[test.tokens.document.unique().numpy() // test.count]
    found = {}
    for key, by_document in sums.items():
        measured = {kind: means(by_document[torch.from_numpy(kinds == kind)]) for kind in HELD_OUT}
        found[key] = {
            f"{kind}_{name}": of_kind[name]
            for kind, of_kind in measured.items()
            for name in ("kept_set_size", "coverage")
        }
    return found


def draw(shifts: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Distributions of the shifts, a panel a head."""
    with figure(path, (9, 3.6), len(shifts), sharex=True, sharey=True) as (_, axes):
        for a, (name, by_kind) in zip(axes, shifts.items()):
            for colour, (kind, values) in zip(("C0", "C3", "0.5"), by_kind.items()):
                ordered = np.sort(values.ravel())
                a.plot(ordered, np.linspace(0, 1, len(ordered)), color=colour, label=kind)
            a.axvline(0, color="0.8", lw=1)
            a.set(title=name, xlabel="mean T of an answer, less that without words")
            a.grid(alpha=0.3)
        axes[0].set_ylabel("share of answers below")
        axes[0].legend(frameon=False, title="words for")


def main(arguments: list[str] | None = None) -> None:
    args = parsed(__doc__, "for answers, scans and heads", arguments)
    learn, measured = scans(args.folder, args.model)
    test = Answers(measured.load(), len(texts.TEST.all()))
    results, drawn = [{"variant": "probe", **probe(learn, test)}], {}
    temperatures = {
        (name, seed): predict(TemperatureHead.from_pretrained(folder), test.tokens)
        for name, folders in heads(args.folder, learn).items()
        for seed, folder in zip(SEEDS, folders)
    }
    kept = kept_sets(measured, test, temperatures)
    for (name, seed), T in temperatures.items():
        found, by_kind = shifts(T, test)
        named = {"variant": f"{name} seed {seed}", "wish_shift": SHIFTS[name]}
        results.append({**named, **found, **kept[name, seed]})
        drawn.setdefault(name, by_kind)
    for result in results:
        print(result, flush=True)
    facts = {"training_tokens": len(learn), "held_out_tokens": len(measured)}
    write(FOLDER / "wishes.json", "wishes", results, **facts)
    draw(drawn, FOLDER / "wishes.png")


if __name__ == "__main__":
    main()
