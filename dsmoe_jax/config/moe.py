"""The knobs of the MoE layer; the other sections of a config are in dsmoe_jax/config.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from dsmoe_jax.config.checks import checker, not_negative, positive

Schedule = tuple[tuple[float, ...], ...]
SCHEDULE_FORM = "must be pairs (share of the steps, multiple >= 0) with growing shares in 0..1"


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
    # Only the accounting reads it: the paper's FLOPs figures are at nominal width.
    nominal_width: float = 0.25

    # How experts are chosen.  A router refuses a setting that it would ignore.
    router: str = "topk_softmax"  # a name in dsmoe_jax/moe/routers
    scoring_func: str = "softmax"  # logits -> affinities; "sigmoid" (V3) with router "topk"
    norm_topk_prob: bool = False  # renormalise the chosen gates to sum 1 (V1: no)
    routed_scaling_factor: float = 1.0
    n_group: int = 1  # the experts in this many equal groups (V2: devices, V3: nodes),
    topk_group: int = 1  # of which a token may use this many (V2's M),
    group_score: str = "max"  # those with the best expert (V2); "top2_sum": two best (V3)
    bias_update_speed: float = 0.0  # gamma of the loss-free balance bias (V3: 1e-3); 0: no bias
    router_jitter: float = 0.0  # in training the router's input times U(1 - x, 1 + x) (Switch)
    random_second_expert: bool = False  # `gshard`: in training drop weak second experts at random
    sinkhorn_iterations: int = 8  # `sinkhorn`: how often rows and columns are normalised
    policy_entropy_factor: float = 0.0  # `reinforce`: weight of the policy's entropy as a reward
    hash_table: str = "random"  # `hash`: token -> expert; "frequency": even on the training text
    hash_seed: int = 0  # of the random table

    # Balance terms (dsmoe_jax/moe/losses.py).  NAME_factor is a term's weight, 0 leaves it out;
    # NAME_scope the tokens over which f and P are taken, "sequence" or "global_batch";
    # NAME_schedule multiplies the weight: pairs (share of the steps, multiple) joined by straight
    # lines, two pairs with the same share are a jump; () is 1 throughout.
    expert_balance_factor: float = 0.01
    expert_balance_scope: str = "sequence"
    expert_balance_schedule: Schedule = ()
    device_balance_factor: float = 0.0
    device_balance_scope: str = "sequence"
    device_balance_schedule: Schedule = ()
    communication_balance_factor: float = 0.0
    communication_balance_scope: str = "sequence"
    communication_balance_schedule: Schedule = ()
    sequence_balance_factor: float = 0.0  # its scope is the sequence
    sequence_balance_schedule: Schedule = ()
    switch_balance_factor: float = 0.0
    switch_balance_scope: str = "sequence"
    switch_balance_schedule: Schedule = ()
    router_z_factor: float = 0.0
    router_z_scope: str = "sequence"
    router_z_schedule: Schedule = ()
    expert_groups: int = 1  # D, the devices of the device and communication terms

    # Dropping: what the busiest experts (or devices) get above capacity_factor x the mean is lost.
    capacity_factor: float = 0.0  # in training; 0 is dropless
    evaluation_capacity_factor: float = 0.0  # 0: evaluation drops nothing
    drop_policy: str = "position"  # a name in dsmoe_jax/moe/capacity.py
    evaluation_drop_policy: str = ""  # the same; "": that of training
    # With dispatch="capacity" each shard of the tokens has its part of the capacity for itself.
    protected_share: float = 0.1  # `device`: this share of the sequences never loses a token (V2)

    # A name in dsmoe_jax/moe/dispatch, or "auto": "all_to_all" where a mesh splits the experts.
    dispatch: str = "auto"
    # Rows that a device makes room for, relative to the mean: what does not fit is done in smaller
    # chunks.  0: room for the worst case.
    buffer_factor: float = 0.0
    exchange_chunks: int = 1  # the tokens of a shard are dispatched in so many parts, for less room
    expert_backend: str = "auto"  # a name in dsmoe_jax/moe/experts.py, or the best for the device

    def __post_init__(self) -> None:
        at, check = "model.moe.", checker(self, "model.moe.")
        e, k = self.n_routed_experts, self.num_experts_per_tok
        not_negative(
            self,
            at,
            "n_routed_experts",
            "n_shared_experts",
            "num_experts_per_tok",
            "bias_update_speed",
            "router_jitter",
            "protected_share",
            *self._ending("_factor"),
        )
        positive(
            self,
            at,
            "moe_intermediate_size",
            "nominal_width",
            "n_group",
            "topk_group",
            "expert_groups",
            "sinkhorn_iterations",
            "exchange_chunks",
        )
        check("n_routed_experts", e + self.n_shared_experts > 0, "a layer needs an expert")
        check("num_experts_per_tok", k <= e, f"cannot exceed the n_routed_experts={e} there are")
        check("num_experts_per_tok", k > 0 or e == 0, f"0 is only for n_routed_experts=0, not {e}")
        check("router_jitter", self.router_jitter < 1, "must be below 1")
        check("protected_share", self.protected_share <= 1, "must be a share, at most 1")
        for name, names in (
            *((name, ("sequence", "global_batch")) for name in self._ending("_scope")),
            ("scoring_func", ("softmax", "sigmoid")),
            ("group_score", ("max", "top2_sum")),
            ("hash_table", ("random", "frequency")),
        ):
            check(name, getattr(self, name) in names, f"must be one of {names}")
        check(
            "buffer_factor",
            self.buffer_factor == 0 or self.buffer_factor >= 1,
            "must be at least 1, room for the mean, or 0 for the worst case",
        )
        check(
            "buffer_factor",
            self.buffer_factor == 0 or self.dispatch != "capacity",
            "with dispatch='capacity' the capacity_factor says how much room there is; must be 0",
        )
        for name in self._ending("_schedule"):
            check(name, _is_schedule(getattr(self, name)), SCHEDULE_FORM)
        self._check_groups(check)

    def _ending(self, suffix: str) -> list[str]:
        return [f.name for f in dataclasses.fields(self) if f.name.endswith(suffix)]

    def _check_groups(self, check: Callable[[str, bool, str], None]) -> None:
        e, k, groups = self.n_routed_experts, self.num_experts_per_tok, self.n_group
        check("n_group", e % groups == 0, f"must divide n_routed_experts={e}")
        check("expert_groups", e % self.expert_groups == 0, f"must divide n_routed_experts={e}")
        check("topk_group", self.topk_group <= groups, f"cannot exceed n_group={groups}")
        reachable = self.topk_group * (e // groups)
        check(
            "topk_group",
            reachable >= k,
            f"groups of {e // groups} experts are {reachable} experts, fewer than"
            f" num_experts_per_tok={k}",
        )
        check(
            "group_score",
            self.group_score == "max" or groups == 1 or e // groups >= 2,
            f"needs 2 experts a group, n_group={groups} leaves {e // groups}; 'max' needs one",
        )
        check(
            "communication_balance_factor",
            self.communication_balance_factor == 0 or self.expert_groups == groups,
            "counts the devices that a token is sent to, at most topk_group (V2 eq. 29):"
            f" expert_groups={self.expert_groups} must equal n_group={groups}",
        )
        check(
            "device_balance_factor",
            self.device_balance_factor == 0 or self.expert_groups > 1,
            "there is nothing to balance on one device; expert_groups must be > 1",
        )


def _is_schedule(pairs: Schedule) -> bool:
    shares = [pair[0] for pair in pairs if len(pair) == 2 and pair[1] >= 0]
    return len(shares) == len(pairs) and [0, *shares, 1] == sorted([0, *shares, 1])
