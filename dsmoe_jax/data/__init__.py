"""Text -> labelled corpus -> packed sequences -> batches.

Read in this order: documents (what is kept and held out), tokenizer, packing (one record), corpus
(the directory), pipeline (`Batch`, `train_batches`, `validation_batches`), request (what a corpus
is made from), selection (its texts), prepare (all steps in a row), packed (the directory as one
file), fitting (as much text as fits in it), in_parts (by many processes; survey: what is a copy;
parts, part_records, parts_manifest: what is known of the parts, one of them, all of them).
mixture says which domain each sequence of a run is of (apportionment: as the shares say;
reshuffling: in which order), records and places where it lies.  sources and readers have the
built-in text; own_text finds yours in user_files (split_names: what of it is held out) or
hub_datasets, text_formats reads it.
"""
