"""The section `model.moe` of a config, and the sections in it: one for each part of the layer.

None means none of it (no bias, no dropping, no schedule); 0 is a number.  Names of registries
(routers, balance terms, dispatchers) are checked where the layer is built, see moe/layer.py: a new
router or term changes nothing here.
"""

from __future__ import annotations

import dataclasses
import math

from dsmoe_jax.config.checks import checker, not_negative, positive
from dsmoe_jax.config.frozen import FrozenDict

Schedule = tuple[tuple[float, ...], ...]
SCHEDULE_FORM = (
    "must be pairs (share of the steps, finite multiple >= 0) with growing shares in 0..1"
)
SCOPES = ("sequence", "document", "global_batch")


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """The choice of experts.  A router refuses a setting that it would ignore.

    `options` are settings of one router; its entry in dsmoe_jax/moe/routers names them and
    their defaults.
    """

    name: str = "topk"  # in dsmoe_jax/moe/routers
    # Logits -> scores, in dsmoe_jax/moe/routers/scores; "sigmoid": V3, "sqrtsoftplus": V4.
    scoring_func: str = "softmax"
    norm_topk_prob: bool = False  # renormalise the chosen gates to sum 1 (V1: no)
    routed_scaling_factor: float = 1.0
    n_group: int = 1  # equal groups of experts (V2: devices, V3: nodes)
    topk_group: int = 1  # groups that a token may use (V2's M)
    group_score: str = "max"  # of a group: its best score (V2); "top2_sum": its two best (V3)
    bias_update_speed: float | None = None  # gamma of the loss-free balance bias (V3: 1e-3)
    # Multiplies gamma, in the form of a term's schedule.  V3 stops the bias for the last 0.5 of
    # 14.8 T tokens: ((0, 1), (0.966, 1), (0.966, 0), (1, 0)).
    bias_update_schedule: Schedule | None = None
    jitter: float | None = None  # in training the router's input times U(1 - x, 1 + x) (Switch)
    logits_bias: bool = False  # a learned bias of the logits (gpt-oss)
    # Of the logits and of the product that they are; bfloat16 is for comparison (Switch 2.4).
    logits_dtype: str = "float32"
    gates_dtype: str = "float32"  # that the gates are rounded to; they are float32 all the same
    # Names that a router by task chooses by, domains or beginnings of them: config/tasks.py.
    # Training takes the corpus' domains if there are none.
    tasks: tuple[str, ...] = ()
    options: FrozenDict[str, bool | int | float | str] = FrozenDict()

    def __post_init__(self) -> None:
        at = "model.moe.router."
        check = checker(self, at)
        not_negative(self, at, "routed_scaling_factor", "bias_update_speed", "jitter")
        positive(self, at, "n_group", "topk_group")
        schedule = self.bias_update_schedule
        check("bias_update_schedule", schedule is None or is_schedule(schedule), SCHEDULE_FORM)
        check(
            "bias_update_schedule",
            schedule is None or self.bias_update_speed is not None,
            "there is no bias without a bias_update_speed; must be None",
        )
        check("jitter", (self.jitter or 0.0) < 1, "must be below 1")
        for name, names in (
            ("group_score", ("max", "top2_sum")),
            ("logits_dtype", ("float32", "bfloat16")),
            ("gates_dtype", ("float32", "bfloat16")),
        ):
            check(name, getattr(self, name) in names, f"must be one of {names}")
        check(
            "topk_group", self.topk_group <= self.n_group, f"cannot exceed n_group={self.n_group}"
        )
        check("tasks", len({*self.tasks} - {""}) == len(self.tasks), "must be different names")


@dataclasses.dataclass(frozen=True)
class ExpertConfig:
    """The form of the experts, routed and shared, and of the dense layers before them."""

    name: str = "swiglu"  # in dsmoe_jax/nn/feed_forward
    limit: float | None = None  # of what is multiplied ("clamped_swiglu", "gpt_oss"); None: its own
    alpha: float | None = None  # of gate x sigmoid(alpha gate) ("gpt_oss"); None: its own

    def __post_init__(self) -> None:
        positive(self, "model.moe.expert.", "limit", "alpha")


