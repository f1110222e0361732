"""GSM8K: grade-school mathematics with a number for an answer; `inside.py` is what runs."""
