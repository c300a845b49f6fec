"""Write a checkpoint for another library: python -m export."""
