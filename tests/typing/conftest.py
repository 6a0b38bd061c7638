"""Code that is checked by mypy and never run."""

collect_ignore = ["user_code.py"]
