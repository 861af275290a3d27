"""``make gpu``: run.py runs the others, each a step in a process of its own."""
