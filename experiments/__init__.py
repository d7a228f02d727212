"""One module a table or figure, by paper: a literal `Experiment`, see `dsmoe_jax/study`.

v1          DeepSeekMoE (arXiv 2401.06066)
balancing   ways to balance the load of the experts, from several papers
"""
