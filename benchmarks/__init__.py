"""Programs that measure: accuracy.py, speed.py, ceiling.py, and what they need. Their figures are in RESULTS.md."""
