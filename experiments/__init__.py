"""One module a table or figure, by paper: a literal `Experiment`, see `dsmoe_jax/study`.

`python -m experiments.FOLDER.NAME --scale=demo` runs one, `--plan` says what it would cost.
`python -m experiments.ledger` puts every claim of the sources beside what came out.

v1, DeepSeekMoE (arXiv 2401.06066):
    table1             dense, Hash, Switch, GShard, DeepSeekMoE (table 1)
    table2             GShard of 1.2 and 1.5 times the experts, the dense bound (tables 2, 8, 9)
    table3             16B beside the dense 7B (table 3)
    table6             145B and half activated 142B beside GShard 137B and the dense 67B (table 6)
    fig3               a shared expert, then finer experts (figure 3)
    fig4               without the best routed experts; probes of table2 (figure 4)
    fig5               3 to 7 routed experts in evaluation; probes of table1 (figure 5)
    fig6               trained with half the activated experts (figure 6)
    shared_ratio       1, 2 or 4 shared experts of 64 (section 4.4)
    no_shared_expert   a routed expert in place of the shared one; probes of table1 (section 4.5)
v2, DeepSeek-V2 (2405.04434):
    device_limits      a token's experts on at most M devices (section 2.2.2)
    dropping           by device; protected sequences; in evaluation too (section 2.2.4)
v3, DeepSeek-V3 (2412.19437) and what it builds on:
    scoring            softmax or sigmoid affinities, gates normalised or not (section 2.1.2)
    balance_scopes     balance over a sequence, the batch, by a bias (section 4.5.3; 2408.15664)
    expert_counts      8 to 512 experts to choose from (2101.03961; 2202.01169)
recipe, the training settings of a scale:
    rates              the peak learning rate of each model (V1 section 4.1.3)
    batches            the batch size at the same number of tokens
    deviations         the standard deviation of the initial weights
    lengths            half to four times the steps
    stages             three stages of training beside constant settings
    fine_tuning        of a trained model on conversations: all of it, or a part of it
laws, of the loss:
    granularity        m = 1 to 16 experts of each FFN, at equal FLOPs (2402.07871; 2507.17702)
    granularity_time   the same at equal wall-clock
    sizes              GShard and DeepSeekMoE at four sizes: loss over compute
    widths             the best learning rate over widths, with and without muP (2203.03466)
balancing, ways to balance the load of the experts:
    balance            losses and the loss-free bias (V1 section 3.3; V3 section 2.1.2)
    balanced_routers   V2, V3, Sinkhorn, REINFORCE, expert choice, BASE (their papers)
    capacity           GShard with experts that take 1 to 2 times their mean load (2006.16668)
    router_stability   a float32 router and the z-loss at a high rate (2101.03961; 2202.08906)
    learned_routers    noisy top-k, Sinkhorn, REINFORCE, BASE beside top-k and Hash (their papers)
inside, what the experts of finished models learned:
    committees         experts with half of the gates: do all domains share them (2601.03425)
    redundancy         how alike experts are, and the loss without some of them (V1 section 4.5)
surgery, changes of a trained model:
    distillation       a dense student of DeepSeekMoE (2101.03961; 1503.02531)
    task_routing       experts chosen by the task of a document, not for each token (2110.03742)
    one_task           the dense model of each task; probes of task_routing (2110.03742)
    upcycling          mixtures made of a dense model, beside ones from scratch (2212.05055)
    pruning            at random, by use, likeness or loss: loss against experts left (V1 4.5)
    merging            alike experts become one: loss against experts left (2310.01334)
    extraction         the experts that a domain needs: loss on it and off it (2604.05267)
    int8_experts       experts of 8 bits and fewer, with 16-bit gates; probes of table1
"""
