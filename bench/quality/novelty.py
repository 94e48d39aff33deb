"""Of ten answers to "Name a US state", how many are right and differ?

    python -m bench.quality.novelty FOLDER [--model FOLDER]

The questions of NoveltyBench whose answers can be listed, and others like them
(`novelty_text.py`). Nothing is drawn to measure: the probability of every spelling of every listed
answer, its end included, is computed under each policy, and from it

    error      the chance of anything that is not listed, mean over questions
    diversity  the entropy of the answers that are, 1 if all on the list are equally likely
    distinct   different listed answers among ten samples, as NoveltyBench counts; 1 is what ten
               draws from the list would give

Hypotheses, written before a policy was measured:

1. Heads rewarded for listed answers to other questions give more distinct ones than the best fixed
   setting: answers are free and ends are forced, and the two are next to each other.
2. Rewarded for listed answers that no other sample gives, they give more still.
3. Heads that learned from the model's own answers, or from records, do not: what is free here was
   not free there.

Every family has at most as many settings as the fixed ones; one is chosen by `distinct` on
validation questions. Intervals are 95 % of resamples of questions and of a head's seeds. What the
folder has already is not made again; the folder of `bench.quality.domains` has heads for it.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from autodeco_fast.checkpoint import CONFIG_NAME
from autodeco_fast.demo import smollm2
from autodeco_fast.files import write_text
from autodeco_fast.policies import parse
from autodeco_fast.training import base_model
from autodeco_fast.training.reward_config import RewardConfig
from autodeco_fast.training.run import train_from_files
from bench.machine import RESULTS
from bench.quality import domains, exact
from bench.quality import novelty_text as texts
from bench.quality.answer_tree import AnswerTree
from bench.quality.arguments import parsed
from bench.quality.figures import figure
from bench.quality.frontier import STATIC, print_ranking, static_error
from bench.quality.records_study import static_grid
from bench.quality.resampling import interval, seed_deviations
from bench.records import write

FOLDER = RESULTS / "quality"
SEEDS, SAMPLES = (0, 1, 2, 3, 4), 10  # seeds of heads from rewards
REWARDS = {  # name → reward, β
    "rewards-0.05": ("valid", 0.05),
    "rewards-alone": ("alone", 0.0),
    "rewards-0.01": ("valid", 0.01),
}
ROUNDS = {"rounds": 12, "prompts_per_round": 12, "num_generations": 10, "num_iterations": 3}
LONGEST = 9  # tokens: those of the longest answer in TRAIN, a full stop and an end
SCALES = ("", *(f" scale={s}" for s in (0.7, 1.5, 2, 3)))
HOT = [  # beside the grid of records, which is cool for answers as free as these
    *(f"static T={T}" for T in (1, 1.5, 2)),
    *(f"static T={T} min_p={m}" for T in (1.5, 2, 3) for m in (0.1, 0.2, 0.3)),
]
RULES = {
    "top_n_sigma": [f"top_n_sigma n={n} T={T}" for n in (1, 2, 3) for T in (1, 1.5, 2)],
    "p_less": [f"p_less T={T}" for T in (1, 1.5, 2, 3, 4)],
    "min_k": [f"min_k tau={tau} T={T}" for tau in (3, 10) for T in (1, 1.5, 2)],
    "edt": [f"edt t0={t0} theta={theta}" for t0 in (0.7, 1, 1.5) for theta in (0.1, 0.3, 1)],
    "entropy": [f"entropy a={a}{cut}" for a in (0.3, 0.5, 0.7, 1) for cut in ("", " min_p=0.1")],
}


def head(work: Path, name: str, seed: int) -> Path:
    """Its folder."""
    return work / "heads" / f"{name}-seed{seed}"


def train(work: Path, model: str) -> None:
    """The heads that learn from rewards and are not there yet."""
    tokenizer, prompts = base_model.load_tokenizer(model), work / "novelty-train.jsonl"
    lines = [{"task": q.name, "prompt": q.prompt(tokenizer)} for q in texts.TRAIN]
    write_text(prompts, "".join(json.dumps(line) + "\n" for line in lines))
    for seed in SEEDS:
        for name, (reward, weight) in REWARDS.items():
            config = RewardConfig(
                objective="rewards",
                model=model,
                prompts=prompts,
                reward=f"{texts.__name__}:{reward}",
                entropy_weight=weight,
                max_completion_length=LONGEST,
                stop="\n",
                learning_rate=3e-3,
                seed=seed,
                save_steps=4,
                resume=True,
                output=head(work, name, seed),
                **ROUNDS,
            )
            if not (config.output / CONFIG_NAME).exists():
                train_from_files(config)


def families(work: Path) -> dict[str, dict[str, list[str]]]:
    """Family → name of a setting → its policies, one a seed."""
    found = {"static": [*static_grid(), *HOT], **RULES}
    without = {family: {text: [text] for text in some} for family, some in found.items()}
    shipped = {f"records{scale}": [f"head={smollm2.HEAD}{scale}"] for scale in SCALES}
    heads = {
        f"{objective}-{domain}": [
            domains.head(work, domain, objective, seed) for seed in domains.SEEDS
        ]
        for domain in domains.DOMAINS
        for objective in domains.OBJECTIVES
    } | {name: [head(work, name, seed) for seed in SEEDS] for name in REWARDS}
    of_heads: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for name, folders in heads.items():
        family = f"rewards-{REWARDS[name][0]}" if name in REWARDS else name
        for scale in SCALES:
            of_heads[family][name + scale] = [f"head={folder}{scale}" for folder in folders]
    return without | {"records": shipped} | of_heads


@dataclass
class Measured:
    """What a policy of one seed does with each question."""

    valid: np.ndarray
    diversity: np.ndarray
    distinct: np.ndarray
    temperature: dict[str, float]  # mean T where an answer `begins`, and where it may be at its end

    @property
    def sizes(self) -> tuple[int]:
        return (len(self.valid),)

    def point(self, pick: np.ndarray) -> tuple[float, float]:
        return float(1 - self.valid[pick].mean()), float(self.diversity[pick].mean())

    def means(self) -> dict[str, float]:
        T = {f"temperature_{key}": value for key, value in self.temperature.items()}
        return {"distinct": float(self.distinct.mean()), **T}


def measured(answers: list[list[float]], temperature: dict[str, float]) -> Measured:
    """Of the chances of each question's answers."""
    p = [np.array(one) for one in answers]
    valid = np.array([one.sum() for one in p])
    shares = [one / max(one.sum(), 1e-30) for one in p]
    entropy = [-np.sum(q * np.log(q.clip(1e-30))) / np.log(len(q)) for q in shares]
    return Measured(valid, np.array(entropy), np.array([distinct(one) for one in p]), temperature)


