"""What a run reports: metrics.py (the log), progress.py (the screen), plots.py (curves.png)."""
