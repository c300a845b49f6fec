"""Weight files of this and other projects: reading, key names, loading."""

from util.weights.load import load_into, load_pretrained, read_meta

__all__ = ["load_into", "load_pretrained", "read_meta"]
