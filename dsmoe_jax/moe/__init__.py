"""The MoE layer and its three seams: routing, dispatch, expert compute.

    logits_TE --[router]--> Routing --[dispatch]--> rows by expert --[experts]--> rows --> y_TD

Read `types`, `routers`, `dispatch`, `experts`, then `layer`, which puts them together in a page.
"""