def distinct(p: np.ndarray) -> float:
    """Expected number of different answers among SAMPLES, over that of the uniform distribution."""

    def expected(p: np.ndarray) -> float:
        return float((1 - (1 - p) ** SAMPLES).sum())

    return expected(p) / expected(np.full(len(p), 1 / len(p)))


Found = dict[str, list[Measured]]  # setting → seeds


def chances(work: Path, model: str, part: str, policies: list[str]) -> dict[str, dict]:
    """Policy → the `answers`' chances, a list a question, and where T is what, on a part."""
    path = work / f"novelty-{part}-chances.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    missing = {text: parse(text) for text in policies if text not in known}
    if missing:
        base = base_model.load(model, torch.float32)
        tree = AnswerTree(texts.PARTS[part], base, base_model.load_tokenizer(model))
        for text, (p, begins, ends) in tree.chances(missing).items():
            T = {"begins": float(begins.mean()), "ends": float(ends.mean())}
            known[text] = {"answers": [one.tolist() for one in p], "temperature": T}
        write_text(path, json.dumps(known) + "\n")
    return known


def measure(work: Path, model: str, part: str, settings: dict[str, list[str]]) -> Found:
    """Settings, each given by its policies, one a seed, on the questions of a part."""
    found = chances(work, model, part, [text for some in settings.values() for text in some])
    return {name: [measured(**found[text]) for text in some] for name, some in settings.items()}


