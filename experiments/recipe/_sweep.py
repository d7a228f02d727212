"""Arms of a sweep: every model of table 1 with multiples of one or more settings of its scale."""

from collections.abc import Mapping, Sequence

from dsmoe_jax.study.claims import Claim, below
from dsmoe_jax.study.experiment import Arm, Equal, same_activated, same_total
from experiments.v1 import table1

MODELS = tuple(arm for arm in table1.EXPERIMENT.arms if isinstance(arm, Arm))
RATE = "optimizer.peak_learning_rate"


def label(model: str, x: float) -> str:
    """Label of the arm that trains a model with `x` times the scale's setting."""
    return f"{model}, ×{x:g}"


def arms(xs: Sequence[float], multiples: Mapping[str, float]) -> tuple[Arm, ...]:
    """Every model with every `x`.

    Args:
      xs: multiples of the setting that is swept.
      multiples: dotted keys and the power of `x` by which each is multiplied: 1 for the setting
        itself, -1 for what must shrink as it grows.
    """
    return tuple(
        Arm(
            label(model.label, x),
            model.config,
            multiples={key: x**power for key, power in multiples.items()},
            x=x,
            line=model.label,
        )
        for x in xs
        for model in MODELS
    )


def equal(xs: Sequence[float]) -> tuple[Equal, ...]:
    """The sizes that are equal in table 1, at every `x`."""

    def labels(models: Sequence[str]) -> tuple[str, ...]:
        return tuple(label(model, x) for x in xs for model in models)

    return (
        *same_total(*labels((*table1.TOP_1, *table1.TOP_2))),
        *same_activated(*labels(("Dense", *table1.TOP_1))),
        *same_activated(*labels(table1.TOP_2)),
    )


def main_claims(xs: Sequence[float]) -> tuple[Claim, ...]:
    """The paper's main ordering at every `x`."""
    source = "V1 table 1"
    return tuple(below(label("DeepSeekMoE", x), label("GShard", x), source=source) for x in xs)
