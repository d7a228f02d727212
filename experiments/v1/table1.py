"""DeepSeekMoE against a dense model, Hash layers, Switch and GShard (V1 table 1).

    python -m experiments.v1.table1 --scale=demo

The same command continues after an interruption and skips what is finished; it ends with
RESULTS/table1-SCALE/report.html.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.study.experiment import Arm, Experiment, same_activated, same_total

TOP_1, TOP_2 = ("Hash Layer", "Switch"), ("GShard", "DeepSeekMoE")

EXPERIMENT = Experiment(
    module="experiments.v1.table1",
    title="DeepSeekMoE against dense, Hash, Switch and GShard",
    source="DeepSeekMoE (arXiv 2401.06066), table 1",
    summary="With the same number of parameters in total and as many activated as GShard,"
    " DeepSeekMoE reaches a clearly lower loss; GShard is slightly better than Switch, Switch"
    " better than Hash layers, and every MoE model better than the dense one.",
    arms=(
        Arm("Dense", "dense_2b", paper_loss=2.060),
        Arm("Hash Layer", "hash_2b", paper_loss=1.932),
        Arm("Switch", "switch_2b", paper_loss=1.881),
        Arm("GShard", "gshard_2b", paper_loss=1.867),
        Arm("DeepSeekMoE", "dsmoe_2b", paper_loss=1.808),
    ),
    equal=(
        *same_total(*TOP_1, *TOP_2),
        *same_activated("Dense", *TOP_1),
        *same_activated(*TOP_2),
    ),
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
