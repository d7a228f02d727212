"""Tables of what the experts of a trained model learned, from its routing of a text.

    routed_text      runs a model over held-out text and keeps where every token went
    specialisation   experts by domain, by token, by position; tokens in context
    committee        the smallest set of experts with half of the gates, and who shares it
    pairs            experts chosen together, experts that are alike, overlap of two routings

Everything but `routed_text` is plain numpy: functions from arrays to arrays, for a notebook too.
A new table is a function here, and a line in `tables.TABLES`.
"""
