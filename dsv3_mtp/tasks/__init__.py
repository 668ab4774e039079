"""Generated tasks with known answers: examples.py, their theory (markov.py), their grading
(grade.py).
"""
