"""Pictures of what a model predicts, and plots of runs: python -m visualize."""
