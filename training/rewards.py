"""Training on rewards: a round of rollouts, their statistics at T, an optimizer step or some.

    ℓ = −A·ln p_T(y) − β·H_T    per sampled token, mean over a round's tokens

Rollouts are dear and steps cheap, so a round may have more than one (`num_iterations`). From the
second on p_T is no more what y was sampled with, and A is multiplied by the ratio of the two, or by
0 once that has left 1 ± epsilon on the side that A rewards: the clipped objective of PPO (arXiv
1707.06347), token by token.

The hidden states are those that the sampler saw (recorded rollouts are run through the model once);
`token_stats` of the cut distribution and the head are all that has a graph. With a target entropy
H* the weight of a round is in proportion to what its entropy lacks,
`β = 10·entropy_weight·(H* − H)/H*`, and below 0 where it has too much. (A weight that is adapted
from round to round, as in soft actor-critic, was tried: it goes on falling while T is still high,
overshoots, and a kept set of one token has no gradient to come back by.)
"""

import copy
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from autodeco_fast import TemperatureHead, TokenStats, reward_loss, token_stats
from autodeco_fast.training import checkpoints
from autodeco_fast.training.base_model import BaseModel, width
from autodeco_fast.training.checkpoints import Progress
from autodeco_fast.training.data import IGNORED
from autodeco_fast.training.head_folder import (
    METRICS_NAME,
    check_model,
    check_resumed,
    written_settings,
)
from autodeco_fast.training.loop import (
    check_output,
    learning_rate,
    new_head,
    save_heads,
    with_min_p,
)
from autodeco_fast.training.metrics import Log, lines_until
from autodeco_fast.training.objectives import Sums, transform_of
from autodeco_fast.training.processes import Processes
from autodeco_fast.training.reward_config import RewardConfig
from autodeco_fast.training.rollouts import Rollout, Rounds
from autodeco_fast.training.scan import batches_by_length, lm_head_fingerprint, model_identity, pad
from autodeco_fast.training.scan_store import file_fingerprint
from autodeco_fast.training.step import Step, differentiate

_GAIN = 10.0


def weight_of_entropy(entropy: float, config: RewardConfig) -> float:
    """β in a round of this mean entropy a token."""
    if config.target_entropy is None:
        return config.entropy_weight
    short = (config.target_entropy - entropy) / config.target_entropy
    return config.entropy_weight * _GAIN * max(-1.0, min(1.0, short))


