"""Experiments: arms that are trained or probed, measures of them, claims about these.

experiment   what an experiment is: arms, what must be equal, claims
measures     the numbers that a run is judged by
claims       statements about measures of arms; verdicts: what the runs say to them
probes       measurements of a trained model under an intervention
fairness     refuses comparisons that are not fair
cells        the runs of an experiment: an arm with a seed, and where it is kept
runner       trains and probes what is missing
results      results.jsonl; histories: what was logged over training
"""