@dataclasses.dataclass(frozen=True)
class QuantisedConfig:
    """Experts of whole numbers, routed and shared, with a scale for each output of a matrix.

    A model gets them by `surgery quantise`; they cannot be trained.
    """

    bits: int = 8  # of a weight; it takes a byte in any case, so that fewer only cost accuracy
    activations: bool = False  # what they are multiplied with too, in 8 bits

    def __post_init__(self) -> None:
        check = checker(self, "model.moe.quantised.")
        check("bits", 2 <= self.bits <= 8, "must be 2 to 8")


@dataclasses.dataclass(frozen=True)
class BalanceTerm:
    """The weight of a balance term (dsmoe_jax/moe/losses.py).

    Attributes:
      factor: its weight in the training loss.
      scope: the tokens over which f and P are taken: "sequence", a packed row by itself;
        "document", those of one document in a row; or "global_batch".
      schedule: multiplies the factor: pairs (share of the steps, multiple) joined by straight
        lines; two pairs with the same share are a jump.  None is 1 throughout.
    """

    factor: float
    scope: str = "sequence"
    schedule: Schedule | None = None


@dataclasses.dataclass(frozen=True)
class DropConfig:
    """Dropping of the assignments above the capacity of an expert or a device.

    With the dispatcher "fixed_slots" each shard of the tokens has a part of the capacity.
    """

    capacity_factor: float = 1.0  # the capacity, relative to the mean load
    policy: str = "position"  # a name in dsmoe_jax/moe/dropping.py
    protected_share: float = 0.1  # policy `device`: this share of sequences loses no token (V2)


