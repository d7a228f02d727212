"""The MoE layer and its three seams: routing, dispatch, expert compute.

    logits_TE --[router]--> Routing(ids_TK, gates_TK, affinity_TE, logits_TE)
    x_TD, Routing --[dispatch]--> rows_ND by expert, group_sizes_e, what combine needs
    rows_ND, group_sizes_e --[experts]--> rows_ND --[combine]--> y_TD

Read `reference`, which is the whole layer as one dense loop; then `types`, `routers`, `dispatch`,
`experts`; then `routed`, which composes the three, and `layer`, which adds the rest in a page.
"""
