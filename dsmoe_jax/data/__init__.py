"""Text -> labelled corpus -> packed sequences -> batches.

Read in this order: documents (what is kept and held out), tokenizer, packing (one record), corpus
(the directory), pipeline (`Batch`, `train_batches`, `validation_batches`), request (what a corpus
is made from), selection (its texts), prepare (all steps in a row), packed (the directory as one
file), fitting (as much text as fits in it).  sources and readers have the built-in text; user_files
finds your own (split_names: what of it is held out), text_formats reads it.
"""