@dataclasses.dataclass(frozen=True)
class DispatchConfig:
    """The dispatch of rows to their experts."""

    # A name in dsmoe_jax/moe/dispatch, or "auto": "all_to_all" where a mesh splits the experts.
    name: str = "auto"
    chunks: int = 1  # parts in which the tokens of a shard are dispatched; more take less memory

    def __post_init__(self) -> None:
        positive(self, "model.moe.dispatch.", "chunks")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """One MoE feed-forward layer: shared experts beside routed ones (V1 eqs. 9-11).

    With `n_routed_experts=0` the layer is a plain dense FFN made of its shared experts: a dense
    model is a configuration of the same code, not another model.
    """

    n_routed_experts: int = 63  # without the shared ones
    n_shared_experts: int = 1  # always active; computed as one FFN of this many widths
    num_experts_per_tok: int = 7  # K: routed experts a token activates
    moe_intermediate_size: int = 853  # width of one expert
    # Width of one expert as the paper prints it, relative to a standard FFN of 8 d^2 parameters.
    # Only the FLOPs that the paper prints need it: they are at nominal width.
    nominal_width: float = 0.25
    shared_expert_intermediate_size: int | None = None  # of one shared expert; None: as the routed
    shared_expert_gate: bool = False  # the shared output times sigmoid(x . w) (Qwen2-MoE)
    n_identity_experts: int = 0  # more choices of the router, which give their input back (LongCat)
    expert_groups: int = 1  # D: devices of the device and communication terms and of device drops
    router: RouterConfig = RouterConfig()
    # By name of the term: model.moe.balance.expert.factor=0.01; None takes a term out.
    balance: FrozenDict[str, BalanceTerm] = FrozenDict(expert=BalanceTerm(0.01))
    drop: DropConfig | None = None  # in training; None drops nothing
    evaluation_drop: DropConfig | None = None  # in evaluation; generation drops nothing
    dispatch: DispatchConfig = DispatchConfig()
    expert: ExpertConfig = ExpertConfig()
    quantised: QuantisedConfig | None = None  # None: the experts are float32
    expert_backend: str = "auto"  # a name in dsmoe_jax/moe/experts.py, or the best for the device
    row_kernels: str = "auto"  # "native", "jax": top-k, sorting and summing rows; moe/kernels

    def __post_init__(self) -> None:
        at = "model.moe."
        check = checker(self, at)
        e = self.n_routed_experts
        k = self.num_experts_per_tok
        not_negative(self, at, "n_routed_experts", "n_shared_experts", "num_experts_per_tok")
        not_negative(self, at, "n_identity_experts")
        z = self.n_identity_experts
        check("n_identity_experts", e > 0 or z == 0, "needs n_routed_experts > 0; must be 0")
        positive(self, at, "moe_intermediate_size", "nominal_width", "expert_groups")
        positive(self, at, "shared_expert_intermediate_size")
        for name, none in (
            ("shared_expert_intermediate_size", None),
            ("shared_expert_gate", False),
        ):
            fits = self.n_shared_experts > 0 or getattr(self, name) == none
            check(name, fits, f"there is no shared expert; must be {none}")
        check("n_routed_experts", e + self.n_shared_experts > 0, "a layer needs an expert")
        check("num_experts_per_tok", k <= e, f"cannot exceed the n_routed_experts={e} there are")
        check("num_experts_per_tok", k > 0 or e == 0, f"0 is only for n_routed_experts=0, not {e}")
        check("expert_groups", e % self.expert_groups == 0, f"must divide n_routed_experts={e}")
        for name, term in self.balance.items():
            _check_term(term, f"{at}balance.{name}.")
        for name in ("drop", "evaluation_drop"):
            if (drop := getattr(self, name)) is not None:
                _check_drop(drop, f"{at}{name}.", e)
        self._check_groups()

    @property
    def n_choices(self) -> int:
        """Experts that the router chooses among: the routed ones, then the identity experts."""
        return self.n_routed_experts + self.n_identity_experts

    @property
    def computed_per_token(self) -> float:
        """Routed experts that compute a token, if all choices are equally likely."""
        k = self.num_experts_per_tok
        return k * self.n_routed_experts / self.n_choices if k else 0.0

    @property
    def shared_width(self) -> int:
        """Width of the shared experts together, as the one FFN that they are computed as."""
        one = self.shared_expert_intermediate_size or self.moe_intermediate_size
        return self.n_shared_experts * one

    def _check_groups(self) -> None:
        e = self.n_routed_experts
        k = self.num_experts_per_tok
        router = self.router
        check = checker(router, "model.moe.router.")
        groups = router.n_group
        check("n_group", e % groups == 0, f"must divide n_routed_experts={e}")
        alone = groups == 1 or self.n_identity_experts == 0
        check("n_group", alone, "identity experts are in no group; with them it must be 1")
        reachable = router.topk_group * (e // groups)
        check(
            "topk_group",
            reachable >= k,
            f"groups of {e // groups} experts are {reachable} experts, fewer than"
            f" num_experts_per_tok={k}",
        )
        check(
            "group_score",
            router.group_score == "max" or groups == 1 or e // groups >= 2,
            f"needs 2 experts a group, n_group={groups} leaves {e // groups}; 'max' needs one",
        )


def _check_term(term: BalanceTerm, at: str) -> None:
    check = checker(term, at)
    not_negative(term, at, "factor")
    check("scope", term.scope in SCOPES, f"must be one of {SCOPES}")
    check("schedule", term.schedule is None or is_schedule(term.schedule), SCHEDULE_FORM)


def _check_drop(drop: DropConfig, at: str, n_experts: int) -> None:
    positive(drop, at, "capacity_factor")
    checker(drop, at)(
        "capacity_factor",
        drop.capacity_factor <= max(n_experts, 1),
        f"must be at most n_routed_experts={n_experts}, room for every token in every expert; None"
        " instead of the section drops nothing",
    )
    not_negative(drop, at, "protected_share")
    checker(drop, at)("protected_share", drop.protected_share <= 1, "must be a share, at most 1")


def is_schedule(pairs: Schedule) -> bool:
    """Whether these are pairs of growing shares in 0..1 and finite multiples >= 0."""
    numbers = all(
        len(pair) == 2 and 0 <= pair[0] <= 1 and 0 <= pair[1] < math.inf for pair in pairs
    )
    shares = [pair[0] for pair in pairs if pair]
    return bool(pairs) and numbers and shares == sorted(shares)
