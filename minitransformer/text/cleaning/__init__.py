"""Looking at text before training on it: what there is, what repeats, what leaks, and what is better left out.

Documents are examined one by one in processes (`examination`), whose findings a journal holds on disk (`journal`);
then they are compared with each other (`duplicates`, `held_out`), and those that are kept are written (`writing`).
"""
