"""From a path to a batch: files, archives, decoding, transforms, loader."""
