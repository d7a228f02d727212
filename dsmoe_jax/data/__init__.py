"""Text -> labelled corpus -> packed sequences -> batches.

Read in this order: documents (what is kept and held out), tokenizer, packing (one record), corpus
(the directory), pipeline (`Batch`, `train_batches`, `validation_batches`), prepare (all of it in
a row); sources and readers say where built-in text comes from, user_files reads your own.
"""
