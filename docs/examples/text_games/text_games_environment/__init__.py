"""The environment `text_games`: `inside.py` is what runs in its sandboxes."""
