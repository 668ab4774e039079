"""Studies: a matrix of runs, the statistics over their seeds, and a report that a reader can trust.

matrix.py    the study file;  metric_names.py what it can ask for
expand.py    the runs that it stands for: budgets, shared prefixes;  dryrun.py prints them
run.py       executes them as ordinary run folders; forks schedule arms from a shared prefix
measure.py   what is measured once a run is trained
stats.py     intervals, tests, equivalence, solve rates, time to solve
findings.py  from the results of all runs to effects and verdicts
report.py    report.md and report.html;  pictures.py draws, page.py lays out, calibration.py
compares with theory
"""
