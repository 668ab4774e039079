"""Studies: a matrix of runs, the statistics over their seeds, and a report that a reader can trust.

matrix.py    the keys of a study file;  load.py reads it;  metric_names.py what it can ask for
plan.py      the study as it was at its first start;  power.py what it can find;  dryrun.py prints
             both
expand.py    the runs that it stands for: budgets, shared prefixes
run.py       executes them, beside other programs;  worker.py one run;  folder.py what is there
measure.py   what is measured once a run is trained;  archive.py the record of it, and all records
stats.py     intervals, exact tests, equivalence, time to solve
findings.py  effects and what else a report says;  words.py verdicts
alarms.py    what makes a study uninterpretable
report.py    report.md and report.html; their parts are opening.py, tables.py, pictures/, hover.py
             and page.py;  calibration.py compares with theory
compare.py   ordinary runs side by side
"""
