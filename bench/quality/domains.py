"""Do heads that learned from maths keep T low on facts and let dialogue vary?

    python -m bench.quality.domains FOLDER [--model FOLDER]

SmolLM2's own answers to maths questions and to open ones are what heads learn from, by three
objectives and for five seeds. They are measured on facts that the model knows and on its answers
to other open questions, beside fixed settings and rules. Nothing is drawn for that: logits tell

    error  the chance that the end of "The capital of France is Paris" comes out otherwise, mean
           over facts
    nats   the entropy of what a policy draws from, a token of an open answer, mean over answers

A policy is held against the lower edge of the fixed settings at equal nats. Intervals are 95 % of
resamples of facts, of open questions with all their answers, and of a head's seeds. What the folder
has already is not made again.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from autodeco_fast.checkpoint import CONFIG_NAME
from autodeco_fast.policies import Policy, parse
from autodeco_fast.training.base_model import BaseModel, load_tokenizer
from autodeco_fast.training.config import TrainConfig
from autodeco_fast.training.measures import scanned_model
from autodeco_fast.training.run import train_from_files
from autodeco_fast.training.scan_store import Scan, ScanTokens
from bench.machine import RESULTS
from bench.quality import domains_text as texts
from bench.quality.arguments import parsed
from bench.quality.exact import law, results
from bench.quality.figures import figure
from bench.quality.frontier import print_ranking
from bench.quality.records_study import RULES, STATIC
from bench.quality.wishes import answers, scanned
from bench.records import write

FOLDER = RESULTS / "quality"
SEEDS, CHUNK = (0, 1, 2, 3, 4), 256
OBJECTIVES = {  # name → options
    "hinge": {"objective": "min_p_hinge", "gravity": 0.1, "min_p": 0.1},
    "label_free": {"objective": "label_free", "gravity": 0.1, "min_p": 0.1},
    "autodeco": {"objective": "autodeco_temperature", "min_p": 1e-6},
}
DOMAINS = {"maths": texts.MATHS, "dialogue": texts.DIALOGUE}
SCALES = ("", *(f" scale={s}" for s in (0.7, 1.4, 2)))


@dataclass
class Measured:
    """What a policy of one seed does."""

    error: np.ndarray  # of each fact
    nats: np.ndarray  # of each open question, mean over its answers
    temperature: dict[str, float]  # mean T of `facts`, of the `words` before them, of `open`

    @property
    def sizes(self) -> tuple[int, int]:
        return len(self.error), len(self.nats)

    def means(self) -> dict[str, float]:
        return {f"temperature_{key}": value for key, value in self.temperature.items()}

    def point(self, facts: np.ndarray, opened: np.ndarray) -> tuple[float, float]:
        return float(self.error[facts].mean()), float(self.nats[opened].mean())


def _scan(work: Path, name: str, model: str, examples: list[dict]) -> Scan:
    return scanned(work, name, model, examples, wishes=False)


def head(work: Path, domain: str, objective: str, seed: int) -> Path:
    """Its folder."""
    return work / "heads" / f"{objective}-{domain}-seed{seed}"


def train(work: Path, model: str) -> None:
    """The heads that are not there yet, of every domain by every objective."""
    for domain, prompts in DOMAINS.items():
        missing = [
            (objective, seed)
            for objective in OBJECTIVES
            for seed in SEEDS
            if not (head(work, domain, objective, seed) / CONFIG_NAME).exists()
        ]
        if not missing:
            continue
        scan = _scan(work, domain, model, answers(work, domain, model, prompts))
        for objective, seed in missing:
            train_from_files(
                TrainConfig(
                    scan=scan.folder,
                    output=head(work, domain, objective, seed),
                    seed=seed,
                    num_train_epochs=6,
                    batch_tokens=512,
                    **OBJECTIVES[objective],
                )
            )


class Study:
    """The folder of a study and what is in it."""

    def __init__(self, work: Path, model: str):
        self.work, self.model = work, model
        opened = answers(work, "open", model, texts.ANSWERS * texts.OPEN)
        opened = _scan(work, "open", model, opened)
        base = scanned_model(opened)
        self.open = opened.load()
        self.facts, self.fact_of = self._facts()
        self.open_logits, self.fact_logits = (
            logits_of(base, tokens) for tokens in (self.open, self.facts)
        )

    def _facts(self) -> tuple[ScanTokens, torch.Tensor]:
        """The scanned facts, and of each of their tokens: which fact it ends, −1 for the words
        before its end, −2 in a fact that the model does not know."""
        facts = [_chat(*fact) for fact in texts.FACTS]
        tokens = _scan(self.work, "facts", self.model, facts).load()
        tokenizer = load_tokenizer(self.model)
        which = torch.full((len(tokens),), -1)
        for k, (_, _, end) in enumerate(texts.FACTS):
            rows = (tokens.document == k).nonzero()[:, 0]
            ids = tokenizer(f" {end}", add_special_tokens=False).input_ids
            targets = tokens.target[rows].tolist()
            starts = [i for i in range(len(targets)) if targets[i : i + len(ids)] == ids]
            last = rows[starts[-1] : starts[-1] + len(ids)]
            if (tokens.gap[last] > 0).any():
                which[rows] = -2
            else:
                which[last] = k
        return tokens, which

    def measure(self, policy: Policy) -> Measured:
        log_p, _, fact_T = look(policy, self.fact_logits, self.facts)
        _, nats, open_T = look(policy, self.open_logits, self.open)
        which = self.fact_of
        right = [log_p[which == k].sum().exp() for k in which[which >= 0].unique().tolist()]
        means = {"facts": fact_T[which >= 0], "words": fact_T[which == -1], "open": open_T}
        return Measured(
            1 - torch.stack(right).numpy(),
            by_question(nats, self.open.document, len(texts.OPEN)),
            {name: float(T.mean()) for name, T in means.items()},
        )


def _chat(question: str, words: str, end: str) -> dict:
    answer = {"role": "assistant", "content": f"{words} {end}."}
    return {"prompt": [{"role": "user", "content": question}], "completion": [answer]}


def by_question(values: torch.Tensor, document: torch.Tensor, questions: int) -> np.ndarray:
    """Means over the tokens of each answer, then over the answers of each question.

    Args:
        values, document: `[n]`; document `d` answers question `d mod questions`.
    """
    names, at = torch.unique(document, return_inverse=True)
    sums = torch.zeros(len(names)).index_add_(0, at, values)
    question = names.long() % questions
    means = torch.zeros(questions).index_add_(0, question, sums / at.bincount())
    return (means / question.bincount(minlength=questions)).numpy()


@torch.inference_mode()
def logits_of(base: BaseModel, tokens: ScanTokens) -> torch.Tensor:
    """`[n, V]` fp32."""
    return torch.cat([base.logits(h.float()).float() for h in tokens.hidden.split(CHUNK)])


@torch.inference_mode()
def look(
    policy: Policy, logits: torch.Tensor, tokens: ScanTokens
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ln p of each target under a policy, the entropy of what it draws from, and T: `[n]` each."""
    found = []
    parts = (tokens.hidden.split(CHUNK), tokens.target.split(CHUNK), logits.split(CHUNK))
    for hidden, target, z in zip(*parts):
        log_p, T = law(policy, hidden, z)
        of_target = log_p.gather(1, target.long()[:, None])[:, 0]
        found.append((of_target, torch.special.entr(log_p.exp()).sum(-1), T))
    return tuple(torch.cat(some) for some in zip(*found))


