"""DeepSeekMoE 16B beside the dense DeepSeek 7B (V1 table 3).

    python -m experiments.v1.table3 --scale=demo
    python -m experiments.v1.table3 --scale=paper --plan --chip=v5p --chips=256

The arms differ in size on purpose: the dense model is twice as wide, at every scale, and computes
more than twice as much for each token.  V1 compares the two on benchmarks and bits per byte.
LLaMA2 7B (table 4) was trained on other text with another tokenizer, so it is no arm here.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.study.claims import ratio_below
from dsmoe_jax.study.experiment import Arm, Experiment

EXPERIMENT = Experiment(
    module="experiments.v1.table3",
    title="DeepSeekMoE 16B beside DeepSeek 7B",
    source="DeepSeekMoE (arXiv 2401.06066), table 3",
    summary="DeepSeekMoE 16B is as good as DeepSeek 7B, trained on the same text, with 40.5 % of"
    " its FLOPs.",
    arms=(
        Arm("DeepSeek 7B", "deepseek_7b"),
        Arm("DeepSeekMoE 16B", "dsmoe_16b"),
    ),
    claims=(
        # "Comparable" is read as within 1 %, as for figure 5.
        ratio_below(
            "DeepSeekMoE 16B",
            "DeepSeek 7B",
            1.01,
            measure="validation_bits_per_byte",
            source="table 3",
        ),
    ),
    may_differ=("name", "model."),
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
