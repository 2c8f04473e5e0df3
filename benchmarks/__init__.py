"""Programs that measure: accuracy.py, parts.py, speed.py, ceiling.py, and what they need. Figures: RESULTS.md, docs."""