def mean_distinct(seeds: list[Measured]) -> float:
    return float(np.mean([one.distinct for one in seeds]))


def over(ours: list[Measured], others: list[Measured]) -> dict[str, float | list[float]]:
    """Distinct answers of a policy over those of another, with a 95 % interval."""
    picks, columns = exact.resamples(ours[0].sizes), []
    for seeds in (ours, others):
        distinct = np.array([one.distinct for one in seeds])  # [seeds, questions]
        resampled = np.array([distinct[:, pick].mean() for (pick,) in picks])
        resampled += seed_deviations(distinct.mean(1), len(picks))
        columns.append(np.array([distinct.mean(), *resampled.clip(0, 1)]))
    ratio = columns[0] / columns[1]
    return {"ratio": float(ratio[0]), "ratio_95": interval(ratio)}


def against(found: Found, chosen: dict[str, str]) -> list[dict]:
    """A result a policy; those that were chosen say so, and their distinct answers over those of
    the chosen fixed setting."""
    made = {result["variant"]: result for result in exact.results(found, "diversity")}
    for family, name in chosen.items():
        made[name]["chosen_of"] = family
        made[name]["by_question"] = {
            question.name: {
                key: float(np.mean([getattr(one, key)[k] for one in found[name]]))
                for key in ("valid", "diversity", "distinct")
            }
            for k, question in enumerate(texts.TEST)
        }
        if family != "static":
            made[name]["distinct_over_static"] = over(found[name], found[chosen["static"]])
    return list(made.values())


def draw(found: list[dict], path: Path) -> None:
    """Errors against diversity, and the distinct answers of what was chosen."""
    with figure(path, (10.4, 4.6), 2, width_ratios=(3, 2)) as (_, (left, right)):
        static = [one for one in found if one["variant"].split()[0] in STATIC]
        x, y = (np.array([one[key] for one in static]) for key in ("diversity", "error"))
        at = np.linspace(x.min(), x.max(), 200)
        left.plot(at, static_error(y, x, at), color="0.6")
        left.plot(x, y, "o", ms=4, color="0.6", label="fixed settings")
        chosen = sorted((one for one in found if "chosen_of" in one), key=lambda r: r["distinct"])
        for number, one in enumerate(reversed(chosen)):
            label, style = one["chosen_of"], "os^"[number // 10]
            color = "k" if label == "static" else f"C{number % 10}"
            left.plot(one["diversity"], one["error"], style, ms=6, color=color, label=label)
        left.set(xlabel="diversity of listed answers", ylabel="error: not on the list")
        left.legend(frameon=False, fontsize=7)
        left.grid(alpha=0.3)
        right.barh([one["chosen_of"] for one in chosen], [one["distinct"] for one in chosen])
        right.set(xlabel=f"distinct listed answers among {SAMPLES}")
        right.grid(alpha=0.3, axis="x")


def main(arguments: list[str] | None = None) -> None:
    args = parsed(__doc__, "for answers, scans and heads", arguments)
    domains.train(args.folder, args.model)
    train(args.folder, args.model)
    tried = families(args.folder)
    settings = {name: some for family in tried.values() for name, some in family.items()}
    validation = measure(args.folder, args.model, "validation", settings)
    chosen = {
        family: max(some, key=lambda name: mean_distinct(validation[name]))
        for family, some in tried.items()
    }
    print("chosen on validation:", chosen, flush=True)
    wanted = {name: settings[name] for name in (*tried["static"], *chosen.values(), *REWARDS)}
    test = measure(args.folder, args.model, "test", {"greedy": ["greedy"], **wanted})
    found = against(test, chosen)
    facts = {f"{part}_questions": len(some) for part, some in texts.PARTS.items()}
    write(FOLDER / "novelty.json", "novelty", found, **facts)
    draw(found, FOLDER / "novelty.png")
    print_ranking(found, "diversity")


if __name__ == "__main__":
    main()
