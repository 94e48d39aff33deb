"""The tables of an evaluation, and its page: one file that needs nothing else."""

from collections.abc import Callable, Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from autodeco_fast.training import report_page as html
from autodeco_fast.training.eval_figures import Point, draw, short
from autodeco_fast.training.eval_measures import Interval, diversities
from autodeco_fast.training.eval_store import Sample
from autodeco_fast.training.prompts import Prompt
from autodeco_fast.training.shading import HOTTEST, token_texts

PROMPTS, SAMPLES = 6, 2  # whose texts are shown: prompts, and samples of each under a policy
# What the frontier is drawn against: measure → label of the axis.
DIVERSITY = {
    "entropy": "entropy of a record's fields, nats",
    "distinct": "share of a prompt's samples that differ",
    "distinct_2": "share of a prompt's word pairs that differ",
}
_FEW = "few records"
_WIDEST = 1000  # of a table that no terminal shows
_SHOWN_TOKENS = 400  # of a sample
_Cell = Callable[[dict, dict], str]  # of a policy and its measures


def _of(name: str) -> _Cell:
    return lambda policy, measures: str(Interval(**measures[name])) if name in measures else "–"


def _mean(name: str, form: str) -> _Cell:
    def cell(policy: dict, measures: dict) -> str:
        value = measures.get(name, {}).get("mean")
        return "–" if value is None else format(value, form)

    return cell


def _over_fixed(task: str, kind: str) -> _Cell:
    def cell(policy: dict, measures: dict) -> str:
        found = Interval(**policy["over_fixed"].get(task, {}).get(kind, {"mean": None}))
        if found.mean is None or found.low is None:
            return "–" if found.mean is None else f"{found.mean:+.3f}"
        return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"

    return cell


def _speed(policy: dict, measures: dict) -> str:
    speed = policy["tokens_per_second"]
    return "–" if speed is None else f"{speed:,.0f}"


def _columns(task: str, measures: dict, *, short: bool) -> dict[str, _Cell]:
    """Heading → what a policy shows there."""
    most = max(int(name.partition("@")[2]) for name in measures if name.startswith("pass@"))
    entropies = [name for name in measures if name.startswith("entropy:")]
    columns: dict[str, _Cell] = {"score": _of("score")}
    show = (lambda name: _mean(name, ".3f")) if short else _of
    if most > 1:
        columns[f"pass@{most}"] = show(f"pass@{most}")
    columns[f"distinct valid@{most}"] = show(f"distinct_valid@{most}")
    if entropies:
        columns["entropy"] = _of("entropy")
    if not short:
        columns |= {f"entropy of {name.partition(':')[2]}": _of(name) for name in entropies}
    if entropies:
        columns[_FEW] = _mean("few_records", ".0%")
    columns["distinct"] = show("distinct")
    columns["distinct-2"] = show("distinct_2")
    kinds = diversities(bool(entropies))
    over = {
        f"over fixed at equal {kind.replace('_', '-')}": _over_fixed(task, kind) for kind in kinds
    }
    if short:
        over = {"over fixed": _over_fixed(task, kinds[0])}
    return {
        **columns,
        **over,
        "T": _mean("temperature", ".2f"),
        "top-p": _mean("top_p", ".2f"),
        "kept": _mean("kept", ",.1f"),
        **({} if short else {"tokens": _mean("tokens", ".1f")}),
        "truncated": _mean("truncated", ".0%"),
        "tokens/s": _speed,
    }


def _cells(policies: Sequence[dict], task: str, *, short: bool) -> tuple[list[str], list[list]]:
    """A table's head, and a line a policy."""
    columns = _columns(task, policies[0]["tasks"][task], short=short)
    if not any(p["over_fixed"].get(task) for p in policies):
        columns = {name: cell for name, cell in columns.items() if "over fixed" not in name}
    if not any("top_p" in p["tasks"][task] for p in policies):
        del columns["top-p"]
    if not any(p["tasks"][task].get("few_records", {}).get("mean") for p in policies):
        columns.pop(_FEW, None)
    lines = [
        [p["policy"], *(cell(p, p["tasks"][task]) for cell in columns.values())] for p in policies
    ]
    return ["policy", *columns], lines


def tables(results: dict, *, brief: bool = False) -> list[Table]:
    """One a task, for the terminal.

    Args:
        brief: the main columns alone; intervals, and long policies, in a line of their own.
    """
    policies, found = results["policies"], []
    for task in policies[0]["tasks"]:
        head, lines = _cells(policies, task, short=True)
        diversity, _ = diversities("entropy" in policies[0]["tasks"][task])
        if brief:
            main = ("policy", "score", diversity, "over fixed", "T")
            shown = [number for number, name in enumerate(head) if name in main]
            head = [head[number] for number in shown]
            lines = [[line[number].replace(" [", "\n[") for number in shown] for line in lines]
        table = Table(title=f"{task} (95 % intervals over prompts)", box=SIMPLE_HEAD)
        table.show_edge = table.pad_edge = not brief
        table.collapse_padding = brief
        captions = []
        if "over fixed" in head:
            captions.append(f"over fixed: score less that of fixed settings at equal {diversity}")
        if _FEW in head:
            captions.append(f"{_FEW}: prompts whose entropy is of fewer right ones than asked for")
        table.caption = "\n".join(captions) or None
        for number, name in enumerate(head):
            justify, folds = "right" if number else "left", brief and not number
            table.add_column(name, justify=justify, no_wrap=not folds, overflow="fold")
        for policy, *cells in lines:
            table.add_row(short(policy), *cells)
        found.append(table)
    return found


