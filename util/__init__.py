"""Shared helpers, one idea a file. Nothing here imports models, engines or scripts."""