def draw(found: list[dict], path: Path) -> None:
    """Error against nats, a line a kind of head."""
    with figure(path, (8.4, 4.4)) as (whole, axes):
        families: dict[str, list[dict]] = defaultdict(list)
        for one in found:
            name = one["variant"].split()[0]
            families["fixed settings" if name in ("static", "greedy") else name].append(one)
        for k, (family, some) in enumerate(families.items()):
            some = sorted(some, key=lambda one: one["nats"])
            x, y = ([one[key] for one in some] for key in ("nats", "error"))
            line = "none" if family == "fixed settings" else "-"
            marker = "os^v"[k // 10]
            axes.plot(x, y, ls=line, marker=marker, ms=4, lw=1, color=f"C{k % 10}", label=family)
        axes.set(xlabel="entropy of open answers, nats a token", ylabel="error on known facts")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        whole.legend(loc="outside right upper", frameon=False, fontsize=8)


def main(arguments: list[str] | None = None) -> None:
    args = parsed(__doc__, "for answers, scans and heads", arguments)
    study = Study(args.folder, args.model)
    train(args.folder, args.model)
    measured: dict[str, list[Measured]] = {}
    fixed = [line for line in STATIC.read_text().splitlines() if line.startswith("static")]
    for text in ("greedy", "static T=1", *fixed, *RULES):
        measured[text] = [study.measure(parse(text))]
    for domain in DOMAINS:
        for objective in OBJECTIVES:
            for scale in SCALES:
                policies = [f"head={head(args.folder, domain, objective, s)}{scale}" for s in SEEDS]
                name = f"{objective}-{domain}{scale}"
                measured[name] = [study.measure(parse(text)) for text in policies]
                print(name, flush=True)
    found = results(measured, "nats")
    known = int((study.fact_of >= 0).sum() and study.fact_of[study.fact_of >= 0].unique().numel())
    facts = {"facts": len(texts.FACTS), "known_facts": known, "open_questions": len(texts.OPEN)}
    write(FOLDER / "domains.json", "domains", found, **facts)
    draw(found, FOLDER / "domains.png")
    print_ranking(found, "nats")


if __name__ == "__main__":
    main()
