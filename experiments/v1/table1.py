"""DeepSeekMoE against a dense model, Hash layers, Switch and GShard (V1 table 1).

    python -m experiments.v1.table1 --scale=demo

The same command continues after an interruption and skips what is finished; it ends with
RESULTS/table1-SCALE/report.html.
"""

from dsmoe_jax.commands import experiment
from dsmoe_jax.planning.papers import V1
from dsmoe_jax.study.experiment import Arm, Experiment, same_activated, same_total
from experiments.laws import sizes

TOP_1 = ("Hash Layer", "Switch")  # one FFN of standard width activated
TOP_2 = ("GShard", "DeepSeekMoE")  # two

EXPERIMENT = Experiment(
    module="experiments.v1.table1",
    title="DeepSeekMoE against dense, Hash, Switch and GShard",
    source="DeepSeekMoE (arXiv 2401.06066), table 1",
    summary="With the same number of parameters in total and as many activated as GShard,"
    " DeepSeekMoE reaches a clearly lower loss; GShard is slightly better than Switch, Switch"
    " better than Hash layers, and every MoE model better than the dense one.",
    arms=(
        Arm("Dense", "dense_2b", paper_loss=V1["dense_2b"].loss),
        Arm("Hash Layer", "hash_2b", paper_loss=V1["hash_2b"].loss),
        Arm("Switch", "switch_2b", paper_loss=V1["switch_2b"].loss),
        Arm("GShard", "gshard_2b", paper_loss=V1["gshard_2b"].loss),
        Arm("DeepSeekMoE", "dsmoe_2b", paper_loss=V1["dsmoe_2b"].loss),
    ),
    equal=(
        *same_total(*TOP_1, *TOP_2),
        *same_activated("Dense", *TOP_1),
        *same_activated(*TOP_2),
    ),
    analyses=("effective_compute",),
    baseline=sizes.GSHARD,
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
