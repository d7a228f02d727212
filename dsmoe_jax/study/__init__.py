"""Experiments: arms that are trained or probed, their measures, claims about the measures.

experiment   definition of an experiment: arms, sizes that must be equal, claims
measures     numbers by which runs are compared
claims       statements about measures of arms; verdicts: whether the runs confirm them
probes       measurements of a trained model under an intervention
fairness     refuses comparisons that are not fair
plans        sizes, FLOPs and chip-hours of its runs before they are trained; launch lines
cells        the runs of an experiment: an arm with a seed, and its workdir
made_models  what surgery makes of finished runs, for runs that begin with it
runner       trains and probes the runs that are missing
results      results.jsonl; histories: values logged over training
"""