def show_tables(console: Console, results: dict) -> bool:
    """Prints the tables, whole where they fit or are read by no terminal; whether they are."""
    found, widest = tables(results), console.options.update(width=_WIDEST)
    needed = max(console.measure(table, options=widest).maximum for table in found)
    whole = needed <= console.width or not console.is_terminal
    wide = Console(
        file=console.file, quiet=console.quiet, markup=False, width=max(console.width, needed)
    )
    for table in found if whole else tables(results, brief=True):
        (wide if whole else console).print(table)
    return whole


def page(
    results: dict, prompts: Sequence[Prompt], samples: Iterable[Sample], tokenizer=None
) -> str:
    """The whole page; without a tokenizer samples are not shaded."""
    policies = results["policies"]
    body = [html.paragraph(_facts(results, len(prompts)))]
    for task in policies[0]["tasks"]:
        body += _frontiers(policies, task)
        head, lines = _cells(policies, task, short=False)
        body += [html.heading(f"Measures: {task}"), html.table(head, lines)]
    body += [html.paragraph(_WORDS), *_texts(policies, prompts, samples, tokenizer)]
    return html.page("Policies on the same prompts", body)


_WORDS = (
    "Intervals are 95 % bootstrap intervals over prompts. Pass@k: at least one of k samples is "
    "right, unbiased. Distinct valid@k: different right samples among k, over k. Entropy: of "
    "the values in equally many valid records of a prompt; of all there are where there are fewer "
    "(few records: in this share of the prompts), 0 where there is none. "
    "Distinct: different samples over all; distinct-2: different word pairs over all; means over "
    "prompts. Over fixed: "
    "the score less that of the best fixed settings (static, greedy) at the policy's diversity, "
    "neighbours on their frontier joined by lines; none where no fixed setting is as diverse. "
    "T, top-p (where a policy predicts it) and kept: means over tokens. Truncated: samples that "
    "reached the token limit."
)


def _facts(results: dict, prompts: int) -> str:
    settings = results["settings"]
    name = settings["model"] or f"{settings['endpoint_model']} at {settings['endpoint']}"
    return (
        f"{name}; {prompts} prompts of {settings['prompts']}, {settings['samples']} samples of "
        f"each under every policy, the same seeds; scorer {settings['scorer']}."
    )


def _frontiers(policies: Sequence[dict], task: str) -> list[str]:
    """A figure for each kind of diversity that was measured."""
    kinds = diversities("entropy" in policies[0]["tasks"][task])
    figures = []
    for kind in kinds:
        points = [
            Point(p["policy"], p["family"], p["tasks"][task]["score"], p["tasks"][task][kind])
            for p in policies
            if p["tasks"][task][kind]["mean"] is not None
        ]
        if any(point.diversity["mean"] for point in points):
            figures.append(
                html.image(
                    f"{task}-{kind}".replace(" ", "-"),
                    draw(points, DIVERSITY[kind]),
                    f"Score against {DIVERSITY[kind].partition(',')[0]}: {task}",
                    "A point a policy with its 95 % intervals, a curve through the best of each "
                    "family. Up and to the right is better.",
                    kind="svg+xml",
                )
            )
    return figures


def _texts(
    policies: Sequence[dict], prompts: Sequence[Prompt], samples: Iterable[Sample], tokenizer
) -> list[str]:
    """Some samples of the first prompts, shaded by temperature where tokens are known."""
    shown: dict[tuple[str, int], list[Sample]] = {}
    for sample in samples:
        if sample.prompt < PROMPTS and sample.sample < SAMPLES:
            shown.setdefault((sample.policy, sample.prompt), []).append(sample)
    legend = "White is T = 0, deep orange T = 2; point at a token for its temperature."
    blocks = [html.heading("Samples"), *([html.paragraph(legend)] if tokenizer else [])]
    for number, prompt in enumerate(prompts[:PROMPTS]):
        inside = [html.shaded([], HOTTEST, before=prompt.shown)]
        for policy in policies:
            drawn = sorted(shown.get((policy["policy"], number), ()), key=lambda s: s.sample)
            inside.append(html.heading(policy["policy"], level=3))
            inside += [_shaded(sample, tokenizer) for sample in drawn]
        about = f"line {prompt.line}{': ' if prompt.task else ''}{prompt.task}"
        blocks.append(html.details(about, inside))
    return blocks


def _shaded(sample: Sample, tokenizer) -> str:
    if tokenizer is None or sample.tokens is None or sample.temperature is None:
        return html.shaded([], HOTTEST, before=sample.text)
    texts = token_texts(tokenizer, sample.tokens[:_SHOWN_TOKENS])
    cut = "…" if len(sample.tokens) > len(texts) else ""
    return html.shaded(list(zip(texts, sample.temperature)), HOTTEST, behind=cut)
