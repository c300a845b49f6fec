"""Weight files, this project's and other people's: reading, key names, loading."""
