"""The claims that the project's sources make, in the order of their numbers, with their evidence.

A new experiment is added to a claim here: `FromExperiment` of its literal, in place of the
`NoExperiment` that asked for it.  Where a source says "equal", "as good as" or "hardly matters",
the experiment's claim states how far apart that may be.
"""

from __future__ import annotations

import functools

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.planning import papers
from dsmoe_jax.study.claims import LOSS
from dsmoe_jax.study.experiment import Experiment
from dsmoe_jax.study.ledger import (
    Computed,
    FromExperiment,
    NoExperiment,
    NotTestable,
    SourceClaim,
)
from experiments import source_figures as figures
from experiments.balancing import (
    balance,
    balanced_routers,
    capacity,
    learned_routers,
    router_stability,
)
from experiments.inside import committees, redundancy
from experiments.laws import granularity
from experiments.recipe import fine_tuning, lengths, stages
from experiments.surgery import (
    distillation,
    int8_experts,
    merging,
    one_task,
    pruning,
    task_routing,
    upcycling,
)
from experiments.v1 import (
    fig3,
    fig4,
    fig5,
    fig6,
    no_shared_expert,
    shared_ratio,
    table1,
    table2,
    table3,
    table6,
)
from experiments.v2 import device_limits, dropping
from experiments.v3 import balance_scopes, expert_counts

SOURCES = {
    "A": "a blog on the architecture",
    "B": "a blog on V1 with routing, stages and compression",
    "C": "an analysis of the V2-level design",
    "D": "a lecture's notes on mixtures of experts",
    "E": "slides on mixtures of experts",
    "V1": "the DeepSeekMoE paper, arXiv 2401.06066",
}

EXPERTS = "Finer and shared experts"
QUALITY = "Quality at equal size or work"
COSTS = "Sizes and costs"
BALANCE = "Balance and routers"
SPECIALISATION = "Specialisation"
DEVICES = "Devices, dropping and speed"
LIFE = "Training in stages, fine-tuning and surgery"

LOAD = "maxvio_running"
HELD_OUT_LOAD = "maxvio"
DOMAINS = "domain_specialisation"
BENCHMARKS = "Benchmark scores need the model at its own size, trained on its own data."


def orderings(experiment: Experiment) -> tuple[str, ...]:
    """Texts of the orderings by loss of an experiment."""
    claims = experiment.all_claims()
    return tuple(claim.text for claim in claims if claim.is_ordering and claim.measure == LOSS)


def less_redundant(measure: str) -> tuple[str, ...]:
    """Texts of the claims that DeepSeekMoE is less redundant than the GShard of its loss."""
    claims = redundancy.less_redundant(redundancy.OURS, redundancy.LARGER, "")
    return tuple(claim.text for claim in claims if claim.measure == measure)


def share(text: str, model: ModelConfig, digits: str) -> Computed:
    """The share of the routed experts that a token activates."""
    return Computed(
        f"{text} are {digits[:-1]} %",
        "activated routed experts, %",
        functools.partial(figures.share_of_experts, model),
        papers.accepted(digits),
        papers.value(digits),
        figures.COUNT,
    )


def saved(name: str, other: str) -> Computed:
    """The share of the training FLOPs that a mixture saves beside a dense model."""
    return Computed(
        f"{name} saves 60 to 80 % of the FLOPs of {other}",
        "training FLOPs saved, %",
        functools.partial(figures.saved_percent, name, other),
        (55.0, 85.0),
        command=figures.COUNT,
        why="60 to 80 is printed to tens, so it stands for 55 to 85. FLOPs of equally many tokens.",
    )


def parameters(text: str, model: ModelConfig, key: str, digits: str, why: str = "") -> Computed:
    """Parameters of V2 or V3."""
    return Computed(
        text,
        f"{key} parameters",
        functools.partial(figures.parameters, model, key),
        papers.accepted(digits, 0.01),  # the tolerance of `count`
        papers.value(digits),
        why=why,
    )


def faster(part: str, ratio: float, what: str) -> Computed:
    """A part of a layer that the compiled path computes in less time than the plain one."""
    return Computed(
        f"{part}: the compiled path is faster than plain JAX",
        "time before / after",
        functools.partial(figures.times_as_fast, part),
        (1.0, float("inf")),
        ratio,
        figures.SHOW_LATENCY,
        why="A smaller form: the source describes neither code, sizes nor machine."
        f" {what} One layer of {figures.LATENCY_TOKENS:,} tokens, forward, on CPU cores.",
        scale=None,
    )


