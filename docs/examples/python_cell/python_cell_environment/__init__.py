"""The environment `python_cell`: `inside.py` is what runs in its sandboxes."""
