"""The environment `sql_desk`: `inside.py` is what runs in its sandboxes."""