def clipped_advantage(advantage: torch.Tensor, ratio: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`[N]` advantages that give PPO's gradient where they multiply that of ln p_T.

    Args:
        advantage: `[N]`.
        ratio: `[N]`, p_T of each token over what it was sampled with.
        epsilon: beyond 1 ± it, a token is not moved on.
    """
    far = torch.where(advantage > 0, ratio > 1 + epsilon, ratio < 1 - epsilon)
    return torch.where(far, 0.0, advantage * ratio)


def check_head(config: RewardConfig) -> None:
    """Before a model is loaded.

    Raises:
        ValueError: if there is no head in `config.head`, or of another width than the model's.
    """
    if config.head is not None:
        new_head(with_min_p(config), width(config.model))


def train_on_rewards(
    rounds: Rounds,
    base: BaseModel,
    config: RewardConfig,
    *,
    accelerator,
    on_start: Callable[[int, int], None],
    on_round: Callable[[dict], None],
) -> TemperatureHead:
    """Trains a head and writes it, its settings and its metrics to `config.output`.

    Args:
        rounds: of rollouts.
        base: the model that the rollouts are of.
        accelerator: of `accelerate`; every process takes its share of a round's prompts.
        on_start: called with the number of rounds, and how many a resumed run has done.
        on_round: called with a round's metrics, in the main process.

    Raises:
        ValueError: if `config.output` holds a head already, the reward function fails, a loss is
            not finite, no round had rewards that differ in a group, or another process has ended.
            Finished rounds are saved.
    """
    check_output(config)
    base.check_own()
    if config.head is not None:
        check_model(config.head, lambda: lm_head_fingerprint(base))
    return _Run(rounds, base, config, Processes(accelerator)).run(on_start, on_round)


class _Run:
    """One run in one process."""

    def __init__(self, rounds: Rounds, base: BaseModel, config: RewardConfig, processes: Processes):
        self.rounds, self.base, self.processes = rounds, base, processes
        self.config = with_min_p(config)
        self.head = new_head(self.config, base.weight.shape[1]).to(base.weight.device)
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(), lr=config.learning_rate, weight_decay=0.01
        )
        self.progress = Progress()
        self.sampled_at: list[torch.Tensor] = []  # ln p_T `[N]` of a round's batches as sampled
        self.saved = 0  # rounds in the newest checkpoint, in the main process
        self.spread = 0.0  # the largest of advantages in a round
        self.log: Log | None = None  # in the main process

    def run(
        self, on_start: Callable[[int, int], None], on_round: Callable[[dict], None]
    ) -> TemperatureHead:
        config, newest = self.config, checkpoints.newest(self.config.output)
        identity = {**model_identity(self.base), **self.rounds.identity()}
        source = config.prompts if config.rollouts is None else config.rollouts
        if source.is_file():
            identity["trained_on"] = file_fingerprint(source)
        settings = written_settings(config, identity)
        if newest is not None:
            check_resumed(config.output, settings)
            self.progress, _ = checkpoints.load(newest, self.head, self.optimizer)
            self.saved = self.progress.step
            rounds = lines_until(config.output / METRICS_NAME, self.saved)
            self.spread = max((json.loads(x)["advantage_spread"] for x in rounds), default=0.0)
        if self.processes.is_main:
            self.log = Log(config, settings, self.saved)
        on_start(config.rounds, self.progress.step)
        try:
            self._all_rounds(on_round)
        except (
            BaseException
        ) as error:  # rounds are dear: they outlive a reward function, and Ctrl-C
            self._save_what_is_done()
            done = f"; {self.saved} rounds are saved, --resume goes on from them"
            if isinstance(error, ValueError) and self.saved:
                raise ValueError(f"{error}{done}") from error
            raise
        if not self.spread:
            raise ValueError(
                "no round had rewards that differ among the rollouts of a prompt: nothing could be "
                "learned from them"
            )
        if self.log:
            save_heads(self.head, config.output)
        self.processes.wait()
        return self.head

    def _all_rounds(self, on_round: Callable[[dict], None]) -> None:
        """The rounds that are left."""
        config, progress = self.config, self.progress
        while progress.step < config.rounds:
            metrics = self._round()
            self.spread = max(self.spread, metrics["advantage_spread"])
            if self.log:
                self.log.write(metrics)
                on_round(metrics)
                if config.save_steps and progress.step % config.save_steps == 0:
                    self._save()

    def _round(self) -> dict:
        """Rollouts and the optimizer steps on them; metrics of the first step."""
        config, progress = self.config, self.progress
        where = self.processes.rank, self.processes.world
        rollouts = self.rounds.rollouts(progress.step, self.head, *where)
        self.sampled_at = []
        with self._all_or_none():
            metrics = self._step(rollouts)
            for _ in range(config.num_iterations - 1):
                self._step(rollouts)
            progress.step += 1
        progress.selected_tokens += metrics["tokens"]
        return {"step": progress.step, **metrics}

    @contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """A round's steps: after an error in one, head and optimizer are what the last checkpoint
        or the last round left, so that what is saved then is a whole number of rounds."""
        before = copy.deepcopy((self.head.state_dict(), self.optimizer.state_dict()))
        try:
            yield
        except BaseException:
            self.head.load_state_dict(before[0])
            self.optimizer.load_state_dict(before[1])
            raise

    def _step(self, rollouts: list[Rollout]) -> dict:
        """An optimizer step on a round's rollouts."""
        config, progress = self.config, self.progress
        total, measured = self._gradients(rollouts)
        total = total.reduce(self.processes.sum)
        measured = self.processes.sum(measured)
        metrics = _means(measured)
        beta = weight_of_entropy(metrics["entropy"], config)
        total = total.scaled({"reward": 1.0, "entropy": beta})
        loss = sum(total.means().values())
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss must be finite, got {loss:g} in round {progress.step + 1}: "
                f"learning_rate {config.learning_rate:g} may be too high, or hidden states are NaN"
            )
        rate = config.learning_rate * learning_rate(
            progress.step, config.rounds, config.warmup_ratio, config.lr_scheduler_type
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total.assign(self.head.parameters())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss, **metrics, "entropy_weight": beta, "learning_rate": rate}

    def _gradients(self, rollouts: list[Rollout]) -> tuple[Step, torch.Tensor]:
        """Sums over the tokens of some rollouts, and what `_means` takes."""
        parameters = list(self.head.parameters())
        total = Step.zero(("reward", "entropy"), parameters)
        measured = torch.zeros(7, dtype=torch.float64)
        numbered = [(i, rollout.example) for i, rollout in enumerate(rollouts)]
        batches = batches_by_length(numbered, self.config.batch_tokens)
        for number, batch in enumerate(batches):
            sums = self._sums([rollouts[i] for i, _ in batch], number)
            one, seen = differentiate(sums, parameters)
            total = total + one
            of_tokens = (
                seen.weight.sum(),
                seen.temperature.sum(),
                seen.stats.scaled_entropy.sum(),
            )
            measured[4:] += torch.stack([x.double().cpu() for x in of_tokens])
        for rollout in rollouts:
            of_rollout = 1.0, rollout.reward, rollout.truncated, rollout.advantage**2
            measured[:4] += torch.tensor(of_rollout, dtype=torch.float64)
        return total, measured

    def _sums(self, rollouts: list[Rollout], number: int) -> Sums:
        """Both terms of the loss, summed over the tokens of the rollouts of the round's batch of
        this number, from row moments."""
        base = self.base
        hidden, target, advantage = self._tokens(rollouts)
        T = self.head(hidden)
        at = {"temperature": T, "min_p": self.head.min_p, "cut": True}
        stats = token_stats(hidden, base.weight, target, **at, **transform_of(base))
        advantage = self._clipped(advantage, stats, number)
        loss = reward_loss(T, stats, advantage, entropy_weight=0.0, reduction="sum")
        weight = (stats.rank >= 0).to(loss.dtype)
        tokens = weight.sum()
        # Apart, since β waits for the entropy of the whole round.
        terms = {"reward": (loss, tokens), "entropy": (-stats.scaled_entropy.sum(), tokens)}
        return Sums(terms, temperature=T.detach(), stats=stats, weight=weight)

    def _clipped(self, advantage: torch.Tensor, stats: TokenStats, number: int) -> torch.Tensor:
        """Advantages `[N]` times what the steps so far made of the probabilities."""
        log_prob = stats.scaled_log_prob.detach()
        if number == len(self.sampled_at):
            self.sampled_at.append(log_prob)
            return advantage
        moved = log_prob - self.sampled_at[number]
        ratio = torch.where(moved.isfinite(), moved, 0.0).exp()  # a recorded token may be banned
        return clipped_advantage(advantage, ratio, self.config.epsilon)

    def _tokens(self, rollouts: list[Rollout]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states `[N, H]`, targets `[N]` and advantages `[N]` of all tokens that count."""
        base, device = self.base, self.base.weight.device
        ids, mask, labels = (t.to(device) for t in pad([r.example for r in rollouts]))
        wanted = labels[:, 1:] != IGNORED
        if any(rollout.hidden is None for rollout in rollouts):
            hidden = base.hidden(ids, mask)[:, :-1][wanted]
        else:
            hidden = torch.cat([rollout.hidden for rollout in rollouts])
        advantage = torch.tensor([rollout.advantage for rollout in rollouts], device=device)
        of_tokens = advantage[:, None].expand(wanted.shape)[wanted]
        return hidden.to(base.weight.dtype), labels[:, 1:][wanted], of_tokens

    def _save(self) -> None:
        checkpoints.save(
            self.config.output,
            head=self.head,
            optimizer=self.optimizer,
            progress=self.progress,
            best=None,
            limit=self.config.save_total_limit,
        )
        self.saved = self.progress.step

    def _save_what_is_done(self) -> None:
        """Before an error goes on; one of saving would hide it."""
        if self.log and self.progress.step > self.saved:
            with suppress(ValueError, OSError):
                self._save()


def _means(sums: torch.Tensor) -> dict[str, float]:
    """Of rollouts, and of their tokens."""
    rollouts, reward, truncated, squares, tokens, T, entropy = sums.tolist()
    n, tokens = max(rollouts, 1), int(tokens)
    return {
        "reward": reward / n,
        "truncated": truncated / n,
        "advantage_spread": math.sqrt(squares / n),
        "temperature": T / max(tokens, 1),
        "entropy": entropy / max(tokens, 1),
        "rollouts": int(rollouts),
        "tokens": tokens,
    }
