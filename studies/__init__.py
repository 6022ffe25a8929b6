"""Experiments on what the optimizers do: tuned arms, paired seeds, intervals. `python -m studies NAME`.

How a study is added, with `parts` as the pattern:

1. Say what is trained: a `Task` (`training.py`), four functions of traced values: first weights, the
   batch of a step, its loss, and what an evaluation measures. All four depend on the seed alone, and
   not on the arm, so that arms are paired seed by seed. `pretraining.py` has the task of text.
2. Say what is compared: for every arm a function (values, steps, seed) -> Optax transformation. `values`
   are the trial's numbers (rates, decay, ...), scalars that are traced: a grid over them compiles once.
3. Ask for `Trial`s in the order in which they decide: `Lab.run(arm, trials)` trains those that the
   ledger lacks, many side by side (`lanes.py`), and adds a row for each. `search.py` finds the rates of
   an arm by rounds of trials.
4. Write a table and a picture from the ledger's rows (`page.py`, `tables.py`, `intervals.py`,
   `crossing.py`), also where the study was stopped halfway (`lab.until_out_of_time`).
5. Name the study's dataclass in `__main__.py`; it has the fields of `Options` and a method `run`. Give
   it a page in `docs/studies/`.
"""
