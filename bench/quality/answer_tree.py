"""The probability of every listed answer to some questions, under any policy.

The spellings of a question's answers are a tree of tokens: beginnings that several share are there
once. The model reads a question and its tree in one pass, each token seeing its own beginning
alone, and the chance of a spelling is the product along its branch, times that of an end.
"""

from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch

from autodeco_fast.policies import Policy
from autodeco_fast.training.base_model import BaseModel, end_ids
from bench.quality import exact
from bench.quality.novelty_text import Question

CHUNK = 256  # nodes whose logits are held at once


def ends_of(base: BaseModel, tokenizer) -> torch.Tensor:
    """Ids that end an answer: the model's own, and those that begin a new line."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    lines = {i for i, text in enumerate(texts) if text.lstrip(" \t\r").startswith("\n")}
    return torch.tensor(sorted(lines | set(end_ids(base.model, tokenizer))))


class AnswerTree:
    """Of some questions; nodes in an order that has every one behind its parent.

    A node is a beginning: the question itself, or a token behind another node.
    """

    def __init__(self, questions: tuple[Question, ...], base: BaseModel, tokenizer):
        self.questions, self.base, self.ends = questions, base, ends_of(base, tokenizer)
        self.roots, self.parent, self.token, hidden = [], [], [], []
        self.spellings: list[tuple[int, int, int]] = []  # question, answer, node at its end
        for number, question in enumerate(questions):
            prompt = list(tokenizer(question.prompt(tokenizer)).input_ids)
            hidden.append(self._grow(number, prompt, encode=lambda t: tokenizer(t).input_ids))
        self.hidden = torch.cat(hidden)
        self.depth = np.zeros(len(self.parent), dtype=int)
        for node, parent in enumerate(self.parent):
            self.depth[node] = self.depth[parent] + 1 if parent >= 0 else 0

    def _grow(self, number: int, prompt: list[int], encode: Callable) -> torch.Tensor:
        """Adds the nodes of a question; what enters the output embedding at each, `[nodes, H]`."""
        root = len(self.parent)
        self.roots.append(root)
        self.parent.append(-1)
        self.token.append(prompt[-1])
        nodes: dict[tuple[int, int], int] = {}
        for text, answer in self.questions[number].spellings().items():
            for written in (f" {text}", f" {text}."):
                at = root
                for token in encode(written):
                    if (at, token) not in nodes:
                        nodes[at, token] = len(self.parent)
                        self.parent.append(at)
                        self.token.append(token)
                    at = nodes[at, token]
                self.spellings.append((number, answer, at))
        return self._read(prompt[:-1], root)

    @torch.inference_mode()
    def _read(self, before: list[int], root: int) -> torch.Tensor:
        start, parents = len(before), self.parent[root:]
        length = start + len(parents)
        sees = torch.ones(length, length, dtype=torch.bool).tril()
        sees[start:, start:] = False
        positions = list(range(start))
        for i, parent in enumerate(parents):
            row = start + i
            if parent >= 0:
                sees[row, start:] = sees[start + parent - root, start:]
            sees[row, row] = True
            positions.append(positions[start + parent - root] + 1 if parent >= 0 else start)
        mask = torch.zeros(length, length).masked_fill(~sees, torch.finfo(torch.float32).min)
        read = self.base.model.base_model(
            input_ids=torch.tensor([before + self.token[root:]]),
            attention_mask=mask.to(self.base.weight.dtype)[None, None],
            position_ids=torch.tensor([positions]),
            use_cache=False,
        )
        return read.last_hidden_state[0, start:]

    @torch.inference_mode()
    def chances(
        self, policies: dict[str, Policy]
    ) -> dict[str, tuple[list[np.ndarray], np.ndarray, np.ndarray]]:
        """Of each policy: the chance of every answer, an array a question; and T where answers
        begin and where they may end, `[questions]` and `[spellings]`. The LM head runs once."""
        parent, token = torch.tensor(self.parent), torch.tensor(self.token)
        by_parent = parent.argsort(stable=True)
        found: dict[str, list] = defaultdict(list)
        for low in range(0, len(parent), CHUNK):
            hidden = self.hidden[low : low + CHUNK]
            logits = self.base.logits(hidden).float()
            bounds = torch.tensor([low, low + len(hidden)])
            first, last = torch.searchsorted(parent[by_parent], bounds).tolist()
            children = by_parent[first:last]
            for name, policy in policies.items():
                log_p, T = exact.law(policy, hidden, logits)
                step = log_p[parent[children] - low, token[children]]
                found[name].append((step, log_p[:, self.ends].logsumexp(-1), T))
        return {name: self._of(*map(torch.cat, zip(*some))) for name, some in found.items()}

    def _of(
        self, steps: torch.Tensor, ended: torch.Tensor, T: torch.Tensor
    ) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """Of ln p of each node but the roots, by parent, and of an end and T at every node."""
        parent = np.array(self.parent)
        log_p = np.zeros(len(parent))
        log_p[parent.argsort(kind="stable")[len(self.roots) :]] = steps.double().numpy()
        for depth in range(1, self.depth.max() + 1):
            at = self.depth == depth
            log_p[at] += log_p[parent[at]]
        chance = np.exp(log_p + ended.double().numpy())
        p = [np.zeros(len(question.answers)) for question in self.questions]
        for number, answer, node in self.spellings:
            p[number][answer] += chance[node]
        T = T.numpy()
        return p, T[self.roots], T[[node for _, _, node in self.spellings]]
