"""The command that compares policies."""

from autodeco_fast.cli.signature import takes
from autodeco_fast.training.eval_config import EvalConfig


@takes(EvalConfig)
def evaluate(**values: object) -> None:
    """Compare policies on prompts of yours: score, Pass@k, diversity, with intervals.

    Killed at any moment it continues where it was: give the same command again. For several
    devices: `accelerate launch -m autodeco_fast eval …`.
    """
    config = EvalConfig(**values)
    from autodeco_fast.training.evaluate import evaluate as run
    from autodeco_fast.training.processes import end_with_a_line

    end_with_a_line()
    run(config)