V1_16B = figures.config("dsmoe_16b").model
V1_145B = figures.config("dsmoe_145b").model
V2 = figures.DEEPSEEK_V2
V3 = figures.DEEPSEEK_V3

CLAIMS = (
    SourceClaim(
        1, "A B C V1",
        "Finer experts (m cuts, m K activated) give a lower loss at equal total and activated"
        " parameters (figure 3).",
        EXPERTS,
        (
            FromExperiment(
                fig3.EXPERIMENT,
                (
                    "1 + 31 (3) below 1 + 15 (1)",
                    "1 + 63 (7) below 1 + 15 (1)",
                    "1 + 63 (7) below 1 + 31 (3)",
                ),
                why="Arms read: shared + routed experts, routed ones activated.",
            ),
            FromExperiment(
                granularity.EXPERIMENT,
                orderings(granularity.EXPERIMENT),
                why="Without a shared expert; arms read: m experts of each standard FFN.",
            ),
        ),
    ),
    SourceClaim(
        2, "A B C D V1",
        "Isolating a shared expert lowers the loss further (figure 3); its number (1, 2, 4 of 64)"
        " hardly matters: 1.808 / 1.806 / 1.811.",
        EXPERTS,
        (
            FromExperiment(fig3.EXPERIMENT, ("1 + 15 (1) below 0 + 16 (2)",)),
            FromExperiment(
                shared_ratio.EXPERIMENT,
                tuple(claim.text for claim in shared_ratio.EXPERIMENT.claims),
                why="Hardly matters is read as within 0.5 % in both directions.",
            ),
        ),
    ),
    SourceClaim(
        3, "A",
        "Later models need fewer shared experts (V3: one).",
        EXPERTS,
        (
            FromExperiment(
                shared_ratio.EXPERIMENT,
                (
                    "1 + 63 (7) at most 0.5 % above 2 + 62 (6)",
                    "1 + 63 (7) at most 0.5 % above 4 + 60 (4)",
                ),
                why="The smaller form: one shared expert of 64 is as good as two or four.",
            ),
            NotTestable(
                "What V3 needs shows only where V3 is trained with one shared expert and more.",
                "later models",
            ),
        ),
    ),
    SourceClaim(
        4, "A",
        "The activated share of the experts falls from 9 % (6 of 64, 12 of 128) over 6 of 160 to"
        " 2 % (8 of 256).",
        COSTS,
        (
            share("6 of 64", V1_16B, "9%"),
            share("12 of 128", V1_145B, "9%"),
            Computed(
                "it falls from 6 of 64 over 6 of 160 to 8 of 256",
                "smallest fall from one to the next, points of %",
                functools.partial(figures.fall_of_shares, (V1_16B, V2, V3)),
                (0.0, float("inf")),
                command=figures.COUNT,
            ),
            share("8 of 256", V3, "2%"),
        ),
    ),
    SourceClaim(
        5, "A",
        "2 of 8 experts cost about a third of the dense model of that size.",
        COSTS,
        (
            Computed(
                "parameters of Mixtral 8x7B that a token activates",
                "% of all parameters",
                figures.mixtral_share_of_parameters,
                (80 / 3, 40.0),
                100 / 3,
                why="About a third is read as within a fifth of it.",
            ),
            Computed(
                "training FLOPs of Mixtral 8x7B at 4096 tokens",
                "% of those with all experts activated",
                functools.partial(figures.mixtral_share_of_flops, 4096),
                (80 / 3, 40.0),
                100 / 3,
                why="About a third is read as within a fifth of it.",
            ),
            *(
                Computed(
                    f"weights that Mixtral 8x7B reads to decode {sequences}",
                    "% of all weights",
                    functools.partial(figures.mixtral_share_of_parameters_read, batch),
                    (80 / 3, 40.0),
                    100 / 3,
                    why="Cost read as memory traffic. A batch reads every expert that one of its"
                    " tokens chooses; all are taken as equally likely.",
                )
                for sequences, batch in (("one sequence", 1), ("32 sequences together", 32))
            ),
        ),
    ),
    SourceClaim(
        6, "A C D",
        "Without balance terms the router collapses onto few experts (D: two), and the model is"
        " worse than with them.",
        BALANCE,
        (
            FromExperiment(
                balance.EXPERIMENT,
                (
                    "nothing above 3.5",
                    *(f"{label} below nothing" for label in balance.EVEN_OUT),
                ),
                LOAD,
                why="MaxVio of 3.5: one of 63 experts is chosen by more than half of the tokens.",
            ),
            FromExperiment(
                balance.EXPERIMENT,
                tuple(f"{label} below nothing" for label in balance.EVEN_OUT),
                LOSS,
            ),
        ),
    ),
    SourceClaim(
        7, "B C V1",
        "2B equals GShard x1.5 (2.9B) and comes near the dense model of equal total parameters"
        " (tables 1, 2).",
        QUALITY,
        (
            FromExperiment(
                table2.EXPERIMENT,
                (
                    "DeepSeekMoE below 1.005 × GShard x1.5",
                    "DeepSeekMoE below 1.005 × Dense x16",
                ),
                why="Equal and near are read as within 0.5 %.",
            ),
        ),
    ),
    SourceClaim(
        8, "V1",
        "Dense > Hash > Switch > GShard > DeepSeekMoE in loss: 2.060, 1.932, 1.881, 1.867, 1.808"
        " (table 1).",
        QUALITY,
        (FromExperiment(table1.EXPERIMENT, orderings(table1.EXPERIMENT)),),
    ),
    SourceClaim(
        9, "V1",
        "GShard x1.2 1.824, x1.5 1.808; Dense x4 1.908, Dense x16 1.806 (tables 2, 8, 9).",
        QUALITY,
        (
            FromExperiment(table2.EXPERIMENT, orderings(table2.EXPERIMENT)),
        ),
    ),
    SourceClaim(
        10, "B C V1",
        "16B equals LLaMA2 7B with about 40 % of the FLOPs (39.6 %; 40.5 % of DeepSeek 7B's).",
        QUALITY,
        (
            *figures.printed_flops_percent("dsmoe_16b"),
            FromExperiment(
                table3.EXPERIMENT,
                why="The smaller form: both models at our scales, on the same text; equal is read"
                " as within 1 %.",
            ),
            NotTestable(
                "LLaMA2 7B was trained on other text with another tokenizer, and the comparison is"
                f" of benchmarks. {BENCHMARKS}",
                "16B beside LLaMA2 7B",
            ),
        ),
    ),
    SourceClaim(
        11, "B C V1",
        "145B equals DeepSeek 67B with 28.5 % of the FLOPs, half activated with 18.2 %.",
        QUALITY,
        (
            *figures.printed_flops_percent("dsmoe_145b"),
            *figures.printed_flops_percent("dsmoe_142b_half"),
            FromExperiment(
                table6.EXPERIMENT,
                (
                    "DeepSeekMoE 145B below DeepSeek 67B",
                    "DeepSeekMoE 142B (half activated) below DeepSeek 67B",
                ),
            ),
        ),
    ),
    SourceClaim(
        12, "V1",
        "After 245B tokens: 67B 1.905, GShard 137B 1.961, 145B 1.876, 142B half activated 1.888.",
        QUALITY,
        (FromExperiment(table6.EXPERIMENT, orderings(table6.EXPERIMENT)),),
    ),
    SourceClaim(
        13, "V1",
        "Masking the best-ranked routed experts hurts DeepSeekMoE more than GShard x1.5"
        " (figure 4).",
        EXPERTS,
        (
            FromExperiment(fig4.EXPERIMENT),
            *(
                FromExperiment(
                    redundancy.EXPERIMENT,
                    less_redundant(measure),
                    measure,
                    why="V1 takes figure 4 for a sign that its routed experts are less redundant."
                    " Then they should be less alike, and missed more where any are gone.",
                )
                for measure in ("outputs_alike", "weights_aligned", "random_rise", "least_rise")
            ),
        ),
    ),
    SourceClaim(
        14, "V1",
        "Shared expert off and one more routed: 1.808 -> 2.414.",
        EXPERTS,
        (FromExperiment(no_shared_expert.EXPERIMENT),),
    ),
    SourceClaim(
        15, "V1",
        "4 of 7 routed experts activated equal GShard (figure 5); trained with half of them it"
        " still beats GShard (figure 6).",
        EXPERTS,
        (
            FromExperiment(
                fig5.EXPERIMENT,
                ("4 of 7 below 1.01 × GShard",),
                why="Equal is read as within 1 %.",
            ),
            FromExperiment(fig6.EXPERIMENT),
        ),
    ),
    SourceClaim(
        16, "B",
        "In a 64-expert model only 38 % of the experts are clearly distinct.",
        EXPERTS,
        (
            FromExperiment(
                redundancy.EXPERIMENT,
                ("DeepSeekMoE below 50",),
                "distinct_experts",
                why="The source says neither how it compares experts nor which model it looked at."
                " The smaller form: fewer than half of the experts are clearly distinct, that is"
                " not as alike as 0.85 to another one in their outputs; the same source calls"
                " experts that are more alike fit to be pruned.",
            ),
        ),
    ),
    SourceClaim(
        17, "B",
        "The three busiest experts carry 51 % of the work (unbalanced conventional MoE).",
        BALANCE,
        (
            FromExperiment(
                balance.EXPERIMENT,
                ("GShard, nothing above 50",),
                "busiest_three",
                why="The smaller form: at least half. With two experts a token, three of 16 have"
                " 19 % where all are equal and at most 100 %.",
            ),
        ),
    ),
    SourceClaim(
        18, "B",
        "On low-resource languages the use of experts deviates by 0.47.",
        SPECIALISATION,
        (
            NotTestable(
                "The source says neither what deviates from what, nor in which languages and model."
            ),
        ),
    ),
    SourceClaim(
        19, "B",
        "Experts specialise by domain: of 256, mathematics 14.8 %, code 11.3 %, languages 16.4 %,"
        " common sense 9.4 %, long text 7.4 %, other 40.6 %.",
        SPECIALISATION,
        (
            NotTestable(
                "The source says neither how an expert's domain is found nor what the model was"
                " trained on; the shares are those of one model of 256 experts.",
                "the shares",
            ),
            FromExperiment(
                balance_scopes.EXPERIMENT,
                ("expert loss below global loss", "expert loss below loss-free bias"),
                DOMAINS,
                why="The smaller form: how much an expert says about the domain, beside a balance"
                " loss that works against it.",
            ),
            FromExperiment(
                committees.EXPERIMENT,
                (f"{committees.FINE} above 10", f"{committees.NOTHING} above 10"),
                committees.SPECIFIC,
                why="A tenth of the experts have twice their mean share of the gates in one domain,"
                " beyond what the same routing has with its domains shuffled.",
            ),
        ),
    ),
    SourceClaim(
        20, "E",
        "Experts of multilingual models do not specialise by language; encoder experts specialise"
        " in shallow kinds of token.",
        SPECIALISATION,
        (
            FromExperiment(
                balance_scopes.EXPERIMENT,
                ("expert loss below 0",),
                "language_over_kind",
                why="Not by language is read as: a chosen expert says less about the language (of"
                " speeches in four parliaments) than about the kind of text (in English).",
            ),
            NotTestable("There is no encoder here: all models are decoders.", "encoder experts"),
        ),
    ),
    SourceClaim(
        21, "B",
        "The dynamic specialised router routes (as printed it cannot).",
        BALANCE,
        (
            Computed(
                "as printed, scores of experts differ for some token",
                "largest difference of two scores",
                figures.dynamic_router_as_printed,
                (0.001, 1.0),
                why="Random logits of 64 tokens and 64 experts. Printed is the mean of a softmax"
                " over each expert's own four logits: 1/4 for all.",
            ),
            Computed(
                "with one softmax over all logits, scores differ for every token",
                "largest difference of two scores, of the token with the smallest",
                figures.dynamic_router_as_it_works,
                (0.001, 1.0),
                why="The router `dynamic_specialised` is this reading.",
            ),
        ),
    ),
    SourceClaim(
        22, "B",
        "Three stages: 30 % at 4M tokens a batch, 3e-4, 8-32 experts; 50 % at 2M, 1e-4, 32-128;"
        " 20 % at 1M, 5e-5, 128-256.",
        LIFE,
        (
            FromExperiment(
                stages.EXPERIMENT,
                why="The claim is advice; tested is whether following it gives a lower loss than"
                " constant settings of equal tokens and activated experts. The numbers of experts"
                " are read as activated ones: 5, 8 and 14.",
            ),
        ),
    ),
    SourceClaim(
        23, "B",
        "Optimised router 2.8 -> 1.1 ms (2.5 x), exchange 4.2 -> 2.3 ms (1.8 x).",
        DEVICES,
        (
            faster("router", 2.5, "Its fast path is top k alone."),
            faster("exchange", 1.8, "Rows are sorted by expert, gathered, and added up again."),
            Computed(
                "exchange between eight devices: a ragged one sends fewer rows than collecting all",
                "rows that leave their device, before / after",
                figures.times_fewer_rows,
                (1.0, float("inf")),
                1.8,
                figures.SHOW_LATENCY,
                why="A smaller form: the rows of 6 of 64 experts without a device limit, counted.",
                scale=None,
            ),
            NotTestable(
                "Eight devices are virtual ones of one CPU, without wires, and XLA has no ragged"
                " exchange there. The command shows what the exchange takes all the same.",
                "exchange between devices, in time",
                figures.SHOW_LATENCY,
            ),
        ),
    ),
    SourceClaim(
        24, "B",
        "Experts more alike than 0.85 can be pruned; 16-bit gates with INT8 experts lose little.",
        LIFE,
        (
            FromExperiment(
                pruning.EXPERIMENT,
                measure=pruning.MOST_ALIKE,
                why="That there are such experts: cosine of their outputs for the same tokens.",
            ),
            FromExperiment(
                pruning.EXPERIMENT,
                measure=pruning.PERCENT,
                why="That they can go, in a smaller form: the eighth that is most alike goes, and"
                " the loss rises by less than 0.5 %.",
            ),
            FromExperiment(
                int8_experts.EXPERIMENT,
                why="Little is read as below 1.005 times the loss, and 95 % of the choices the"
                " same. 16-bit gates: the router's logits and gates in bfloat16.",
            ),
        ),
    ),
    SourceClaim(
        25, "B",
        "Benchmark gains over a 1.2T GShard (72.3 against 65.1, 58.7 / 49.2, 81.5 / 73.8).",
        QUALITY,
        (NotTestable(f"The source names no paper, and no such GShard is known. {BENCHMARKS}"),),
    ),
    SourceClaim(
        26, "C",
        "Limiting a token to M devices costs nothing from M = 3 on (advice 3 to 5); traffic grows"
        " with M instead of D.",
        DEVICES,
        (
            FromExperiment(
                device_limits.EXPERIMENT, why="Costs nothing is read as within 0.5 % of no limit."
            ),
        ),
    ),
    SourceClaim(
        27, "C",
        "K of N = 2 of 32 is 6.25 % of the dense work (of the routed experts' work, not of the"
        " model's).",
        COSTS,
        (
            Computed(
                "of the routed experts' work",
                "% of that of all experts",
                lambda: 100 * 2 / 32,
                papers.accepted("6.25%"),
                6.25,
            ),
            Computed(
                "of the model's work",
                "% of the FLOPs with all experts activated",
                figures.two_of_32_of_the_model,
                papers.accepted("6.25%"),
                6.25,
                why="Of the model: V1's GShard 2B with 32 experts; attention and the output head"
                " are not saved.",
            ),
        ),
    ),
    SourceClaim(
        28, "C",
        "Training cost falls by 60 to 80 %.",
        COSTS,
        (
            saved("dsmoe_16b", "deepseek_7b"),
            saved("dsmoe_16b", "llama2_7b"),
            saved("dsmoe_145b", "deepseek_67b"),
            saved("dsmoe_142b_half", "deepseek_67b"),
        ),
    ),
    SourceClaim(
        29, "C",
        "Balance early, specialise late: a falling balance weight is better than a constant one.",
        BALANCE,
        (
            FromExperiment(balance.EXPERIMENT, ("falling loss below expert loss",)),
        ),
    ),
    SourceClaim(
        30, "C",
        "Device and communication terms even out devices and traffic while experts may stay"
        " uneven.",
        BALANCE,
        (
            FromExperiment(
                balance.EXPERIMENT,
                ("expert loss below device loss",),
                LOAD,
                why="That experts stay uneven: more than with the expert loss.",
            ),
            FromExperiment(
                balance.EXPERIMENT,
                ("device loss below 0.2",),
                "device_maxvio",
                why="That devices are even: within a fifth of their mean.",
            ),
            FromExperiment(
                balance.EXPERIMENT,
                ("device losses below device loss", "device losses below 0.2"),
                "traffic_maxvio",
                why="Traffic: the rows that each device receives, one of a token; even is within a"
                " fifth of their mean.",
            ),
        ),
    ),
    SourceClaim(
        31, "C D",
        "Dropping at capacity 1.0 with lowest affinity first and 10 % protected keeps training and"
        " evaluation consistent; dropping makes outputs depend on the batch.",
        DEVICES,
        (
            FromExperiment(
                dropping.EXPERIMENT,
                (
                    "protected below 1.005 × none",
                    "protected (evaluation too) below 1.005 × protected",
                ),
                why="Consistent is read as within 0.5 %.",
            ),
            Computed(
                "other sequences in the batch change what is dropped of a sequence",
                "assignments of 64 that change",
                figures.fates_that_depend_on_the_batch,
                (1.0, 64.0),
                why="V2's dropping on random logits: 16 tokens, 4 of 16 experts each, 4 devices.",
            ),
        ),
    ),
    SourceClaim(
        32, "D",
        "At equal FLOPs more parameters give a lower loss; a mixture reaches a dense model's loss"
        " in 1/7 of the time.",
        QUALITY,
        (
            FromExperiment(
                table1.EXPERIMENT, ("Hash Layer below Dense", "Switch below Dense")
            ),
            FromExperiment(
                expert_counts.EXPERIMENT,
                orderings(expert_counts.EXPERIMENT),
                why="Arms read: shared + routed experts.",
            ),
            FromExperiment(
                lengths.EXPERIMENT,
                ("Switch, ×0.5 below Dense, ×4",),
                why="The time is read as tokens, at equal FLOPs a token, and 1/7 as 1/8, which is"
                " among the lengths.",
            ),
        ),
    ),
    SourceClaim(
        33, "D",
        "Hashing is a baseline that learned routers beat.",
        BALANCE,
        (
            FromExperiment(
                table1.EXPERIMENT,
                ("Switch below Hash Layer",),
                why="The two of equal size and work.",
            ),
            FromExperiment(
                learned_routers.EXPERIMENT,
                ("BASE below Hash Layer",),
                why="BASE learns which expert a token goes to, one of 16 as Hash layers.",
            ),
        ),
    ),
    SourceClaim(
        34, "D",
        "A router trained by REINFORCE has no clear advantage; noise was given up for balance"
        " terms.",
        BALANCE,
        (
            FromExperiment(
                balanced_routers.EXPERIMENT,
                ("nothing below 1.005 × REINFORCE", "V2 below 1.005 × REINFORCE"),
                why="No clear advantage: not better than top-k by more than 0.5 %.",
            ),
            FromExperiment(
                learned_routers.EXPERIMENT,
                ("top-k below 1.01 × REINFORCE",),
                why="The same beside top-k with its balance loss, read as within 1 %.",
            ),
            FromExperiment(
                learned_routers.EXPERIMENT,
                ("top-k below 1.01 × noisy top-k",),
                why="Noise in place of a balance loss is not better by more than 1 %.",
            ),
            FromExperiment(learned_routers.EXPERIMENT, ("top-k below noisy top-k",), HELD_OUT_LOAD),
        ),
    ),
    SourceClaim(
        35, "D",
        "The loss-free bias balances without hurting the loss; V3 adds a small sequence term.",
        BALANCE,
        (
            FromExperiment(balance.EXPERIMENT, ("loss-free bias below nothing",), LOAD),
            FromExperiment(
                balance.EXPERIMENT,
                ("loss-free bias below 1.005 × nothing",),
                why="Without hurting is read as within 0.5 %.",
            ),
            FromExperiment(
                balance_scopes.EXPERIMENT, ("loss-free bias below expert loss",)
            ),
            FromExperiment(balanced_routers.EXPERIMENT, ("V3 below nothing",), LOAD),
        ),
    ),
    SourceClaim(
        36, "D",
        "The router in float32 and the z-loss prevent instability and spikes.",
        BALANCE,
        (
            FromExperiment(
                router_stability.EXPERIMENT,
                ("float32 below bfloat16", "float32, z-loss below float32"),
                "loss_rise",
                why="Spikes: how far the training loss rises above its lowest value, at twice the"
                " rate of the scale.",
            ),
            FromExperiment(
                router_stability.EXPERIMENT,
                ("float32 below bfloat16", "float32, z-loss below float32"),
                why="And the loss in the end.",
            ),
        ),
    ),
    SourceClaim(
        37, "D",
        "Mixtures overfit in fine-tuning; training the dense part only, or more data, helps.",
        LIFE,
        (
            FromExperiment(
                fine_tuning.EXPERIMENT,
                ("dense model below everything", "dense part below everything"),
                "generalisation_gap",
                why="Overfitting: how far the held-out loss is above that of training, which has"
                " read everything several times by then.",
            ),
            FromExperiment(
                fine_tuning.EXPERIMENT,
                ("dense part below everything",),
                why="That it helps: a lower held-out loss.",
            ),
            NoExperiment("fine-tuning on parts of the tasks, measured on one", "more data"),
        ),
    ),
    SourceClaim(
        38, "D",
        "Upcycling a dense model is cheaper than training from scratch.",
        LIFE,
        (
            FromExperiment(
                upcycling.EXPERIMENT,
                tuple(
                    f"{upcycling.UPCYCLED.label} below {other.label}"
                    for other in (upcycling.FRESH, upcycling.FRESH_IN_ALL, upcycling.LONGER)
                ),
                why="A quarter of the dense model's steps after it, for as many tokens, and for as"
                " many FLOPs with those of the dense model; and the dense model trained on.",
            ),
        ),
    ),
    SourceClaim(
        39, "D",
        "V1 16B 2.8B activated, V2 236B / 21B, V3 671B / 37B (printed as 631B and 258 experts:"
        " slips).",
        COSTS,
        (
            Computed(
                "V1 16B has 2.8B activated parameters",
                "activated parameters",
                functools.partial(figures.figure, "dsmoe_16b", "activated"),
                papers.accepted("2.8B", papers.TOLERANCE["activated"]),
                papers.value("2.8B"),
                figures.COUNT,
            ),
            parameters("V2 has 236B parameters", V2, "total", "236B"),
            parameters("V2 activates 21B", V2, "activated", "21B"),
            parameters("V3 has 671B parameters", V3, "total", "671B"),
            parameters("V3 activates 37B", V3, "activated", "37B"),
            parameters(
                "V3 as printed: 631B parameters", V3, "total", "631B", "631B is a slip for 671B."
            ),
            Computed(
                "V3 as printed: 258 experts",
                "experts of a layer",
                functools.partial(figures.all_experts, V3),
                (258.0, 258.0),
                258,
                why="258 is a slip: there are 256 routed experts and a shared one.",
            ),
        ),
    ),
    SourceClaim(
        40, "E",
        "Mixtral 8x7B is 47B, not 56B, and computes as 12 to 13B.",
        COSTS,
        (
            Computed(
                "it has 47B parameters",
                "total parameters",
                functools.partial(figures.parameters, figures.MIXTRAL, "total"),
                papers.accepted("47B", papers.TOLERANCE["total"]),
                papers.value("47B"),
            ),
            Computed(
                "it activates 12 to 13B",
                "activated parameters",
                functools.partial(figures.parameters, figures.MIXTRAL, "activated"),
                (papers.accepted("12B")[0], papers.accepted("13B")[1]),
                why="The source prints a range: everything that rounds to 12B or 13B counts.",
            ),
        ),
    ),
    SourceClaim(
        41, "E",
        "More experts help less and less, little beyond 256 or 512.",
        EXPERTS,
        (
            FromExperiment(
                expert_counts.EXPERIMENT,
                tuple(
                    claim.text
                    for claim in expert_counts.EXPERIMENT.claims
                    if not claim.is_ordering
                ),
                why="Little beyond 256: 512 are not better by more than 0.5 %.",
            ),
        ),
    ),
    SourceClaim(
        42, "E",
        "A higher capacity factor helps quality and costs traffic and memory.",
        DEVICES,
        (
            FromExperiment(capacity.EXPERIMENT, why="Quality; GShard alone has no limit."),
            Computed(
                "twice the capacity sends twice the rows",
                "rows received, times those at capacity 1",
                functools.partial(figures.of_twice_the_capacity, "received"),
                (1.5, 2.5),
                why="Fixed slots, as GShard and Switch send them; a layer of gshard_2b on 8 chips.",
            ),
            Computed(
                "twice the capacity buffers twice the rows",
                "rows buffered, times those at capacity 1",
                functools.partial(figures.of_twice_the_capacity, "buffered"),
                (1.5, 2.5),
                why="As above.",
            ),
        ),
    ),
    SourceClaim(
        43, "E",
        "A dense student keeps 30 to 40 % of the mixture's gain.",
        LIFE,
        (
            FromExperiment(
                distillation.EXPERIMENT,
                (
                    f"{distillation.LITTLE} below {distillation.DENSE}",
                    *(claim.text for claim in distillation.kept(distillation.LITTLE)),
                ),
                why="A quarter of the loss is the teacher's, the weights begin at random. More of"
                " the teacher, and its hidden states, are in the experiment's report.",
            ),
        ),
    ),
    SourceClaim(
        44, "E",
        "Whole sequences or tasks can be routed to one expert, and a sub-model extracted for"
        " serving.",
        LIFE,
        (
            FromExperiment(
                task_routing.EXPERIMENT,
                ("by task below 1.01 × DeepSeekMoE",),
                why="Tasks, by label: routing of whole sequences without a label is not there. A"
                " task has seven experts, as many as a token.",
            ),
            FromExperiment(
                one_task.EXPERIMENT,
                tuple(
                    claim.text
                    for claim in one_task.preserved(task_routing.TASK)
                    if claim.measure in (one_task.GAP, "total")
                ),
            ),
        ),
    ),
    SourceClaim(
        45, "E",
        "Merging experts saves parameters without much loss.",
        LIFE,
        (
            FromExperiment(
                merging.EXPERIMENT,
                measure="rise_percent",
                why="Without much loss is read as less than 1 %; nothing is trained afterwards.",
            ),
        ),
    ),
    SourceClaim(
        46, "E",
        "At fixed compute sparse is better; with little memory and little traffic dense is.",
        QUALITY,
        (
            FromExperiment(
                table1.EXPERIMENT,
                ("Switch below Dense",),
                why="At equal FLOPs.",
            ),
            FromExperiment(
                table2.EXPERIMENT,
                ("Dense x16 below DeepSeekMoE",),
                why="At equal memory: as many parameters in total.",
            ),
            Computed(
                "with little memory: DeepSeekMoE 16B holds more than its equal, DeepSeek 7B",
                "bytes of the weights, times those of DeepSeek 7B",
                functools.partial(figures.times_the_memory, "dsmoe_16b", "deepseek_7b"),
                (1.0, float("inf")),
                command=figures.COUNT,
                why="Equal in quality by V1's table 3.",
            ),
            Computed(
                "with little memory and one sequence: DeepSeekMoE 16B takes more chips of 16 GB",
                "v5e chips, less those of DeepSeek 7B",
                functools.partial(figures.more_chips, "dsmoe_16b", "deepseek_7b", "v5e", 512),
                (1.0, float("inf")),
                command=figures.ECONOMICS.format(chip="v5e", context=512, batch=1),
                why="The same pair. Traffic is read as requests here.",
            ),
            *(
                Computed(
                    f"with {sequences}, DeepSeek 7B decodes faster on a chip",
                    "tokens/s of an H100, times those with DeepSeekMoE 16B",
                    functools.partial(
                        figures.times_the_speed, "deepseek_7b", "dsmoe_16b", "h100", batch, 512
                    ),
                    (1.0, float("inf")),
                    command=figures.ECONOMICS.format(chip="h100", context=512, batch=batch),
                    why="The same pair, bounds by the data sheet at 512 tokens of context.",
                )
                for sequences, batch in (("one sequence", 1), ("32 sequences together", 32))
            ),
        ),
    ),
    SourceClaim(
        47, "V1",
        "Every size and FLOPs figure of V1's models (tables 1 to 3, 6, 8 and 9).",
        COSTS,
        figures.printed_figures(),
    ),
)  # fmt: skip
