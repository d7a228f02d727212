"""The config of a model so small that a run takes seconds."""

TINY = {
    "name": "tiny",
    "model.vocab_size": 512,
    "model.hidden_size": 32,
    "model.num_hidden_layers": 2,
    "model.attention.num_attention_heads": 2,
    "model.attention.num_key_value_heads": 2,
    "model.attention.head_dim": 16,
    "model.initializer_range": 0.05,
    "model.moe.n_routed_experts": 4,
    "model.moe.num_experts_per_tok": 2,
    "model.moe.moe_intermediate_size": 16,
    "model.moe.balance.router_z.factor": 0.001,
    "model.moe.expert_backend": "loop",  # the quickest to compile
    "data.sequence_length": 64,
    "data.tokenizer_vocab_size": 512,
    "optimizer.peak_learning_rate": 0.01,
    "optimizer.warmup_steps": 2,
    "train.steps": 10,
    "train.global_batch_size": 4,
    "train.log_every": 1,
    "train.checkpoint_every": 3,
    "train.eval_every": 5,
    "train.eval_batches": 2,
}
