"""For the time of the rebuilding: the sections of `model.moe` as one flat object."""

from __future__ import annotations

import dataclasses

from dsmoe_jax.config import MoEConfig

TERMS = {
    "expert": "expert_balance",
    "device": "device_balance",
    "communication": "communication_balance",
    "sequence": "sequence_balance",
    "switch": "switch_balance",
    "router_z": "router_z",
}


@dataclasses.dataclass(frozen=True)
class Flat:
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    expert_groups: int
    expert_backend: str
    router: str
    scoring_func: str
    norm_topk_prob: bool
    routed_scaling_factor: float
    n_group: int
    topk_group: int
    group_score: str
    bias_update_speed: float
    router_jitter: float
    random_second_expert: bool
    sinkhorn_iterations: int
    policy_entropy_factor: float
    hash_table: str
    hash_seed: int
    expert_balance_factor: float
    expert_balance_scope: str
    expert_balance_schedule: tuple
    device_balance_factor: float
    device_balance_scope: str
    device_balance_schedule: tuple
    communication_balance_factor: float
    communication_balance_scope: str
    communication_balance_schedule: tuple
    sequence_balance_factor: float
    sequence_balance_scope: str
    sequence_balance_schedule: tuple
    switch_balance_factor: float
    switch_balance_scope: str
    switch_balance_schedule: tuple
    router_z_factor: float
    router_z_scope: str
    router_z_schedule: tuple
    capacity_factor: float
    evaluation_capacity_factor: float
    drop_policy: str
    evaluation_drop_policy: str
    protected_share: float
    dispatch: str
    buffer_factor: float
    exchange_chunks: int


def flat(moe: MoEConfig) -> Flat:
    r, o, d, ed = moe.router, moe.router.options, moe.drop, moe.evaluation_drop
    terms = {}
    for new, old in TERMS.items():
        t = moe.balance.get(new)
        terms |= {
            f"{old}_factor": t.factor if t else 0.0,
            f"{old}_scope": t.scope if t else "sequence",
            f"{old}_schedule": (t.schedule or ()) if t else (),
        }
    return Flat(
        moe.n_routed_experts,
        moe.n_shared_experts,
        moe.num_experts_per_tok,
        moe.moe_intermediate_size,
        moe.expert_groups,
        moe.expert_backend,
        {"topk": "topk"}.get(r.name, r.name),
        r.scoring_func,
        r.norm_topk_prob,
        r.routed_scaling_factor,
        r.n_group,
        r.topk_group,
        r.group_score,
        r.bias_update_speed or 0.0,
        r.jitter or 0.0,
        bool(o.get("random_second_expert", False)),
        int(o.get("iterations", 8)),
        float(o.get("entropy_factor", 0.0)),
        str(o.get("table", "random")),
        int(o.get("seed", 0)),
        **terms,
        capacity_factor=d.capacity_factor if d else 0.0,
        evaluation_capacity_factor=ed.capacity_factor if ed else 0.0,
        drop_policy=d.policy if d else "position",
        evaluation_drop_policy=ed.policy if ed else "",
        protected_share=(d or ed).protected_share if (d or ed) else 0.1,
        dispatch={"fixed_slots": "capacity"}.get(moe.dispatch.name, moe.dispatch.name),
        buffer_factor=moe.dispatch.buffer_factor or 0.0,
        exchange_chunks=moe.dispatch.chunks,
    )
